"""The plan's promises, for any batch: `schedule.plan` is the specification of the planner kernel."""

from __future__ import annotations

from itertools import accumulate, pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mla_cases import SCALE, Case, make_inputs
from plan_strategies import LENGTHS, PARTS, ROWS, TWO_TILES

from vllm_flashmla_backend.flash_mla import get_mla_metadata, reference
from vllm_flashmla_backend.flash_mla.checks import check_values
from vllm_flashmla_backend.flash_mla.layout import FEW_ROWS, TILE_ROWS, ceil_div, first_of_last_half
from vllm_flashmla_backend.flash_mla.planning import num_parts, plan_into
from vllm_flashmla_backend.flash_mla.schedule import (
    METADATA_WIDTH,
    PAGE_SIZE,
    Field,
    partial_slots,
    plan,
    splits_of,
)


@given(LENGTHS, PARTS, ROWS)
def test_every_page_is_planned_once_and_in_order(lengths, parts, rows):
    metadata, _ = plan(lengths, parts, 0, rows)
    pages_of = {seq: [] for seq in range(len(lengths))}
    for split in splits_of(metadata, lengths):
        assert split.split == len(pages_of[split.seq]), "a sequence's splits are numbered in page order"
        pages_of[split.seq].append((split.page_begin, split.page_end))
    for seq, runs in pages_of.items():
        assert [begin for begin, _ in runs] == [0, *(end for _, end in runs[:-1])]
        assert runs[-1][1] == ceil_div(lengths[seq], PAGE_SIZE)
        assert len(runs) == 1 or all(begin < end for begin, end in runs), "no split without pages"


@given(LENGTHS, PARTS, ROWS)
def test_num_splits_counts_the_splits(lengths, parts, rows):
    metadata, num_splits = plan(lengths, parts, 0, rows)
    counts = [0] * len(lengths)
    for split in splits_of(metadata, lengths):
        counts[split.seq] += 1
    assert num_splits.tolist() == [0, *accumulate(counts)]
    assert all(counts[split.seq] == split.splits for split in splits_of(metadata, lengths))
    assert metadata.dtype == num_splits.dtype == torch.int32


@given(LENGTHS, PARTS, ROWS)
def test_idle_parts_are_marked_and_come_last_where_tiles_are_several_and_sequences_cut(lengths, parts, rows):
    metadata, num_splits = plan(lengths, parts, 0, rows)
    busy = {split.part for split in splits_of(metadata, lengths)}
    if num_splits[-1] > len(lengths) and rows > TILE_ROWS:
        assert busy == set(range(len(busy)))
    idle = [0] * METADATA_WIDTH
    idle[Field.FIRST_SEQ] = len(lengths)
    assert all((row == idle) == (part not in busy) for part, row in enumerate(metadata.tolist()))


@given(LENGTHS, PARTS, st.sampled_from([0, 1, 2]))
def test_few_rows_with_the_last_halfs_first_part_idle_have_all_of_it_idle(lengths, parts, chunk_level):
    """loader.cuh's half_is_idle looks at the first part of the last half alone, up to a sequence a part."""
    lengths = lengths[:parts]
    metadata, _ = plan(lengths, parts, chunk_level, FEW_ROWS)
    idle = (metadata[first_of_last_half(parts) :, Field.FIRST_SEQ] >= len(lengths)).tolist()
    assert all(idle) or not idle[0]


@given(LENGTHS, PARTS, ROWS)
def test_every_partial_result_has_a_slot_of_its_own(lengths, parts, rows):
    metadata, _ = plan(lengths, parts, 0, rows)
    partial = [split for split in splits_of(metadata, lengths) if split.splits > 1]
    assert len({split.slot for split in partial}) == len(partial)
    assert all(0 <= split.slot < partial_slots(len(lengths), parts, 0, 0) for split in partial)
    for one, next_one in pairwise(partial):
        assert one.seq != next_one.seq or one.slot + 1 == next_one.slot, "consecutive along a sequence"


