"""How the process of `vllm-flashmla bench --serve` makes a row of the rounds that it timed."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from test_bench_serve import job

from vllm_flashmla_backend.bench import serve_engine


class Rounds:
    """In place of vLLM: steps that take `ms`, by round, on a clock of its own; some stamps come `late`."""

    def __init__(
        self, monkeypatch, *ms: float, late: dict[int, float] | None = None, gpu_share: float | None = None
    ) -> None:
        self.llm_engine, self.ms, self.late, self.gpu_share = self, ms, late or {}, gpu_share
        self.forward_ms: list[float] = []
        self.rounds, self.steps, self.clock, self.running, self.said = 0, 0, 0.0, [], []
        monkeypatch.setattr(serve_engine, "add_requests", self.add_requests)
        monkeypatch.setattr(serve_engine, "say", lambda kind, entry: self.said.append((kind, entry)))
        monkeypatch.setattr(serve_engine, "time", SimpleNamespace(monotonic=lambda: self.clock))

    def row(self, **of_job) -> tuple[str, dict]:
        """What a row of so many rounds says."""
        shape = {"b": 2, "context": 64, "block_size": 64, "num_blocks": 100}
        serve_engine.measure_row(self, job(rounds=len(self.ms), steps=12, **of_job), shape)
        assert not self.running
        (said,) = self.said
        return said

    def add_requests(self, llm, job, batch: int, context: int, number: int) -> list[str]:
        assert not self.running and number == self.rounds
        self.rounds, self.steps, self.running = self.rounds + 1, 0, [f"{number}-{i}" for i in range(batch)]
        return self.running

    def step(self) -> list[SimpleNamespace]:
        self.clock += self.ms[self.rounds - 1] / 1e3
        stamp = self.clock + self.late.get(self.steps, 0) / 1e3
        self.steps += 1
        if self.gpu_share:
            self.forward_ms.append(self.gpu_share * self.ms[self.rounds - 1])
        output = SimpleNamespace(
            outputs=[SimpleNamespace(token_ids=[5])], metrics=SimpleNamespace(last_token_ts=stamp)
        )
        return [output] * len(self.running)

    def collective_rpc(self, method: str) -> list[list[float]]:
        assert method == "take_forward_ms"
        taken, self.forward_ms = self.forward_ms, []
        return [taken]

    def abort_request(self, names: list[str], internal: bool) -> None:
        assert names == self.running
        self.running = []

    def has_unfinished_requests(self) -> bool:
        return bool(self.running)


def test_fastest_round_makes_a_row_and_all_are_told(monkeypatch):
    llm = Rounds(monkeypatch, 9.0, 5.0, 2.0, 4.0)
    kind, made = llm.row()
    assert (kind, made["ms_per_step"], made["rounds_ms"]) == ("rows", 2.0, [9.0, 5.0, 2.0, 4.0])
    assert (made["ms_quartiles"], made["steps"]) == ([3.5, 6.0], 48)  # of three stretches from each round


def test_the_gpus_time_of_a_step_is_the_median_over_all_rounds(monkeypatch):
    _, made = Rounds(monkeypatch, 9.0, 5.0, 2.0, gpu_share=0.5).row()
    assert (made["ms_per_step"], made["gpu_ms"]) == (2.0, 2.5)
    assert "gpu_ms" not in Rounds(monkeypatch, 2.0).row()[1]


@pytest.mark.parametrize("stretch", range(4))
def test_a_stamp_that_came_late_makes_no_round_fast(stretch, monkeypatch):
    """It makes the stretch before it long, and the one after it short."""
    step = serve_engine.WARM_STEPS + serve_engine.STRETCH * stretch
    _, made = Rounds(monkeypatch, 2.0, 2.0, late={step: 1.5}).row()
    assert (made["ms_per_step"], made["rounds_ms"]) == (2.0, [2.0, 2.0])


@pytest.mark.parametrize("ms, rounds_ms", [(18, [2.0, 1.0]), (14, [2.0]), (10, [2.0]), (0, [2.0])])
def test_round_that_the_rows_time_cuts_off_counts_from_three_stretches_on(ms, rounds_ms, monkeypatch):
    """The first round takes 34 ms; the second has `ms`, for steps of 1 ms: 5 before its first stretch."""
    llm = Rounds(monkeypatch, 2.0, 1.0, 0.5)
    kind, made = llm.row(row_seconds=(34 + ms - 0.5) / 1e3)
    assert (kind, made["rounds_ms"], made["ms_per_step"]) == ("rows", rounds_ms, rounds_ms[-1])
    assert made["steps"] == 12 * len(rounds_ms)
    assert made["ms_quartiles"][0] == (2.0 if len(rounds_ms) == 1 else 1.0)
    assert llm.rounds == {18: 3, 0: 1}.get(ms, 2)  # after 18 ms half of one is left


def test_one_round_of_two_stretches_is_a_row(monkeypatch):
    llm = Rounds(monkeypatch, 2.0, 1.0)
    kind, made = llm.row(row_seconds=0.0255)
    assert (kind, made["rounds_ms"], made["steps"], llm.rounds) == ("rows", [2.0], 8, 1)


@pytest.mark.parametrize("seconds, steps", [(0.0005, 0), (0.0235, 4)])
def test_row_without_such_a_round_is_left_out(seconds, steps, monkeypatch):
    llm = Rounds(monkeypatch, 2.0, 1.0)
    kind, made = llm.row(row_seconds=seconds)
    assert (kind, made["reason"]) == ("skipped", f"{steps} steps in {seconds:g} s, expected at least 8")
    assert llm.rounds == 1 and "ms_per_step" not in made
