"""What `vllm-flashmla bench` makes of its rows: verdicts, files, tables and pictures."""

from __future__ import annotations

import json
import re
from itertools import combinations

import pytest
import torch
from matplotlib.figure import Figure
from rich.console import Console

from vllm_flashmla_backend.bench import cases, measure, plots, report
from vllm_flashmla_backend.bench.cases import ALSO, REGIMES, TABLE, Case
from vllm_flashmla_backend.cli import main
from vllm_flashmla_backend.flash_mla.layout import FEW_ROWS, TILE_ROWS

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


@pytest.mark.parametrize(
    "case, ours_us, best_us, goal, marked",
    [
        (Case(1, 1, 8192, 16), 13.0, 26.0, "1.50 ✗", ["13.0✗"]),
        (Case(1, 1, 8192, 16), 10.0, 11.0, "1.50 ✗", []),  # for the ratio alone
        (Case(128, 1, 16384, 128, "normal"), 1000.0, 1200.0, "1.08 ✗", ["567✗"]),
        (Case(128, 1, 16384, 16, "normal"), 700.0, 710.0, "1.20 ✗", ["3357✗"]),
        (Case(128, 1, 16384, 128, "normal"), 800.0, 1000.0, "1.08 ✓", []),
    ],
)
def test_figure_that_misses_a_goal_of_its_own_is_marked(case, ours_us, best_us, goal, marked):
    console = Console(width=120)
    with console.capture() as said:
        console.print(report.summary(results(row(case, "ours", ours_us), row(case, "fa3", best_us))))
    (line,) = (line for line in said.get().splitlines() if f" {case} " in line)
    assert goal in line
    assert re.findall(r"[\d.]+✗", line) == marked


def test_wrong_result_of_ours_reaches_nothing_and_fails_the_run(tmp_path, capsys):
    case = Case(1, 1, 8192, 16)
    path = tmp_path / "wrong.json"
    report.save(results(row(case, "ours", 1.0, rel_err=0.02), row(case, "fa3", 20.0)), path)
    assert main(["bench", "--plot", str(path), "--no-plots"]) == 1
    assert "1.0 WRONG" in capsys.readouterr().out
    (comparison,) = report.compare(report.read(path))
    assert not comparison.must_reached


def test_file_that_lacks_a_key_is_named_with_it(tmp_path):
    path = tmp_path / "half.json"
    path.write_text(json.dumps({"ceilings": {}, "rows": [{}]}))
    with pytest.raises(SystemExit, match=f"{path}: 'b' is missing; expected a whole results file"):
        main(["bench", "--plot", str(path)])
    path.write_text(json.dumps({"ceilings": {}, "rows": [1]}))
    with pytest.raises(SystemExit, match=f"{path}: expected a results file"):
        main(["bench", "--plot", str(path)])


def test_picture_that_cannot_be_written_is_named(tmp_path):
    report.save(results(row(Case(1, 1, 8192, 16), "ours", 1.0)), tmp_path / "r.json")
    (tmp_path / "r-roofline.png").mkdir()
    with pytest.raises(SystemExit, match=f"{tmp_path}/r-roofline.png: the picture cannot be written"):
        main(["bench", "--plot", str(tmp_path / "r.json")])


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


def test_colours_of_many_cases_part_them_where_kernels_do():
    assert [most for _, most, _ in plots.ROWS_COLOURS] == [FEW_ROWS, TILE_ROWS, float("inf")]


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


def test_regimes_are_named_once_each_beside_their_first_case():
    bars = plots.ratio_bars(all_rows())
    named = [text for text in bars.axes[0].texts if text.get_text() in REGIMES]
    assert [text.get_text() for text in named] == list(REGIMES)
    first = [cases.ROWS["all"].index(regime.cases[0]) for regime in REGIMES.values()]
    assert [text.get_position()[1] for text in named] == first
    assert not set(REGIMES) & {text.get_text() for text in bars.legends[0].get_texts()}


@pytest.mark.parametrize("intensities", [[30.0] * 9, [30.0, 29.0, 31.0] * 3], ids=["one", "three"])
def test_numbers_of_near_points_do_not_overlap(intensities):
    figure = Figure(figsize=(13, 8), layout="constrained")
    axes = figure.subplots()
    axes.set(xscale="log", yscale="log", xlim=(10, 1000), ylim=(10, 1000))
    plots._number_points(axes, sorted((x, 100.0 + i, 10 + i, "k") for i, x in enumerate(intensities)))
    figure.canvas.draw()
    boxes = [text.get_window_extent() for text in axes.texts]
    assert len(boxes) == 9
    boxes = [box.padded(0, -box.height / 7) for box in boxes]  # a line has room for more than digits
    assert not any(one.overlaps(other) for one, other in combinations(boxes, 2))


def test_bar_past_its_goal_that_misses_it_says_what_else_is_asked_for():
    from vllm_flashmla_backend.bench import plots

    slow = row(TABLE[0], "ours", 1000.0) | {"tflops": 500.0}
    bars = plots.ratio_bars(results(slow, row(TABLE[0], "fa3", 2000.0)))
    said = [text.get_text() for text in bars.axes[0].texts]
    assert "2.000   1000.0 µs, fa3 2000.0 µs; goal 660 TFLOP/s, ours 500" in said


def test_a_part_of_the_table_is_not_held_against_the_mean_asked_of_all():
    console = Console(width=200)
    with console.capture() as said:
        console.print(report.summary(results(row(TABLE[0], "ours", 1.0), row(TABLE[0], "fa3", 2.0))))
    assert "geometric mean over 1 case: 2.000\n" in said.get()


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