def test_a_single_part_needs_no_room_for_partial_results():
    assert partial_slots(300, 1, 50, 0) == 0


def test_a_negative_length_counts_as_zero():
    """Lengths of a padded row may hold anything; the GPU's planner does not look at them first."""
    for got, want in zip(plan([-1, 700, -(2**31)], 7), plan([0, 700, 0], 7), strict=True):
        assert torch.equal(got, want)


def test_at_least_one_part_for_any_heads_and_query_length(monkeypatch):
    """Known failure 3: many heads times query tokens rounded the number of parts to 0."""
    monkeypatch.setattr("vllm_flashmla_backend.flash_mla.planning._num_sms", lambda device: 132)
    gpu = torch.device("cuda", 0)
    for s_q in range(1, 129):
        for h_q in range(1, 129):
            for h_kv in {1, h_q}:
                assert num_parts(gpu, s_q, h_q, h_kv) >= 1
    assert num_parts(gpu, 1, 128, 1) == 66, "two tiles of 64 rows share the machine"


def test_plan_into_fills_the_buffers_in_place():
    """Known failure 1: a replayed graph reads the addresses that it was captured with."""
    lengths = torch.tensor([0, 5000, 64], dtype=torch.int32)
    metadata, num_splits = torch.full((16, 8), -7, dtype=torch.int32), torch.full((4,), -7, dtype=torch.int32)
    plan_into(lengths, metadata, num_splits, rows_per_kv_head=16)
    want = plan(lengths.tolist(), 16, rows_per_kv_head=FEW_ROWS)
    assert torch.equal(metadata, want[0])
    assert torch.equal(num_splits, want[1])


@settings(deadline=None, max_examples=20)
@given(
    st.lists(st.integers(0, 700), min_size=1, max_size=4),
    st.integers(1, 3),
    st.integers(2, 40),
    ROWS,
)
def test_merging_any_split_equals_not_splitting(lengths, s_q, parts, rows):
    case = Case(tuple(lengths), s_q=s_q, h_q=3, causal=True, dtype=torch.float32)
    inputs = make_inputs(case, torch.device("cpu"))
    results = []
    for count in (1, parts):
        out = torch.full((len(lengths), s_q, 3, 512), torch.nan)
        lse = torch.full((len(lengths), 3, s_q), torch.nan)
        reference.decode(
            **vars(inputs),
            cu_seqlens_q=None,
            max_query_len=s_q,
            tile_scheduler_metadata=plan(lengths, count, 0, rows)[0],
            out=out,
            lse=lse,
            softmax_scale=SCALE,
            causal=True,
        )
        results.append((out, lse))
    torch.testing.assert_close(results[0], results[1], rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("column", Field)
def test_a_plan_with_a_wrong_word_is_refused_on_the_cpu(column):
    case = Case((5000, 40, 3000))
    inputs = make_inputs(case, torch.device("cpu"))
    tensors = (inputs.k_cache, inputs.block_table, inputs.cache_seqlens)
    metadata, num_splits = plan(list(case.lengths), 2, 0, TWO_TILES)
    check_values(*tensors, metadata, num_splits)
    metadata[1, column] += 1  # the part that ends the first sequence and does the others
    with pytest.raises(ValueError, match="tile_scheduler_metadata, num_splits: got a plan for other lengths"):
        check_values(*tensors, metadata, num_splits)


def test_get_mla_metadata_has_flashmlas_shapes(device):
    lengths = torch.tensor([10, 20_000], dtype=torch.int32, device=device)
    metadata, num_splits = get_mla_metadata(lengths, 128, 1)
    assert metadata.shape == (num_parts(device, 1, 128, 1), 8)
    assert num_splits.shape == (3,)
    assert metadata.dtype == num_splits.dtype == torch.int32
    assert metadata.device == num_splits.device == device
