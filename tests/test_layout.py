"""How the default mode lays sequences on parts: whole, cut into a split a part, or on a line."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from mla_cases import PLAIN_ROWS
from plan_strategies import LENGTHS, ONE_TILE, PARTS, ROWS, TWO_TILES

from vllm_flashmla_backend.flash_mla.layout import (
    BUSY_PERCENT,
    CUT_COST,
    FEW_PAGES,
    FEW_ROWS,
    FEW_SEQUENCES,
    FULL_TILE,
    LONG_SPLITS,
    LONG_SPLITS_OF_TILES,
    PARTIAL_COST,
    SPLITS_A_SPARE,
    START_COST,
    TILE_ROWS,
    TWO_PAGE_SPLITS,
    WHOLE_PAGES,
    ceil_div,
    idle_before,
    is_few,
    is_full,
)
from vllm_flashmla_backend.flash_mla.schedule import PAGE_SIZE, plan, splits_of


def shares(lengths: list[int], parts: int, rows: int = TWO_TILES) -> list[list[int]]:
    """For each part, the pages of its splits."""
    found = [[] for _ in range(parts)]
    for split in splits_of(plan(lengths, parts, 0, rows)[0], lengths):
        found[split.part].append(split.page_end - split.page_begin)
    return found


def pieces(planned: tuple[torch.Tensor, torch.Tensor], lengths: list[int]) -> list[tuple[int, int, int]]:
    """Each split's sequence and pages, wherever its part lies."""
    return [(s.seq, s.page_begin, s.page_end) for s in splits_of(planned[0], lengths)]


def taken(lengths: list[int]) -> list[int]:
    """Pages of each sequence; an empty one counts as one, since its result is to be written."""
    return [max(1, ceil_div(n, PAGE_SIZE)) for n in lengths]


def num_splits(pages: int, length: int) -> int:
    """A sequence with so few pages that a partial result costs what it saves is not cut."""
    return 1 if pages <= PARTIAL_COST + 1 else ceil_div(pages, length)


def least_split_length(lengths: list[int], parts: int) -> float:
    """With splits of how many pages a split a part is enough, found by trying all; inf if never."""
    if len(lengths) > parts:
        return math.inf
    low, high = 1, max(taken(lengths))
    while low < high:
        middle = (low + high) // 2
        if sum(num_splits(n, middle) for n in taken(lengths)) <= parts:
            high = middle
        else:
            low = middle + 1
    return low


def is_cut(lengths: list[int], parts: int, rows: int = TWO_TILES) -> bool:
    return int(plan(lengths, parts, 0, rows)[1][-1]) > len(lengths)


def fair_share(lengths: list[int], parts: int) -> int:
    """Of all starts and pages."""
    return ceil_div(sum(START_COST + n for n in taken(lengths)), parts)


