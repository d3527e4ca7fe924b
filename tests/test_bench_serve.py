"""`vllm-flashmla bench --serve`: what its rows come to, how runs join, and a run of whole vLLM."""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path

import pytest
import torch
from rich.console import Console

from vllm_flashmla_backend.bench import report, serve, serve_plot, serve_report
from vllm_flashmla_backend.bench.serve import Job
from vllm_flashmla_backend.cli import bench_serve, main
from vllm_flashmla_backend.cli.options import numbers

ON_GPU = torch.cuda.is_available()
HEAD = {
    "gpu": "NVIDIA H200",
    "driver": "made up",
    "torch": "made up",
    "vllm": "made up",
    "commit": "0" * 40,
    "date": "2000-01-01",
    "model": {"layers": 16},
    "options": {"rounds": 8, "steps": 12, "row_seconds": 15.0},
}


def row(backend: str, ms: float, h: int = 16, b: int = 1, context: int = 1024) -> dict:
    shape = {"h": h, "b": b, "context": context}
    times = {"ms_per_step": ms, "rounds_ms": [ms, ms], "ms_quartiles": [ms, ms], "steps": 32}
    return shape | {"backend": backend} | times


def older(made: dict) -> dict:
    """The row as files had it whose rows were the median of all stretches."""
    return {key: value for key, value in made.items() if key != "rounds_ms"}


def results(*rows: dict, **other) -> dict:
    return HEAD | {"rows": list(rows), "skipped": [], "failures": []} | other


def job(**other) -> Job:
    fields = dict(backend="ours", model=str(serve.MODEL), layers=2, heads=(16,), batches=(1,), contexts=(64,))
    return Job(**fields | dict(rounds=1, steps=8, row_seconds=60) | other)


def test_default_rows_are_those_of_the_issue():
    assert (serve.HEADS, serve.BATCHES, serve.CONTEXTS) == (
        (16, 128),
        (1, 16, 64, 128),
        (1024, 8192, 32768),
    )
    assert serve.PEERS["cuda"] == ("FLASHMLA", "FLASH_ATTN_MLA", "TRITON_MLA")


