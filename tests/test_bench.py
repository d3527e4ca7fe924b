"""`vllm-flashmla bench`: how it measures, its options; and on a GPU one measured case."""

from __future__ import annotations

import argparse
import re
import sys
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from test_bench_report import CEILINGS, FILE_KEYS, results, row

from vllm_flashmla_backend.bench import cases, clock, measure, peers, report
from vllm_flashmla_backend.bench.cases import TABLE, Case
from vllm_flashmla_backend.bench.inputs import make_inputs, reference, relative_error
from vllm_flashmla_backend.cli import bench, main
from vllm_flashmla_backend.cli.results import unused_path


def test_second_run_of_a_day_keeps_the_first(tmp_path):
    first = unused_path(tmp_path, "NVIDIA H200", "2000-01-01")
    assert first.name == "nvidia-h200-2000-01-01.json"
    first.touch()
    assert unused_path(tmp_path, "NVIDIA H200", "2000-01-01").name == "nvidia-h200-2000-01-01-2.json"


def test_run_that_is_cut_off_leaves_what_it_had(tmp_path, monkeypatch):
    def measure_case(case, *_):
        if case == cases.QUICK[2]:
            raise KeyboardInterrupt
        return [row(case, "ours", 10.0)], []

    head = {key: value for key, value in results().items() if key not in ("rows", "ceilings")}
    monkeypatch.setattr(bench, "describe_run", lambda *_: head)
    monkeypatch.setattr(clock, "GpuMonitor", lambda *_: None)
    monkeypatch.setattr(peers, "load", lambda *_: ([], {}))
    monkeypatch.setattr(measure, "Timer", lambda *_: None)
    monkeypatch.setattr(measure, "ceilings", lambda *_: CEILINGS)
    monkeypatch.setattr(measure, "plan_launches", lambda *_: [])
    monkeypatch.setattr(measure, "measure_case", measure_case)
    options = argparse.Namespace(rows="quick", case=None, peers="", repeat=1, out=tmp_path, build_limit=1.0)
    with pytest.raises(KeyboardInterrupt):
        bench.measure_all(options, [])
    (path,) = tmp_path.iterdir()
    assert [comparison.case for comparison in report.compare(report.read(path))] == list(cases.QUICK[:2])


def test_case_is_measured_at_its_fastest_setting_and_errors_are_kept(monkeypatch):
    """On the CPU, with clocks and graphs replaced: the results of two settings, one wrong, and an error."""
    case = Case(2, 1, 100, 16)
    monkeypatch.setattr(measure, "capture", lambda step: measure.Timed(None, step, step()))
    monkeypatch.setattr(measure, "_workspace", lambda *_: 0)
    monkeypatch.setattr(torch.cuda, "memory_stats", lambda: {"requested_bytes.all.current": 0})

    class Settings:
        name = "settings"

        def takes(self, _):
            return True

        def prepare(self, inputs):
            right = reference(inputs)
            return {"slow": lambda: right, "fast": lambda: right, "fastest, wrong": lambda: right * 2}

    class Broken(Settings):
        name = "broken"

        def prepare(self, inputs):
            raise RuntimeError("no kernel image")

    class NotTaken(Broken):
        def takes(self, _):
            return False

    class Timer:
        def take_turns(self, calls):
            for call, us in zip(calls, (30.0, 20.0, 10.0), strict=True):
                call.us = [us + 1, us, us - 1]

    rows, failures = measure.measure_case(
        case, [Settings(), Broken(), NotTaken()], Timer(), torch.device("cpu")
    )
    assert [(made["setting"], made["us"], made["right"]) for made in rows] == [("fast", 20.0, True)]
    assert [(made["peer"], made["error"]) for made in failures] == [
        ("broken", "RuntimeError: no kernel image")
    ]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(tmp_path, capsys):
    assert main(["bench", "--out", str(tmp_path)]) == 1
    assert "torch sees no GPU" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "options, message",
    [
        (["--peers", "fa3,fastest"], "--peers has fastest"),
        (["--repeat", "0"], "--repeat is 0"),
        (["--build-limit", "0"], "--build-limit is 0, expected at least 1"),
        (["--serve", "--rows", "all"], "--rows: not for `bench --serve`"),
        (["--tails", "--no-plots", "--batches", "1"], "--no-plots, --batches: not for `bench --tails`"),
        (["--row-seconds", "3"], "--row-seconds: not for `bench`, but for `bench --serve`"),
        (["--heads", "8"], "--heads: not for `bench`, but for `bench --serve` and `bench --tails`"),
        (["--serve", "--rows", "all", "--cached", "9"], "; `vllm-flashmla bench --help` says what is"),
        (["--plot", "r.json", "--repeat", "3"], "--repeat: not for `bench --plot`"),
        (
            ["--plot", "a/r.json", "--out", "b"],
            "not for `bench --plot`, which measures nothing; pictures go ",
        ),
        (["--plot", "a/r.json", "--heads", "16"], "which measures nothing; pictures go beside a/r.json"),
        (["--serve", "--plot", "r.json", "--heads", "16"], "--heads: not for `bench --serve --plot`"),
        (["--plot", "/nowhere/r.json"], "/nowhere/r.json: No such file or directory; expected a results"),
    ],
)
def test_wrong_options_are_named(options, message):
    with pytest.raises(SystemExit, match=re.escape(message)):
        main(["bench", *options])


