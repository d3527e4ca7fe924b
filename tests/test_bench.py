"""`vllm-flashmla bench`: its cases, its verdicts, its file, its pictures; and on a GPU one measured case."""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

from vllm_flashmla_backend.bench import cases, clock, measure, peers, report
from vllm_flashmla_backend.bench.cases import ALSO, REGIMES, TABLE, Case
from vllm_flashmla_backend.bench.inputs import make_inputs, reference, relative_error
from vllm_flashmla_backend.cli import bench, main
from vllm_flashmla_backend.cli.results import unused_path

FILE_KEYS = {"gpu", "driver", "torch", "vllm", "flashinfer", "commit", "ceilings", "rows"}
ROW_KEYS = {"b", "s_q", "s_k", "h_q", "dtype", "varlen", "peer", "us", "tflops", "gbps", "rel_err"}
CEILINGS = {"read_gbps": 4660.0, "copy_gbps": 4300.0, "product_tflops": 780.0, "floor_us": 3.2}


def row(case: Case, peer: str, us: float, rel_err: float = 2e-3) -> dict:
    """A row of a results file, made by what makes real ones; only time and error are made up."""
    want = torch.ones(1, 1, 1, 512)
    call = measure.Timed(graph=None, step=None, out=want * (1 + rel_err), us=[us], mhz=[1980])
    return measure._row(case, peer, "", 1 << 20, call, want)


def results(*rows: dict) -> dict:
    head = dict.fromkeys(FILE_KEYS - {"rows", "ceilings"}, "made up") | {"date": "2000-01-01"}
    return head | {"ceilings": CEILINGS, "rows": list(rows)}


def all_rows() -> dict:
    """Every case: ours at most of what its ceiling allows, and two peers."""
    rows = []
    for index, case in enumerate(cases.ROWS["all"]):
        multiplying = case.flops() / CEILINGS["product_tflops"] / 1e6
        reading = case.bytes_moved() / CEILINGS["read_gbps"] / 1e3
        us = 6 + 1.1 * max(multiplying, reading)
        rows += [
            row(case, "ours", us),
            row(case, "fa3", us * (0.95 + 0.05 * (index % 14))),
            row(case, "triton", us * 5),
        ]
    return results(*rows)


def test_cases_are_the_24_of_the_targets():
    """b, s_q, s_k, h_q of the table; its first twelve have lengths that vary."""
    normal = [(128, 1, s_k, 128) for s_k in (4096, 16384, 32768)]
    normal += [(128, 2, s_k, 128) for s_k in (4096, 16384, 32768)]
    normal += [(128, 1, s_k, h_q) for h_q in (16, 32, 64) for s_k in (4096, 16384)]
    fixed = [
        (b, 1, s_k, h_q)
        for b, s_k in ((1, 8192), (1, 131072), (4, 8192), (16, 8192), (32, 1024), (64, 512))
        for h_q in (16, 128)
    ]
    assert len(TABLE) == 24
    shapes = {(case.b, case.s_q, case.s_k, case.h_q): case.lengths for case in TABLE}
    assert shapes == dict.fromkeys(normal, "normal") | dict.fromkeys(fixed, "fixed")
    assert {case.dtype for case in TABLE} == {"bfloat16"}


@pytest.mark.parametrize(
    "name, belongs, count, must, goal",
    [
        ("compute bound", lambda c: c.b == 128 and c.h_q * c.s_q >= 128 and c.s_k >= 16384, 4, 1.00, 1.08),
        ("memory bound", lambda c: c.b == 128 and c.h_q < 128 and c.s_k == 16384, 3, 1.05, 1.20),
        ("middle", lambda c: c.b == 128 and c.s_k == 4096, 5, 1.05, 1.20),
        ("latency", lambda c: c.b * c.s_k <= 32768, 8, 1.25, 1.50),
        ("few long", lambda c: c.b * c.s_k == 131072, 4, 1.05, 1.20),
    ],
)
def test_each_regime_holds_the_rows_that_its_targets_are_for(name, belongs, count, must, goal):
    regime = REGIMES[name]
    assert set(regime.cases) == {case for case in TABLE if belongs(case)}
    assert (len(regime.cases), regime.must, regime.goal) == (count, must, goal)