@given(LENGTHS, PARTS, ROWS)
def test_no_part_has_more_than_the_cheaper_layout_gives(lengths, parts, rows):
    """A split a part costs a partial result less than going on with a sequence and leaving another; whole
    sequences may cost more with one tile of rows."""
    cost = [sum(START_COST + max(1, pages) for pages in part) for part in shares(lengths, parts, rows)]
    fair, least = fair_share(lengths, parts), least_split_length(lengths, parts)
    if is_few(rows):
        least = max(least, ceil_div(sum(taken(lengths)), max(1, parts // 2)))
    if least <= fair + PARTIAL_COST:
        worst = max(least, PARTIAL_COST + 1) + START_COST
    else:
        worst = fair + 2 * PARTIAL_COST + START_COST
        if rows <= TILE_ROWS and not is_cut(lengths, parts, rows):
            divisor = 8 if len(lengths) > parts else 2 if is_few(rows) else 4
            worst = max(worst, fair + fair // divisor + CUT_COST)
    assert max(cost) <= worst


@given(LENGTHS, PARTS)
def test_a_part_has_one_split_at_most_where_that_costs_no_more(lengths, parts):
    if least_split_length(lengths, parts) <= fair_share(lengths, parts) + PARTIAL_COST:
        assert max(map(len, shares(lengths, parts))) == 1
        pages = [[] for _ in lengths]
        for split in splits_of(plan(lengths, parts, 0, TWO_TILES)[0], lengths):
            pages[split.seq].append(split.page_end - split.page_begin)
        assert all(max(of_seq) - min(of_seq) <= 1 for of_seq in pages), "cut evenly"
    elif is_cut(lengths, parts):
        assert all(shares(lengths, parts)), "no part is idle"


@given(st.integers(1, 300), st.integers(0, 40), PARTS)
def test_equal_sequences_are_not_cut_where_that_costs_no_more(batch, pages, parts):
    lengths = [pages * PAGE_SIZE] * batch
    whole, fair = ceil_div(batch, parts) * (START_COST + max(1, pages)), fair_share(lengths, parts)
    if least_split_length(lengths, parts) > fair + PARTIAL_COST and whole <= fair + CUT_COST:
        assert not is_cut(lengths, parts)
        assert max(map(len, shares(lengths, parts))) == ceil_div(batch, parts)


@pytest.mark.parametrize(
    "batch, pages, parts, rows, cut",
    [
        (40, 16, 66, 128, False),  # a share is 12, a whole sequence 19 with its start
        (44, 24, 66, 128, True),  # 18, 27
        (96, 32, 132, 64, False),  # 26, 35: with one tile it may be a quarter more
        (76, 32, 132, 64, True),  # 21, 35
        (76, 32, 132, FEW_ROWS, False),  # with few rows a half
        (70, 32, 132, FEW_ROWS, False),  # 19, 35
        (68, 48, 132, FEW_ROWS, True),  # 27, 51
        (220, 32, 132, 64, False),  # 59, 70: an eighth where parts have several
        (200, 32, 132, FEW_ROWS, True),  # 54, 70
        (220, 32, 132, 128, True),
    ],
)
def test_with_one_tile_of_rows_whole_sequences_may_cost_more(batch, pages, parts, rows, cut):
    assert is_cut([pages * PAGE_SIZE] * batch, parts, rows) == cut


@pytest.mark.parametrize(
    "batch, pages, rows",
    [
        (96, 32, ONE_TILE),  # whole at some pages more than their share
        (120, 48, ONE_TILE),  # whole by the least length of splits
        (96, 4, ONE_TILE),
        (56, 64, ONE_TILE),  # cut in two
        (96, 32, FEW_ROWS),
        (56, 64, FEW_ROWS),
    ],
)
def test_with_one_tile_the_sms_of_a_gpu_are_busy_alike(batch, pages, rows):
    """Parts 2 k and 2 k + 1 have the SMs of a TPC, with few rows parts k and k + 66. No TPC has both idle,
    and each sixth of the TPCs has as many busy ones, but for one or two."""
    busy = [bool(part) for part in shares([pages * PAGE_SIZE] * batch, 132, rows)]
    first, second = (busy[:66], busy[66:]) if is_few(rows) else (busy[::2], busy[1::2])
    counts = [sum(sms) for sms in zip(first, second, strict=True)]
    of_sixth = [sum(counts[i : i + 11]) for i in range(0, 66, 11)]
    assert min(counts) == 1 and max(of_sixth) - min(of_sixth) <= 2


@pytest.mark.parametrize("batch, pages", [(56, 48), (28, 64)])
def test_with_several_tiles_idle_parts_are_the_last(batch, pages):
    busy = [bool(part) for part in shares([pages * PAGE_SIZE] * batch, 66, TWO_TILES)]
    assert 56 == sum(busy) == sum(busy[:56])


@given(st.integers(1, 200), st.data(), st.sampled_from([FEW_ROWS, ONE_TILE, TWO_TILES]))
def test_idle_parts_lie_before_sequences_as_many_as_there_are(parts, data, rows):
    busy = data.draw(st.integers(1, parts))
    gaps = [idle_before(begin, busy, parts, rows) for begin in range(busy)]
    assert gaps[0] == 0 and gaps == sorted(gaps) and gaps[-1] <= parts - busy


@pytest.mark.parametrize("pages, least, share", [(21, 11, 10), (27, 14, 12), (37, 19, 16)])
def test_the_least_length_of_splits_is_taken_up_to_a_share_and_a_partial_result(pages, least, share):
    lengths = [pages * PAGE_SIZE] * 2
    assert (least_split_length(lengths, 5), fair_share(lengths, 5)) == (least, share)
    assert plan(lengths, 5, 0, TWO_TILES)[1].diff().tolist() == [2, 2]


@pytest.mark.parametrize(
    "pages, parts, rows, splits",
    [
        ([128] * 4, 66, 128, [16, 16, 16, 18]),
        ([128] * 8, 66, 128, [8, 8, 8, 8, 8, 8, 9, 9]),
        ([377, 78, 169, 304, 126, 247], 66, 128, [18, 4, 9, 15, 6, 14]),
        ([469], 66, 128, [66]),
        ([128] * 16, 66, 128, [4] * 16),  # too few splits each
        ([64] * 4, 66, 128, [16] * 4),  # of four pages: too short
        ([100] * 4, 66, 128, [15, 15, 18, 18]),  # of seven: with several tiles long enough
        ([90] * 4, 74, 128, [18, 18, 18, 20]),  # of five
        ([100] * 4, 66, 64, [15] * 4),
        ([128] * 4, 66, 64, [16, 16, 16, 18]),  # with one tile, of eight
        ([100] * 2, 33, FEW_ROWS, [15] * 2),
        ([96] * 7 + [1] * 26, 100, 128, [10] * 7 + [1] * 26),  # too many sequences
    ],
)
def test_parts_left_over_go_to_sequences_with_many_long_splits_from_the_last_on(pages, parts, rows, splits):
    lengths = [n * PAGE_SIZE for n in pages]
    assert plan(lengths, parts, 0, rows)[1].diff().tolist() == splits


@given(LENGTHS, PARTS)
def test_a_split_of_several_is_not_shorter_than_what_it_costs(lengths, parts):
    """Where sequences lie on a line, and shares are long enough to be moved by as much."""
    found = splits_of(plan(lengths, parts, 0, TWO_TILES)[0], lengths)
    on_a_line = max(map(len, shares(lengths, parts))) > 1
    if on_a_line and fair_share(lengths, parts) > START_COST + 2 * PARTIAL_COST + 1:
        assert all(s.splits == 1 or s.page_end - s.page_begin > PARTIAL_COST for s in found)


@example([0, 0, 0, 129, 385], 5)  # many rows: on a line, for splits of as many pages would cost more
@given(LENGTHS, PARTS)
def test_few_rows_have_splits_of_a_least_length_and_else_those_of_one_tile(lengths, parts):
    """But for what stays whole or lies on a line, and for long splits, which may get parts left over."""
    pages = sum(taken(lengths))
    least = half = ceil_div(pages, max(1, parts // 2))
    if max(taken(lengths)) > min(half, WHOLE_PAGES):
        least = min(half, FEW_PAGES if pages > FEW_PAGES // 2 * parts else FEW_PAGES // 2)
    few, of_one_tile = plan(lengths, parts, 0, FEW_ROWS), least_split_length(lengths, parts)
    if of_one_tile <= least:
        assert few[1].diff().tolist() == [num_splits(n, least) for n in taken(lengths)]
        longest = max(split.page_end - split.page_begin for split in splits_of(few[0], lengths))
        assert longest <= max(least, PARTIAL_COST + 1)
    elif of_one_tile < LONG_SPLITS and of_one_tile <= fair_share(lengths, parts) + PARTIAL_COST:
        assert pieces(few, lengths) == pieces(plan(lengths, parts, 0, ONE_TILE), lengths)


@pytest.mark.parametrize(
    "batch, pages, parts, splits",
    [
        (4, 16, 66, 8),  # not 16 of one page
        (8, 26, 264, 13),
        (2, 14, 66, 7),  # 28 parts were busy, of 66
        (1, 26, 66, 26),  # 26 of 66: too few to keep the L2 busy
        (4, 13, 66, 13),  # few enough of one page
        (2, 27, 66, 27),  # of two pages they would still be 14
        (4, 32, 66, 16),  # of two pages already
        (8, 47, 132, 16),  # of three
        (4, 64, 66, 16),  # of four
    ],
)
def test_splits_of_one_page_take_two_where_that_leaves_few_and_parts_were_busy(batch, pages, parts, splits):
    lengths = [pages * PAGE_SIZE] * batch
    assert plan(lengths, parts)[1].diff().tolist() == [splits] * batch
    as_ever = least_split_length(lengths, parts)
    assert plan(lengths, parts, 0, PLAIN_ROWS)[1].diff().tolist() == [ceil_div(pages, as_ever)] * batch


def test_one_sequence_that_would_still_have_many_splits_leaves_all_of_them_short():
    lengths = [26 * PAGE_SIZE] * 3 + [40 * PAGE_SIZE]
    assert plan(lengths, 132)[1].diff().tolist() == [26, 26, 26, 40]


def test_planner_and_kernels_agree_on_what_is_few():
    text = (Path(__file__).parents[1] / "csrc" / "params.h").read_text()
    constants = dict(re.findall(r"constexpr (?:int|unsigned) k(\w+) = (\d+);", text))
    here = {"FewRows": FEW_ROWS, "FewPages": FEW_PAGES, "WholePages": WHOLE_PAGES}
    here |= {"StartCost": START_COST, "PartialCost": PARTIAL_COST, "PageSize": PAGE_SIZE}
    here |= {"TwoPageSplits": TWO_PAGE_SPLITS, "BusyPercent": BUSY_PERCENT, "FullTile": FULL_TILE}
    here |= {"CutCost": CUT_COST, "FewSequences": FEW_SEQUENCES, "LongSplits": LONG_SPLITS}
    here |= {"SplitsASpare": SPLITS_A_SPARE, "LongSplitsOfTiles": LONG_SPLITS_OF_TILES}
    assert {name: int(constants[name]) for name in here} == here
    assert is_few(FEW_ROWS) and not is_few(FEW_ROWS + 1)
    assert [n for n in (16, 48, 49, 64, 65, 80, 96, 97, 128, 160) if is_full(n)] == [49, 64, 97, 128, 160]


@pytest.mark.parametrize(
    "lengths, splits",
    [
        ([8192], [64]),  # two pages a part, on half of them
        ([1024] * 16, [8] * 16),  # two pages a part, on all of them
        ([512] * 40, [2] * 40),  # not three, three and two
        ([768] * 32, [3] * 32),
        ([1024] * 32, [4] * 32),
        ([1024] * 64, [1] * 64),  # whole: 16 pages each
        ([1025] * 64, [2] * 64),  # 17
        ([1024] * 61, [2] * 61),  # half of the parts would have 15 pages each
        ([128] * 132, [1] * 132),
        ([640] * 26 + [256], [5] * 26 + [1]),  # 264 pages
        ([640] * 26 + [320], [3] * 26 + [2]),  # 265
        ([2048] * 64, [2] * 64),  # as with many rows
        ([8192] * 16, [8] * 16),  # as with many rows
    ],
)
def test_splits_of_few_rows(lengths, splits):
    assert plan(lengths, 132, 0, rows_per_kv_head=FEW_ROWS)[1].diff().tolist() == splits


def test_equal_sequences_are_cut_alike():
    """64 sequences of 8 pages on 132 parts: two parts each, 4 left over, rather than cuts anywhere."""
    assert shares([8 * PAGE_SIZE] * 64, 132) == [[4]] * 128 + [[]] * 4


def test_more_equal_sequences_than_parts_stay_whole():
    """256 sequences of 16 pages on 132 parts: one or two a part, where cuts would save one page of 38."""
    assert {tuple(part) for part in shares([16 * PAGE_SIZE] * 256, 132)} == {(16,), (16, 16)}


def test_a_single_short_sequence_has_a_part_for_each_page():
    assert shares([128 * PAGE_SIZE], 132) == [[1]] * 128 + [[]] * 4


def test_one_long_sequence_uses_every_part():
    metadata, num_splits = plan([132 * 64 * PAGE_SIZE], 132)
    assert num_splits.tolist() == [0, 132]
    shares = [split.page_end - split.page_begin for split in splits_of(metadata, [132 * 64 * PAGE_SIZE])]
    assert shares == [64] * 132


def test_short_sequences_are_not_cut():
    _, num_splits = plan([64] * 128, 132)
    assert num_splits.tolist() == list(range(129))