def test_model_has_the_attention_of_deepseek_v3():
    shape = serve.model_shape(serve.MODEL, 16)
    attention = ("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
    assert [shape[name] for name in attention] == [1536, 512, 128, 64, 128]
    assert (shape["layers"], shape["hidden_size"]) == (16, 7168)


def test_ratio_is_the_best_peers_time_over_ours():
    made = results(row("ours", 2.0), row("FLASHMLA", 5.0), row("FLASH_ATTN_MLA", 3.0))
    (comparison,) = serve_report.compare(made)
    assert comparison.best["backend"] == "FLASH_ATTN_MLA"
    assert comparison.ratio == 1.5


def test_attention_bound_is_a_step_twice_as_long_as_at_the_shortest_context():
    rows = [row("ours", 1.0, context=context) for context in (1024, 8192, 32768)]
    rows += [row("FLASHMLA", ms, context=c) for c, ms in ((1024, 1.0), (8192, 1.9), (32768, 2.0))]
    rows += [row("FLASHMLA", 9.0, b=64)]  # another batch, whose shortest context this is
    bound = {(c.b, c.context): c.attention_bound for c in serve_report.compare(results(*rows))}
    assert bound == {(1, 1024): False, (1, 8192): False, (1, 32768): True, (64, 1024): False}


def test_summary_names_means_rows_left_out_and_failures(tmp_path, capsys):
    rows = [row("ours", 1.0), row("FLASHMLA", 1.21), row("ours", 2.0, context=8192)]
    rows += [row("FLASHMLA", 3.2, context=8192)]
    skipped = row("TRITON_MLA", 0.0) | {"reason": "needs 9 blocks"}
    failure = {"backend": "FLASH_ATTN_MLA", "error": "ended with status 1", "log": ""}
    path = tmp_path / "r.json"
    report.save(results(*rows, skipped=[skipped], failures=[failure]), path)
    assert main(["bench", "--serve", "--plot", str(path), "--no-plots"]) == 0
    said = capsys.readouterr().out
    assert "in 2 of 2 rows" in said
    assert "geometric mean over 1 attention-bound row: 1.600; goal 1.15 ✓" in said
    assert "geometric mean over 2 rows: 1.391" in said
    assert "TRITON_MLA left out at h=16 b=1 context=1024: needs 9 blocks" in said
    assert "FLASH_ATTN_MLA failed: ended with status 1" in said


ALL = ("ours", "FLASHMLA", "FLASH_ATTN_MLA", "TRITON_MLA")


def with_rows_left_out() -> dict:
    """32k fits under no backend; at 8k one takes too long, and ours is ahead; at 1k ours is behind."""
    times = {1024: (2.0, 1.0, 3.0, 4.0), 8192: (2.0, 4.0, 3.0, 8.0)}
    rows = [
        row(backend, ms, 128, 128, context)
        for context, of_backends in times.items()
        for backend, ms in zip(ALL, of_backends, strict=True)
        if (context, backend) != (8192, "TRITON_MLA")
    ]
    too_large = [left_out(backend, 128, 128, 32768, "needs 65,792 blocks") for backend in ALL]
    return results(*rows, skipped=[*too_large, left_out("TRITON_MLA", 128, 128, 8192, "4 steps in 5 s")])


def left_out(backend: str, h: int, b: int, context: int, reason: str) -> dict:
    return {"h": h, "b": b, "context": context, "backend": backend, "reason": reason}


@pytest.mark.parametrize("width, cells", [(220, 4), (70, 2)])
def test_row_left_out_is_shown_as_such_and_counted_nowhere(width, cells):
    console = Console(width=width)
    with console.capture() as said:
        console.print(serve_report.summary(with_rows_left_out()))
    lines = said.get().replace("│", " ").splitlines()
    (largest,) = (line.split() for line in lines if " 32,768 " in line)
    assert largest == ["128", "128", "32,768", *["left", "out"] * cells, "–", "–"]
    (middle,) = (line for line in lines if " 8,192* " in line)
    assert middle.count("left out") == cells // 4  # not its best peer's, which the narrow table has
    assert "at or ahead of the best peer in 1 of 2 rows" in said.get()
    assert "geometric mean over 1 attention-bound row: 1.500" in said.get()
    assert "geometric mean over 2 rows: 0.866" in said.get()  # of 1.5 and 0.5
    assert said.get().count("left out at") == 5


def test_picture_shows_rows_left_out_and_judges_none():
    figure = serve_plot.step_bars(with_rows_left_out())
    (axes,) = figure.axes
    assert len(axes.patches) == 5
    assert [text.get_text() for text in axes.texts].count("left out") == 4
    names = {tick.get_text().split("\n")[0]: tick for tick in axes.get_xticklabels()}
    assert names["128 × 32k"].get_text() == "128 × 32k\nleft out"
    colours = [names[f"128 × {context}"].get_color() for context in ("1k", "8k", "32k")]
    assert colours == [serve_plot.MISSED, serve_plot.GOAL, serve_plot.NOT_COMPARED]


def test_rows_left_out_are_no_failure(tmp_path):
    report.save(with_rows_left_out(), tmp_path / "r.json")
    assert main(["bench", "--serve", "--plot", str(tmp_path / "r.json"), "--no-plots"]) == 0


def test_attention_bound_is_told_by_the_shortest_context_that_a_peer_was_measured_at():
    made = [row("FLASHMLA", 1.0, context=8192), row("FLASHMLA", 2.0, context=32768), row("ours", 1.0)]
    made += [row("ours", 1.0, context=32768)]
    skipped = [left_out("FLASHMLA", 16, 1, 1024, "0 steps"), left_out("ours", 16, 1, 512, "0 steps")]
    bound = {c.context: c.attention_bound for c in serve_report.compare(results(*made, skipped=skipped))}
    assert bound == {512: False, 1024: False, 8192: False, 32768: True}


@pytest.mark.parametrize("width, peers", [(120, 3), (80, 3), (70, 1)])
def test_narrow_terminal_shows_every_time_whole_or_the_best_peers_alone(width, peers):
    times = {"ours": 20.125, "FLASHMLA": 40.25, "FLASH_ATTN_MLA": 30.375, "TRITON_MLA": 130.5}
    console = Console(width=width)
    with console.capture() as said:
        rows = [row(backend, ms, 128, 128, context=32768) for backend, ms in times.items()]
        console.print(serve_report.summary(results(*rows)))
    assert sum(f"{ms:.3f}" in said.get() for ms in times.values()) == peers + 1
    assert peers == 3 or "FLASH_ATTN_MLA 30.375" in said.get()
    assert all(name in said.get() for name in (times if peers == 3 else ["ours", "FLASH_ATTN_MLA"]))
    assert "…" not in said.get()


def test_run_in_which_ours_failed_is_told_by_the_exit_status(tmp_path):
    failure = {"backend": "ours", "error": "ended with status 1", "log": ""}
    report.save(results(row("FLASHMLA", 1.0), failures=[failure]), tmp_path / "r.json")
    assert main(["bench", "--serve", "--plot", str(tmp_path / "r.json"), "--no-plots"]) == 1


def test_picture_has_a_bar_for_each_peer_and_shape():
    rows = [row(backend, ms, h) for h in (16, 128) for backend, ms in (("ours", 2.0), ("FLASHMLA", 3.0))]
    rows += [row("TRITON_MLA", 12.0, h=128)]
    figure = serve_plot.step_bars(results(*rows))
    heights = [[bar.get_height() for bar in axes.patches] for axes in figure.axes]
    assert heights == [[1.5], [1.5, serve_plot.TALLEST]]
    assert "6.00" in [text.get_text() for text in figure.axes[1].texts]
    gaps = [[line for line in axes.lines if line.get_color() == "white"] for axes in figure.axes]
    assert list(map(len, gaps)) == [0, 1], "where a bar is cut off"
    assert "a bar with a gap goes on" in figure.get_suptitle()
    assert "NVIDIA H200, 2000-01-01, 0000000\n" in figure.get_suptitle()
    assert "gap" not in serve_plot.step_bars(results(*rows[:-1])).get_suptitle()


def test_rows_of_a_later_run_replace_those_of_the_same_shape_and_backend():
    made = results(row("ours", 2.0), row("FLASHMLA", 3.0))
    serve.add(made, "rows", row("ours", 1.0))
    serve.add(made, "skipped", row("FLASHMLA", 0.0) | {"reason": "memory"})
    assert made["rows"] == [row("ours", 1.0)]
    assert [entry["backend"] for entry in made["skipped"]] == ["FLASHMLA"]


@pytest.mark.parametrize(
    "change, joins",
    [
        ({}, True),
        ({"date": "2000-01-02"}, True),
        ({"commit": "1" * 40}, False),
        ({"driver": "newer"}, False),
        ({"model": {"layers": 8}}, False),
        ({"options": HEAD["options"] | {"rounds": 3}}, False),
        ({"commit": "0" * 40 + "-dirty"}, False),
        ({"commit": None}, False),
    ],
)
def test_runs_join_where_machine_versions_model_commit_and_options_are_the_same(tmp_path, change, joins):
    path = tmp_path / "nvidia-h200-2000-01-01-serve.json"
    report.save(results(row("ours", 1.0)), path)
    assert serve.mergeable(tmp_path, HEAD | change) == (path if joins else None)


def test_failures_of_other_backends_outlast_a_run_that_joins(tmp_path, monkeypatch):
    of = [("ours", 16), ("FLASHMLA", 16), ("FLASHMLA", 128)]
    failures = [{"backend": name, "heads": [heads], "error": "boom", "log": ""} for name, heads in of]
    report.save(results(row("ours", 1.0), failures=failures), tmp_path / "nvidia-h200-2000-01-01-serve.json")
    monkeypatch.setattr(bench_serve, "describe_run", lambda *_: dict(HEAD))
    monkeypatch.setattr(serve, "model_shape", lambda *_: HEAD["model"])
    args = argparse.Namespace(out=tmp_path, model=None, layers=16, heads=(16,))
    joined, _ = bench_serve.begin(args, [job(backend="FLASHMLA")])
    assert joined["failures"] == [failures[0], failures[2]]


def test_more_layers_than_a_cpu_has_room_for_leave_no_token():
    assert serve.cpu_cache_tokens(1000) == 0


def test_rows_join_no_file_that_does_not_say_how_its_rows_were_timed(tmp_path):
    made = results(older(row("ours", 1.0)))
    del made["options"]
    report.save(made, tmp_path / "nvidia-h200-2000-01-01-serve.json")
    assert serve.mergeable(tmp_path, HEAD) is None


def test_uncommitted_code_joins_not_even_itself(tmp_path):
    head = HEAD | {"commit": "0" * 40 + "-dirty"}
    report.save(results(row("ours", 1.0)) | head, tmp_path / "nvidia-h200-2000-01-01-serve.json")
    assert serve.mergeable(tmp_path, head) is None


def test_process_that_fails_is_reported_with_the_end_of_its_log(tmp_path):
    reports = list(serve.measure(job(model=str(tmp_path))))  # no config.json there
    assert [*reports[-1]] == ["failure"]
    error, log = reports[-1]["failure"]["error"], reports[-1]["failure"]["log"]
    assert error.startswith("ended with status 1\n") and "Error: " in error
    assert str(tmp_path) in log


@pytest.mark.parametrize("kind", ["--serve --contexts 64", "--tails --cached 64"])
def test_run_of_which_nothing_came_ends_with_the_causes_and_leaves_no_file(kind, tmp_path, monkeypatch):
    small = f"{kind} --layers 1 --heads 16"  # a CPU has room for it
    error = "ended with status 1\nValueError: no room\nRuntimeError: see above"
    failure = {"backend": "ours", "error": error, "log": "Traceback"}
    monkeypatch.setattr(serve, "measure", lambda job: iter([{"failure": failure}]))
    with pytest.raises(SystemExit, match=f"(?s)^nothing was measured.* {error}"):
        main(["bench", *small.split(), "--out", str(tmp_path)])
    assert not list(tmp_path.iterdir())


def test_terminal_of_56_columns_shows_the_best_peer_and_the_ratio_whole():
    times = {"ours": 2.0, "FLASHMLA": 4.0, "FLASH_ATTN_MLA": 3.0, "TRITON_MLA": 5.0}
    rows = [row(backend, ms) | {"gpu_ms": ms} for backend, ms in times.items()]
    console = Console(width=56)
    with console.capture() as said:
        console.print(serve_report.summary(results(*rows)))
    assert "FLASH_ATTN_MLA 3.000 (3.00)│1.500" in said.get()
    assert "…" not in said.get()


def test_file_of_another_kind_is_told_with_the_option_that_suits(tmp_path):
    path = tmp_path / "r.json"
    for head, asked, remedy in (
        ("model", [], "a file of `bench --serve`; add --serve"),
        ("ceilings", ["--serve"], "a file of `bench`; leave out --serve"),
        ("tails_model", ["--serve"], "a file of `bench --tails`; add --tails and leave out --serve"),
    ):
        report.save({head: {}, "rows": [row("ours", 1.0)]}, path)
        with pytest.raises(SystemExit, match=re.escape(remedy)):
            main(["bench", *asked, "--plot", str(path), "--no-plots"])


def test_rows_are_compared_by_the_gpus_time_where_all_have_it():
    ours, peer = row("ours", 2.0) | {"gpu_ms": 1.0}, row("FLASHMLA", 1.9) | {"gpu_ms": 1.2}
    (comparison,) = serve_report.compare(results(ours, peer))
    assert comparison.ratio == 1.2
    console = Console(width=120)
    with console.capture() as said:
        console.print(serve_report.summary(results(ours, peer)))
    assert "1.000 (2.00)" in said.get() and "at or ahead of the best peer in 1 of 1 row\n" in said.get()
    assert "by whole steps, host included: at or ahead in 0 of 1 row\n" in said.get()
    (mixed,) = serve_report.compare(results(ours, row("FLASHMLA", 1.9)))
    assert mixed.ratio == 1.9 / 2.0


@pytest.mark.parametrize(
    "kind, words",
    [(dict, "the fastest of its rounds' medians"), (older, "the median of all its stretches")],
)
def test_table_and_picture_say_what_a_time_is(kind, words):
    made = results(kind(row("ours", 2.0)), kind(row("FLASHMLA", 3.0)))
    console = Console(width=120)
    with console.capture() as said:
        console.print(serve_report.summary(made))
    assert words in " ".join(said.get().split()) and "1.500" in said.get()
    assert words in serve_plot.step_bars(made).get_suptitle()


def test_process_that_reports_nothing_is_ended():
    (failure,) = serve.measure(job(), silence_seconds=1)
    assert failure["failure"]["error"] == "reported nothing for 1 s"


@pytest.mark.parametrize(
    "options, message",
    [
        (["--backends", "ours,FASTEST"], "--backends has FASTEST"),
        (["--layers", "0"], "--layers is 0"),
        (["--steps", "7"], "--steps is 7, expected at least 8"),
        (["--rounds", "0"], "--rounds is 0, expected at least 1"),
        (["--row-seconds", "-1"], "--row-seconds is -1, expected at least 1"),
        (["--row-seconds", "nan"], "--row-seconds is nan, expected at least 1"),
        (["--tails"], "--serve and --tails are two benchmarks: expected one of them"),
        (["--heads", "16,129"], "--heads: got 129 query heads, expected 1 to 128"),
        (["--model", "/nowhere"], "--model is /nowhere"),
        (["--plot", "/nowhere/r.json"], "/nowhere/r.json"),
    ],
)
def test_wrong_options_are_named(options, message):
    with pytest.raises(SystemExit, match=re.escape(message)):
        main(["bench", "--serve", *options])


def test_numbers_are_numbers_from_1():
    assert numbers("16,128") == (16, 128)
    for wrong in ("16,,128", "0", "-1", "x"):
        with pytest.raises(argparse.ArgumentTypeError, match="expected numbers from 1"):
            numbers(wrong)


def small_model(directory: Path) -> Path:
    """DeepSeek-V3's attention in a model that a CPU can run."""
    config = json.loads((serve.MODEL / "config.json").read_text())
    config |= {"hidden_size": 256, "intermediate_size": 256, "q_lora_rank": 64}
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(config))
    return directory