def test_extra_cases_cover_what_is_also_reported():
    extra = REGIMES[ALSO].cases
    assert {(case.s_q, case.h_q) for case in extra if case.s_q > 1} == {(3, 16), (3, 128), (4, 16), (4, 128)}
    assert {8, 20, 40} <= {case.h_q for case in extra}
    assert "float16" in {case.dtype for case in extra}
    assert {(256, 1024), (8, 131072)} <= {(case.b, case.s_k) for case in extra}
    assert not set(extra) & set(TABLE)
    (skewed,) = (case for case in extra if case.lengths == "one long" and case.h_q == 16)
    assert sorted(Counter(skewed.cache_seqlens()).items()) == [(1024, 31), (51200, 1)]


def test_lengths_are_the_same_in_every_run_and_at_least_s_q():
    case = Case(128, 2, 4096, 128, "normal")
    lengths = case.cache_seqlens()
    assert lengths == case.cache_seqlens()
    assert min(lengths) >= case.s_q
    assert abs(sum(lengths) / 128 / 4096 - 1) < 0.15
    assert len(set(lengths)) > 100


def test_flops_and_bytes_are_those_of_the_formulas():
    assert Case(1, 1, 8192, 16).flops() == 2 * 16 * 1 * 8192 * 1088
    assert Case(4, 2, 100, 128).bytes_moved() == 400 * 1152 + 4 * 2 * 128 * 2176
    made = row(Case(1, 1, 8192, 16), "ours", 10.0)
    assert (made["tflops"], made["gbps"]) == (28.5, 947.2)


def test_best_peer_is_the_fastest_that_is_right():
    case = Case(1, 1, 8192, 16)
    rows = [row(case, "ours", 10.0), row(case, "fa3", 15.0), row(case, "triton", 1.0, rel_err=0.5)]
    (comparison,) = report.compare(results(*rows, row(case, "flashmla", 40.0)))
    assert comparison.best["peer"] == "fa3"
    assert comparison.ratio == 1.5
    assert comparison.must_reached and comparison.goal_reached


@pytest.mark.parametrize(
    "case, ours_us, best_us, must, goal",
    [
        (Case(1, 1, 8192, 16), 13.0, 26.0, True, False),  # twice as fast, yet not within 12 µs
        (Case(1, 1, 8192, 128), 10.0, 12.4, False, False),
        (Case(128, 1, 16384, 128, "normal"), 1000.0, 1000.0, True, False),
        (Case(128, 1, 16384, 128, "normal"), 1000.0, 1200.0, True, False),  # below 660 TFLOP/s
        (Case(128, 1, 16384, 128, "normal"), 800.0, 1000.0, True, True),
        (Case(128, 1, 16384, 16, "normal"), 700.0, 900.0, True, False),  # below 4,200 GB/s
    ],
)
def test_must_and_goal(case, ours_us, best_us, must, goal):
    (comparison,) = report.compare(results(row(case, "ours", ours_us), row(case, "fa3", best_us)))
    assert (comparison.must_reached, comparison.goal_reached) == (must, goal)


def test_wrong_result_of_ours_reaches_nothing_and_fails_the_run(tmp_path, capsys):
    case = Case(1, 1, 8192, 16)
    path = tmp_path / "wrong.json"
    report.save(results(row(case, "ours", 1.0, rel_err=0.02), row(case, "fa3", 20.0)), path)
    assert main(["bench", "--plot", str(path), "--no-plots"]) == 1
    assert "1.0 WRONG" in capsys.readouterr().out
    (comparison,) = report.compare(report.read(path))
    assert not comparison.must_reached


def test_nan_is_wrong_and_is_written_as_null(tmp_path):
    nan = row(Case(1, 1, 8192, 16), "fa3", 1.0, rel_err=float("nan"))
    assert nan["right"] is False
    report.save(results(nan), tmp_path / "nan.json")
    assert json.loads((tmp_path / "nan.json").read_text(), parse_constant=pytest.fail)


