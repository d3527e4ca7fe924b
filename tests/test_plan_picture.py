"""`vllm-flashmla plan`: what is drawn is what the plan says, no page more and none less."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from vllm_flashmla_backend.cli import main, plan
from vllm_flashmla_backend.flash_mla import schedule
from vllm_flashmla_backend.flash_mla.chunks import chunk_pages

LENGTHS = [100, 2000, 0, 30_000, 64, 5_000]
PARTS = 12


@pytest.fixture
def work():
    metadata, _ = schedule.plan(LENGTHS, PARTS)
    return plan.by_part(schedule.splits_of(metadata, LENGTHS), PARTS)


def expected() -> list[tuple[int, str]]:
    """Part and piece of every split, in words of this test's own."""
    metadata, _ = schedule.plan(LENGTHS, PARTS)
    return [(s.part, f"{s.seq}[{s.page_begin}:{s.page_end})") for s in schedule.splits_of(metadata, LENGTHS)]


def test_terminal_names_every_split_of_every_part(work):
    found = []
    for line in plan.lines(work):
        part = int(re.match(r"part +(\d+)", line.plain).group(1))
        found += [(part, piece) for piece in re.findall(r"\d+\[\d+:\d+\)", line.plain)]
    assert found == expected()


def test_terminal_bars_are_as_long_as_the_parts_work(work):
    longest = max(map(plan.num_pages, work))
    for line, splits in zip(plan.lines(work), work, strict=True):
        drawn = sum(line.plain.count(shade) for shade in plan.SHADES)
        assert drawn == round(plan.num_pages(splits) / longest * plan.WIDEST)


@pytest.mark.parametrize("columns", [200, 80, 64])
def test_terminal_lines_are_as_wide_as_it_where_there_is_room(work, columns):
    width = plan.bar_width(work, columns)
    assert plan.NARROWEST <= width <= plan.WIDEST
    widest = max(len(line.plain) for line in plan.lines(work, width))
    assert widest <= columns or width == plan.NARROWEST


def test_number_of_parts_is_explained_where_it_is_not_given(capsys):
    assert main(["plan", "--lens", "100", "--heads", "16"]) == 0
    said = "as many as 132 SMs run at once, with"
    assert f"132 parts: {said} 1 tile of query rows each\n" in capsys.readouterr().out
    assert main(["plan", "--lens", "100", "--query-len", "2"]) == 0
    assert f"33 parts: {said} 4 tiles of query rows each\n" in capsys.readouterr().out
    assert main(["plan", "--lens", "100", "--parts", "2"]) == 0
    assert "SMs" not in capsys.readouterr().out


def test_a_run_of_idle_parts_is_one_line():
    metadata, _ = schedule.plan([128], 8)
    work = plan.by_part(schedule.splits_of(metadata, [128]), 8)
    busy = sum(map(bool, work))
    assert busy < 7
    found = [line.plain for line in plan.lines([[], *work, [], work[0], []])]
    idle = [line for line in found if "idle" in line]
    assert idle == ["part   0 idle", f"parts {busy + 1} to 9 idle", "part  11 idle"]
    assert len(found) == busy + 1 + len(idle)


def test_one_of_a_thing_is_singular():
    metadata, _ = schedule.plan([10], 1)
    work = plan.by_part(schedule.splits_of(metadata, [10]), 1)
    assert plan.summary(work, [10]).startswith("1 sequence, 1 page; 1 of 1 part busy, 1 page at most")