@pytest.mark.slow
@(pytest.mark.gpu if ON_GPU else lambda test: test)
def test_vllm_is_timed_with_the_plugin_and_without(tmp_path, capfd):
    """Each backend's own class must have run, at every shape that fits; a second run joins the first."""
    peer = "FLASHMLA" if ON_GPU else "CPU_MLA"
    model = small_model(tmp_path / "model")
    options = [
        "bench",
        "--serve",
        "--model",
        str(model),
        "--out",
        str(tmp_path / "out"),
        "--commit",
        "f" * 40,
    ]
    options += ["--layers", "1", "--heads", "16", "--contexts", "70,300", "--steps", "8", "--rounds", "2"]
    options += ["--row-seconds", "60", "--no-plots"]  # a busy machine must be given its time
    assert main([*options, "--batches", "1,3", "--backends", "ours"]) == 0
    assert main([*options, "--batches", "3", "--backends", peer]) == 0
    (path,) = (tmp_path / "out").iterdir()
    made = report.read(path, head="model")
    assert made["options"] == {"rounds": 2, "steps": 8, "row_seconds": 60}
    assert [(r["b"], r["context"], r["backend"]) for r in made["rows"]] == [
        (1, 70, "ours"),
        (1, 300, "ours"),
        (3, 70, "ours"),
        (3, 70, peer),
        (3, 300, "ours"),
        (3, 300, peer),
    ]
    assert all(0 < r["ms_per_step"] < 1000 and r["steps"] == 16 for r in made["rows"])
    assert all(("gpu_ms" in r) == ON_GPU and r.get("gpu_ms", 1) > 0 for r in made["rows"])
    assert all(len(r["rounds_ms"]) == 2 and min(r["rounds_ms"]) == r["ms_per_step"] for r in made["rows"])
    for each in made["rows"]:
        assert each["class"].startswith("vllm_flashmla_backend.") == (each["backend"] == "ours")
    assert "of 2 rows" in capfd.readouterr().out