def test_geometric_mean_is_of_the_ratios_of_the_table_alone(tmp_path, capsys):
    fast, slow, extra = TABLE[0], TABLE[1], REGIMES[ALSO].cases[0]
    rows = [row(fast, "ours", 10.0), row(fast, "fa3", 40.0), row(slow, "ours", 10.0), row(slow, "fa3", 10.0)]
    report.save(results(*rows, row(extra, "ours", 1.0), row(extra, "fa3", 9.0)), tmp_path / "r.json")
    assert main(["bench", "--plot", str(tmp_path / "r.json"), "--no-plots"]) == 0
    assert "geometric mean over 2 cases: 2.000" in capsys.readouterr().out


def test_file_and_rows_have_their_keys(tmp_path):
    made = all_rows()
    report.save(made, tmp_path / "deep" / "r.json")
    read = report.read(tmp_path / "deep" / "r.json")
    assert read == made
    assert read.keys() >= FILE_KEYS
    assert all(each.keys() >= ROW_KEYS | {"sm_mhz", "regime", "workspace_bytes"} for each in read["rows"])


def test_pictures_show_every_case(tmp_path, capsys):
    path = tmp_path / "gpu-2000-01-01.json"
    report.save(all_rows(), path)
    assert main(["bench", "--plot", str(path)]) == 0
    for picture in ("roofline", "ratios"):
        assert (tmp_path / f"gpu-2000-01-01-{picture}.png").read_bytes().startswith(b"\x89PNG")
    said = capsys.readouterr().out
    from vllm_flashmla_backend.bench import plots

    bars = plots.ratio_bars(report.read(path))
    roofline = plots.roofline(report.read(path))
    key = "\n".join(text.get_text() for text in roofline.axes[1].texts)
    numbers = {text.get_text() for text in roofline.axes[0].texts}
    for number, case in enumerate(cases.ROWS["all"], 1):
        assert str(case) in said
        assert str(case) in [label.get_text() for label in bars.axes[0].get_yticklabels()]
        assert f"{number:>2}  {case}\n" in key + "\n"
        assert str(number) in numbers
    comparisons = report.compare(report.read(path))
    assert [bar.get_width() for bar in bars.axes[0].patches] == [each.ratio for each in comparisons]


def test_bar_past_its_goal_that_misses_it_says_what_else_is_asked_for():
    from vllm_flashmla_backend.bench import plots

    slow = row(TABLE[0], "ours", 1000.0) | {"tflops": 500.0}
    bars = plots.ratio_bars(results(slow, row(TABLE[0], "fa3", 2000.0)))
    (said,) = (text.get_text() for text in bars.axes[0].texts)
    assert said == "2.000   1000.0 µs, fa3 2000.0 µs; goal 660 TFLOP/s, ours 500"


def test_a_part_of_the_table_is_not_held_against_the_mean_asked_of_all():
    console = Console(width=200)
    with console.capture() as said:
        console.print(report.summary(results(row(TABLE[0], "ours", 1.0), row(TABLE[0], "fa3", 2.0))))
    assert "geometric mean over 1 case: 2.000\n" in said.get()


def test_case_that_does_not_fit_is_a_failure_of_each_peer(monkeypatch):
    def no_room(case, device):
        raise torch.OutOfMemoryError("Tried to allocate 5 TiB")

    monkeypatch.setattr(measure, "make_inputs", no_room)
    rows, failures = measure.measure_case(TABLE[0], [SimpleNamespace(name="ours")], None, torch.device("cpu"))
    assert not rows
    assert [(each["peer"], each["b"]) for each in failures] == [("ours", 128)]
    assert failures[0]["error"] == "the case does not fit the GPU: Tried to allocate 5 TiB"


PEERS = ["ours", "invariant", "flashmla", "fa3", "flashinfer", "triton"]
VERDICT, DETAILS = ["ratio", "must", "goal"], ["error", "MHz", "workspace"]


