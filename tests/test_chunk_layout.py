"""The plan of the batch-invariant mode: where it cuts, what it keeps room for, and who waits for whom."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from plan_strategies import LENGTHS, PARTS

from vllm_flashmla_backend.flash_mla.chunk_layout import _fill, chunk_cost, cost_of, fill_parts
from vllm_flashmla_backend.flash_mla.chunks import chunk_pages, most_chunks, num_chunks
from vllm_flashmla_backend.flash_mla.layout import FEW_ROWS, START_COST, TILE_ROWS, ceil_div
from vllm_flashmla_backend.flash_mla.schedule import Field, chunk_level, num_pages, plan, splits_of

LEVELS = st.sampled_from([1, 2])
# query rows, chunk_level; which level is up to the longest query that there may be
MODES = st.sampled_from([(FEW_ROWS, 1), (FEW_ROWS, 2), (TILE_ROWS, 2), (2 * TILE_ROWS, 2)])


@given(LENGTHS, PARTS, MODES)
def test_sequences_are_cut_between_chunks_alone(lengths, parts, mode):
    rows, level = mode
    next_page = [0] * len(lengths)
    for split in splits_of(plan(lengths, parts, level, rows)[0], lengths):
        assert split.page_begin == next_page[split.seq] <= split.page_end
        next_page[split.seq] = split.page_end
        if split.page_end < num_pages(lengths[split.seq]):
            assert split.page_end % chunk_pages(num_pages(lengths[split.seq]), level) == 0
    assert next_page == [num_pages(length) for length in lengths]


@given(LENGTHS, PARTS, MODES)
def test_each_cut_sequence_has_a_place_for_its_chunks(lengths, parts, mode):
    """The kernels count the places by the plan's slots: a split's part, and the cut sequences before."""
    rows, level = mode
    places = {}
    for split in splits_of(plan(lengths, parts, level, rows)[0], lengths):
        if split.splits > 1:
            places.setdefault(split.seq, set()).add(split.slot - split.part)
    assert [places[seq] for seq in sorted(places)] == [{place} for place in range(len(places))]
    assert len(places) <= min(len(lengths), parts - 1)


@example([6452, 11088, 7932, 19014], 3, (TILE_ROWS, 2))
@given(LENGTHS, PARTS, MODES)
def test_no_part_that_goes_on_with_a_sum_is_late(lengths, parts, mode):
    """A part begins with its last sequence, and ends with its first one. Where it goes on with a sum, it
    waits until the part before has that, and is done within the budget all the same."""
    rows, level = mode
    pages = [num_pages(length) for length in lengths]
    budget, _ = fill_parts(pages, parts, level)
    metadata, _ = plan(lengths, parts, level, rows)
    of_part = {}
    for split in splits_of(metadata, lengths):
        piece = max(1, split.page_end - split.page_begin)
        chunks = ceil_div(piece, chunk_pages(pages[split.seq], level))
        of_part.setdefault(split.part, []).append(START_COST + piece + chunk_cost(level) * chunks)
    for part, row in enumerate(metadata.tolist()):
        if row[Field.FIRST_SPLITS] < 0 and row[Field.FIRST_SPLIT] == 1:
            first, *others = of_part[part]
            assert max(sum(others), of_part[part - 1][-1]) + first <= budget


def test_few_rows_cut_no_sequence_that_takes_a_part_as_long_as_the_longest_chunk():
    """31 of 1,024 tokens beside one of 51,200, whose 50 chunks of 16 pages have a part each."""
    _, num_splits = plan([51200] + [1024] * 31, 132, 1, FEW_ROWS)
    assert num_splits.diff().tolist() == [50] + [1] * 31


def test_equal_sequences_of_two_parts_each_are_not_done_one_part_after_the_other():
    metadata, _ = plan([2048] * 30, 60, 2)
    assert metadata[:, Field.FIRST_SPLITS].tolist() == [2] * 60


@pytest.mark.parametrize("level", [1, 2])
def test_no_sequence_has_more_chunks_than_there_is_room_for(level):
    worst = 0
    for pages in range(5000):
        worst = max(worst, num_chunks(pages, level))
        assert most_chunks(pages, level) == worst


def test_chunks_are_few_where_merging_is_dear():
    """At 8,192 tokens: 16 chunks of 8 pages with up to 32 query rows, 8 of 16 pages with more."""
    assert [num_chunks(128, chunk_level(rows, True)) for rows in (1, 16, 32, 33, 128)] == [16, 16, 16, 8, 8]


def fitting(room: int, chunk: int) -> int:
    """`Chunks::fitting` of plan_chunks.cu: how many chunks fit, which cost more than 1 each."""
    return room * (0xFFFFFFFF // chunk + 1) >> 32


@pytest.mark.parametrize("chunk", [2, 4, 8, 16, 3, 5, 9, 17, 33])
def test_the_gpus_quotients_are_exact_up_to_the_longest_sequence(chunk):
    """That costs up to 2^25 pages and no more ends of chunks; what rounding adds is most at the greatest."""
    for multiple in range(0, 2**26, chunk * 1021):
        assert fitting(multiple, chunk) == multiple // chunk
        assert fitting(multiple + chunk - 1, chunk) == multiple // chunk
    assert (chunk * (0xFFFFFFFF // chunk + 1) - 2**32) * 2**26 < 2**32


@given(LENGTHS, LEVELS, st.integers(0, 200))
def test_the_gpus_closed_form_fills_parts_as_the_specification_does(lengths, level, slack):
    """What `Filler::take` of plan_chunks.cu computes for a sequence without a loop; its bytes need a GPU."""
    pages = [num_pages(length) for length in lengths]
    cost = [cost_of(n, level) for n in pages]
    dearest = max(min(max(1, n), chunk_pages(n, level)) for n in pages) + chunk_cost(level)
    budget = START_COST + dearest + slack
    part, room, begins = 0, budget, []
    for n, total in zip(pages, cost, strict=True):
        length = chunk_pages(n, level)
        chunk = length + chunk_cost(level)
        if START_COST + min(total, chunk) > room:
            part, room = part + 1, budget
        first, count = part, 1
        head, each = fitting(room - START_COST, chunk), fitting(budget - START_COST, chunk)
        if START_COST + total > room:
            count, room = 2, budget - START_COST - (total - head * chunk)
        else:
            room -= START_COST + total
        if START_COST + total > budget + chunk:
            between = ceil_div(max(0, -room), each * chunk)
            count, room = count + between, room + between * each * chunk
        part += count - 1
        begins.append({first + i: (head + (i - 1) * each) * length if i else 0 for i in range(count)})
    assert begins == _fill(pages, cost, budget, level)