def test_tails_draw_no_pictures_and_speak_of_none():
    with pytest.raises(SystemExit, match="which measures nothing$"):
        main(["bench", "--tails", "--plot", "r.json", "--out", "b"])


def test_case_that_does_not_fit_is_a_failure_of_each_peer(monkeypatch):
    def no_room(case, device):
        raise torch.OutOfMemoryError("Tried to allocate 5 TiB")

    monkeypatch.setattr(measure, "make_inputs", no_room)
    rows, failures = measure.measure_case(TABLE[0], [SimpleNamespace(name="ours")], None, torch.device("cpu"))
    assert not rows
    assert [(each["peer"], each["b"]) for each in failures] == [("ours", 128)]
    assert failures[0]["error"] == "the case does not fit the GPU: Tried to allocate 5 TiB"


def test_every_option_is_one_of_a_benchmark_and_no_other_is_named():
    parser = argparse.ArgumentParser()
    bench.add_arguments(parser)
    assert set().union(bench.OF_ALL, *bench.OPTIONS.values()) == vars(parser.parse_args([])).keys()


def test_inputs_are_those_of_the_reference():
    """The table leads to each sequence's own pages, in order, and the peers' views of it agree."""
    case = Case(5, 2, 200, 16, "normal")
    inputs = make_inputs(case, torch.device("cpu"))
    assert inputs.cache_seqlens.tolist() == case.cache_seqlens()
    assert sorted(inputs.pages.tolist()) == list(range(inputs.k_cache.shape[0]))
    for seq, length in enumerate(case.cache_seqlens()):
        mine = inputs.pages[inputs.pages_before[seq] : inputs.pages_before[seq + 1]]
        assert len(mine) == -(-length // 64)
        assert torch.equal(inputs.block_table[seq, : len(mine)], mine)
    assert torch.equal(torch.cat([inputs.q_nope, inputs.q_pe], dim=-1), inputs.q)


@pytest.mark.parametrize("tokens", [4096, 32768])
def test_error_tells_a_missing_page_from_rounding(tokens):
    """The bound must lie between what bf16 costs and what one page of 64 tokens changes."""
    case = Case(1, 1, tokens, 16)
    inputs = make_inputs(case, torch.device("cpu"))
    want = reference(inputs)
    assert relative_error(want.bfloat16(), want) < measure.LARGEST_ERROR / 2
    page_short = replace(inputs, cache_seqlens=inputs.cache_seqlens - 64)
    assert relative_error(reference(page_short), want) > measure.LARGEST_ERROR


def test_peer_that_cannot_be_imported_says_why(monkeypatch):
    monkeypatch.setitem(sys.modules, "flashinfer.mla", None)
    loaded, missing = peers.load(["flashinfer"], torch.device("cpu"))
    assert not loaded
    assert "flashinfer.mla" in missing["flashinfer"]


def test_build_past_its_limit_is_ended_with_all_it_started(tmp_path):
    mark = tmp_path / "mark"
    started = tmp_path / "started"
    child = f"import time, pathlib; pathlib.Path({str(started)!r}).touch(); time.sleep(6)"
    child += f"; pathlib.Path({str(mark)!r}).touch()"
    program = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    assert "longer than 3 s" in peers._run_limited(program, 3)
    assert peers._run_limited("pass", 20) is None
    assert "no nvcc" in peers._run_limited("raise RuntimeError('no nvcc')", 20)
    time.sleep(4)
    assert started.exists() and not mark.exists()


@pytest.mark.gpu
def test_one_small_case_is_measured_and_ours_is_right(tmp_path):
    options = argparse.Namespace(
        case=[Case(4, 1, 300, 16, "normal")],
        peers="flashmla,fa3",
        repeat=3,
        out=tmp_path,
        commit="0" * 40,
        build_limit=1.0,
    )
    path = bench.measure_all(options, ["flashmla", "fa3"])
    made = report.read(path)
    assert made.keys() >= FILE_KEYS
    assert made["options"] == {"peers": "flashmla,fa3", "repeat": 3, "build_limit": 1.0}
    (comparison,) = report.compare(made)
    assert comparison.ours and comparison.ours["us"] > 0
    assert comparison.ours["rel_err"] < 5e-3
    # Other tests may share the GPU: its limits bound from above, a tenth of what it can do from below.
    assert 400 < made["ceilings"]["read_gbps"] < 10_000
    assert 50 < made["ceilings"]["product_tflops"] < 2000
    assert [plan["b"] for plan in made["plan"]] == [1, 512]