@pytest.mark.parametrize(
    "width, headings",
    [
        (220, [*PEERS, *VERDICT, "TFLOP/s", "GB/s", *DETAILS]),
        (180, [*PEERS, *VERDICT, "TFLOP/s", "GB/s", "error", "MHz"]),
        (120, [*PEERS, *VERDICT, "TFLOP/s", "GB/s"]),
        (80, ["ours", "best peer", *VERDICT]),
        (72, ["ours", "best peer", "ratio", "must"]),
    ],
)
def test_narrow_terminal_goes_without_columns_and_shows_the_others_whole(width, headings):
    times = dict(zip(PEERS, (1000.1, 2000.2, 1500.3, 3000.4, 4000.5, 5000.6), strict=True))
    rows = [row(case, peer, us) for case in TABLE for peer, us in times.items()]
    console = Console(width=width)
    with console.capture() as said:
        console.print(report.summary(results(*rows)))
    (heads,) = (line for line in said.get().splitlines() if "┃" in line and "ours" in line)
    (line,) = (line for line in said.get().splitlines() if "b=128 s_q=2 s_k=32768 h=128 normal" in line)
    cells = [" ".join(cell.split()) for cell in re.split("[│┃]", heads.strip("│┃"))]
    assert [cell for cell in cells if cell] == ["case", *headings]
    best = {"best peer": "flashmla 1500.3"}
    shown = [str(times[name]) if name in times else best[name] for name in headings if name in times | best]
    cells = [" ".join(cell.split()) for cell in re.split("[│┃]", line.strip("│┃"))]
    assert cells[1 : len(shown) + 1] == shown
    assert cells[len(shown) + 1 : len(shown) + 3] == ["1.500", "1.00 ✓"]
    assert "…" not in said.get()


def test_terminal_of_56_columns_folds_the_cases_and_nothing_else():
    console = Console(width=56)
    with console.capture() as said:
        console.print(report.summary(results(*(row(case, "flashinfer", 1500.3) for case in TABLE))))
    assert said.get().count("flashinfer 1500.3") == len(TABLE)
    assert "…" not in said.get()


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
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 0)

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
        (["--row-seconds", "3"], "--row-seconds: not for `bench`"),
        (["--plot", "r.json", "--repeat", "3"], "--repeat: not for `bench --plot`"),
        (["--serve", "--plot", "r.json", "--heads", "16"], "--heads: not for `bench --serve --plot`"),
        (["--plot", "/nowhere/r.json"], "/nowhere/r.json: No such file or directory; expected a results"),
    ],
)
def test_wrong_options_are_named(options, message):
    with pytest.raises(SystemExit, match=re.escape(message)):
        main(["bench", *options])


@pytest.mark.parametrize("case", cases.ROWS["all"], ids=str)
def test_a_case_is_parsed_from_its_words(case):
    assert Case.parse(str(case)) == case
    assert Case.parse(str(case).replace(" s_q=1", " ")) == case


@pytest.mark.parametrize(
    "words, message",
    [
        ("b=32 h=16", "'b=32 h=16', expected a case as in 'b=32 s_k=4096 h=16'"),
        ("b=32 s_k=4096 h=16 random", "lengths are fixed, normal, one long"),
        ("b=0 s_k=4096 h=16", "expected b from 1 to 65,536"),
        ("b=1 s_k=2147483648 h=16", "and up to 2,147,483,647 tokens in all"),
        ("b=60000 s_k=40000000 h=16", "and up to 2,147,483,647 tokens in all"),
        ("b=1 s_k=42949673 h=16 one long", "and up to 2,147,483,647 tokens in all"),
        ("b=1 s_k=٤٠٩٦ h=16", "expected a case as in"),
        ("b=1 s_q=9 s_k=8 h=16", "s_k from s_q"),
        ("b=1 s_k=8 h=129", "h from 1 to 128"),
    ],
)
def test_wrong_case_says_what_is_expected(words, message, capsys):
    with pytest.raises(SystemExit):
        main(["bench", "--case", words])
    said = " ".join(capsys.readouterr().err.split())
    assert f"argument --case: {words!r}, expected" in said
    assert message in said


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
    child = f"import time, pathlib; time.sleep(3); pathlib.Path({str(mark)!r}).touch()"
    program = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    assert "longer than 1 s" in peers._run_limited(program, 1)
    assert peers._run_limited("pass", 20) is None
    assert "no nvcc" in peers._run_limited("raise RuntimeError('no nvcc')", 20)
    time.sleep(3)
    assert not mark.exists()


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