def test_png_has_a_piece_for_every_split(work):
    figure = plan.draw(work, LENGTHS)
    pieces = [(round(bar.get_y() + bar.get_height() / 2), bar.get_width()) for bar in figure.axes[0].patches]
    metadata, _ = schedule.plan(LENGTHS, PARTS)
    splits = schedule.splits_of(metadata, LENGTHS)
    assert pieces == [(split.part, split.page_end - split.page_begin) for split in splits]
    assert sum(width for _, width in pieces) == sum(-(-n // 64) for n in LENGTHS)


def test_png_leaves_out_the_idle_parts_at_the_end():
    metadata, _ = schedule.plan([100], 66)
    work = plan.by_part(schedule.splits_of(metadata, [100]), 66)
    (axes,) = plan.draw(work, [100]).axes
    assert axes.get_ylabel() == "part, 65 idle ones behind these"
    assert max(axes.get_ylim()) < 8


def test_command_draws_in_the_terminal_and_as_png(tmp_path, capsys):
    lens = ",".join(map(str, LENGTHS))
    assert main(["plan", "--lens", lens, "--parts", str(PARTS)]) == 0
    said = capsys.readouterr().out
    assert all(piece in said for _, piece in expected())
    assert "sequence[first:end) is that sequence's pages" in said
    assert f"6 sequences, {sum(-(-n // 64) for n in LENGTHS)} pages" in said
    png = tmp_path / "plan.png"
    assert main(["plan", "--lens", lens, "--parts", str(PARTS), "--out", str(png)]) == 0
    assert png.read_bytes().startswith(b"\x89PNG")


def test_as_many_parts_as_are_allowed_are_planned(capsys):
    assert main(["plan", "--lens", "100,30000", "--parts", f"{plan.MOST_PARTS}"]) == 0
    assert "of 65,536 parts busy" in capsys.readouterr().out


def test_parts_follow_the_heads(monkeypatch, capsys):
    """128 heads are two tiles of 64 rows: half as many parts as SMs."""
    monkeypatch.setattr(plan, "num_sms", lambda: 132)
    for heads, parts in (("16", 132), ("128", 66)):
        assert main(["plan", "--lens", "50000", "--heads", heads]) == 0
        assert f"of {parts} parts busy" in capsys.readouterr().out


@pytest.mark.parametrize("heads, busy", [(16, 64), (32, 64), (33, 128)])
def test_few_heads_leave_half_of_the_parts_idle_where_pages_are_few(heads, busy, capsys):
    assert main(["plan", "--lens", "8192", "--heads", str(heads), "--parts", "132"]) == 0
    assert f"{busy} of 132 parts busy" in capsys.readouterr().out


def test_idle_parts_are_as_the_docs_have_them(monkeypatch, capsys):
    monkeypatch.setattr(plan, "num_sms", lambda: 132)
    page = (Path(__file__).parents[1] / "docs" / "pages-and-plan.md").read_text()
    examples = re.findall(r"^\| `(--lens .*?)` \| (\d+) of (\d+) \| (\d+) \|", page, re.MULTILINE)
    assert len(examples) == 5
    for options, busy, parts, pages in examples:
        assert main(["plan", *options.split()]) == 0
        said = capsys.readouterr().out
        assert re.search(f"; {busy} of {parts} parts busy, {pages} pages? at most", said), options


def test_splits_of_two_pages_are_as_the_docs_have_them(monkeypatch, capsys):
    monkeypatch.setattr(plan, "num_sms", lambda: 132)
    page = (Path(__file__).parents[1] / "docs" / "pages-and-plan.md").read_text()
    ((options, splits, pages),) = re.findall(r"`(--lens .*?)` makes (\d+) splits of (\d+) pages", page)
    assert main(["plan", *options.split()]) == 0
    assert re.search(f", {pages} pages at most, .*; {splits} splits;", capsys.readouterr().out)


@pytest.mark.parametrize(
    "heads, query_len, level, chunks",
    [
        (16, 1, 1, "11 chunks of 4 to 16 pages"),
        (16, 3, 2, "6 chunks of 8 to 32 pages"),
        (128, 1, 2, "6 chunks of 8 to 32 pages"),
    ],
)
def test_batch_invariant_plan_cuts_between_chunks_of_the_rows_level(heads, query_len, level, chunks, capsys):
    options = ["--lens", "9000,300", "--parts", "8", "--heads", str(heads), "--query-len", str(query_len)]
    assert main(["plan", *options, "--batch-invariant"]) == 0
    said = capsys.readouterr().out
    metadata, _ = schedule.plan([9000, 300], 8, level)
    work = plan.by_part(schedule.splits_of(metadata, [9000, 300]), 8)
    pieces = [plan.name(split) for splits in work for split in splits[::-1]]  # the last sequence first
    assert re.findall(r"\d+\[\d+:\d+\)", said) == pieces
    cuts = [int(page) for page in re.findall(r"0\[(\d+):", said)]
    assert chunks in said
    chunk = chunk_pages(-(-9000 // 64), level)
    assert len(cuts) > 1 and all(page % chunk == 0 for page in cuts)
    assert main(["plan", *options]) == 0
    said = capsys.readouterr().out
    assert re.findall(r"\d+\[\d+:\d+\)", said) != pieces and "chunk" not in said


@pytest.mark.parametrize(
    "options, message",
    [
        (["--lens", "5,x"], "--lens is '5,x'"),
        (["--lens", ","], "--lens is ','"),
        (["--lens", "1,,2"], "--lens is '1,,2', expected lengths of 0 to 2,147,483,647 with commas between"),
        (["--lens", "2147483648"], "--lens is '2147483648'"),
        (["--lens", "9" * 5000], "--lens is '9999"),
        (["--lens", "5", "--out", "/nowhere/x.png"], "--out is /nowhere/x.png: No such file or directory"),
        (["--lens", "5", "--out", "/tmp"], "--out is /tmp, expected a name that ends in .png"),
        (["--lens", "5", "--out", "/tmp/x.foo"], "--out is /tmp/x.foo: Format 'foo' is not supported"),
        (["--lens", "5", "--heads", "0"], "--heads: got 0 query heads, expected 1 to 128"),
        (["--lens", "5", "--heads", "129"], "--heads: got 129 query heads, expected 1 to 128"),
        (["--lens", "5", "--query-len", "0"], "--query-len is 0, expected 1 to 128"),
        (["--lens", "5", "--query-len", "129"], "--query-len is 129, expected 1 to 128"),
        (["--lens", "5", "--parts", "-1"], "--parts is -1, expected 1 to 65,536"),
        (["--lens", "5", "--parts", "0"], "--parts is 0, expected 1 to 65,536"),
        (["--lens", "5", "--parts", "65537"], "--parts is 65537, expected 1 to 65,536"),
        (["--lens", "5", "--parts", "2049", "--out", "x.png"], "expected 1 to 2,048 with --out"),
        (["--lens", "5", "--parts", "100000000000"], "--parts is 100000000000, expected 1 to 65,536"),
    ],
)
def test_wrong_options_are_named(options, message):
    with pytest.raises(SystemExit, match=re.escape(message)):
        main(["plan", *options])


def test_unknown_option_is_refused_with_the_commands_own_usage(capsys):
    with pytest.raises(SystemExit):
        main(["plan", "--lens", "1", "--plot"])
    said = capsys.readouterr().err
    assert "usage: vllm-flashmla plan" in said and "unrecognized arguments: --plot" in said
