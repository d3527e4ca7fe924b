"""`vllm-flashmla bench --tails`: what its rows come to, and a run of whole vLLM by both ways."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from rich.console import Console
from test_bench_serve import HEAD, small_model

from vllm_flashmla_backend.bench import report, tails, tails_report
from vllm_flashmla_backend.cli import main

ON_GPU = torch.cuda.is_available()


def row(length: int, decode: float, prefill: float, h: int = 16, batch: int = 1, decodes: int = 0) -> dict:
    shape = {"h": h, "tails": batch, "decodes": decodes, "cached": 8192, "length": length}
    return shape | {tails.DECODE: decode, tails.PREFILL: prefill}


def results(*rows: dict) -> dict:
    head = {key: value for key, value in HEAD.items() if key != "model"}
    return head | {"tails_model": {"layers": 4}, "rows": list(rows), "failures": []}


def test_default_rows_are_those_of_the_issue():
    assert tails.LENGTHS == (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
    job = tails.TailsJob("", 1, 16, tails.CACHED, tails.LENGTHS, 1)
    assert {row[:2] for row in job.rows} == {(1, 0), (16, 0), (1, 15)}
    assert (1, 0, 1) in job.rows
    assert (1, 15, 1) not in job.rows  # such a tail is a decode, however it is sent


@pytest.mark.parametrize(
    "decode, longest", [([5, 6, 10], 4), ([5, 8, 6], 1), ([9, 5, 5], 0), ([7, 7, 11], 2)]
)
def test_decode_is_worth_it_up_to_the_first_length_at_which_it_is_slower(decode, longest):
    made = results(*(row(*each) for each in zip((1, 2, 4), decode, (7, 7, 10), strict=True)))
    (column,) = tails_report.columns(made)
    assert tails_report.worth_decoding(tails_report.by_length(made, column)) == longest


def test_a_file_is_shown_and_its_table_printed_for_the_docs(tmp_path, capsys):
    path = tmp_path / "r.json"
    made = results(row(1, 20, 100), row(2, 30, 25), row(2, 7, 1234, h=128, decodes=15))
    report.save(made, path)
    assert main(["bench", "--tails", "--plot", str(path)]) == 0
    assert "16 heads, 1 tail: decode is not slower up to a tail of 1" in capsys.readouterr().out
    assert main(["bench", "--tails", "--plot", str(path), "--markdown"]) == 0
    assert capsys.readouterr().out.splitlines()[2:] == [
        "| tail | 16 heads, 1 tail | 128 heads, 1 tail beside 15 decodes |",
        "|---:|---:|---:|",
        "| 1 | 20 / 100 | – |",
        "| 2 | 30 / 25 | 7 / 1,234 |",
        "| decode is worth it up to | 1 | 2 |",
    ]
    assert list(tmp_path.iterdir()) == [path]


def test_table_in_the_docs_is_that_of_its_file():
    root = Path(__file__).parents[1]
    made = report.read(root / "benchmarks/results/nvidia-h200-2026-11-26-tails.json", head="tails_model")
    assert tails_report.markdown(made).partition("\n\n")[2] in (root / "docs/settings.md").read_text()


@pytest.mark.parametrize("width", [160, 120, 80])
def test_narrow_terminal_shows_every_pair_of_times_on_one_line(width):
    shapes = [dict(h=h, batch=b, decodes=d) for h in (16, 128) for b, d in tails.SHAPES]
    made = results(*(row(512, 10_240 + i, 20_480, **shape) for i, shape in enumerate(shapes)))
    console = Console(width=width)
    with console.capture() as said:
        console.print(tails_report.summary(made))
    assert [i for i in range(len(shapes)) if f"{10_240 + i:,} / 20,480" in said.get()] == list(range(6))
    assert "…" not in said.get()


@pytest.mark.parametrize(
    "options, message",
    [
        (["--cached", "100"], "--cached is 100, expected whole pages"),
        (["--repeat", "0"], "--repeat is 0"),
        (["--heads", "16,129"], "--heads: got 129 query heads, expected 1 to 128"),
        (["--model", "/nowhere"], "--model is /nowhere"),
    ],
)
def test_wrong_options_are_named(options, message):
    with pytest.raises(SystemExit, match=re.escape(message)):
        main(["bench", "--tails", *options])


@pytest.mark.slow
@(pytest.mark.gpu if ON_GPU else lambda test: test)
def test_vllm_sends_the_same_tails_both_ways(tmp_path):
    """The process fails unless just the tails were decoded, or prefilled, in every step that was timed."""
    pytest.importorskip("vllm")
    model = small_model(tmp_path / "model")
    options = ["bench", "--tails", "--model", str(model), "--out", str(tmp_path / "out"), "--repeat", "2"]
    assert main([*options, "--layers", "2", "--heads", "16", "--cached", "128", "--lengths", "1,8"]) == 0
    (path,) = (tmp_path / "out").glob("*.json")
    made = report.read(path, head="tails_model")
    assert made["options"] == {"repeat": 2}
    measured = [(r["tails"], r["decodes"], r["length"]) for r in made["rows"]]
    assert measured == [(1, 0, 1), (1, 0, 8), (16, 0, 1), (16, 0, 8), (1, 15, 8)]
    assert all(r[way] > 0 for r in made["rows"] for way in (tails.DECODE, tails.PREFILL))
