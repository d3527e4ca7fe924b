"""The plan's promises, for any batch: `schedule.plan` is the specification of the planner kernel."""

from __future__ import annotations

from itertools import accumulate

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mla_cases import SCALE, Case, make_inputs

from vllm_flashmla_backend.flash_mla import get_mla_metadata, reference
from vllm_flashmla_backend.flash_mla.interface import num_parts, plan_into
from vllm_flashmla_backend.flash_mla.schedule import (
    METADATA_WIDTH,
    PAGE_SIZE,
    START_COST,
    Field,
    ceil_div,
    plan,
    splits_of,
)

LENGTHS = st.lists(
    st.one_of(st.integers(0, 300), st.integers(0, 20_000), st.sampled_from([0, 1, 63, 64, 65, 4_000_000])),
    min_size=1,
    max_size=70,
)
PARTS = st.integers(1, 140)


@given(LENGTHS, PARTS)
def test_every_page_is_planned_once_and_in_order(lengths, parts):
    metadata, _ = plan(lengths, parts)
    pages_of = {seq: [] for seq in range(len(lengths))}
    for split in splits_of(metadata, lengths):
        assert split.split == len(pages_of[split.seq]), "a sequence's splits are numbered in page order"
        pages_of[split.seq].append((split.page_begin, split.page_end))
    for seq, runs in pages_of.items():
        assert [begin for begin, _ in runs] == [0, *(end for _, end in runs[:-1])]
        assert runs[-1][1] == ceil_div(lengths[seq], PAGE_SIZE)
        assert len(runs) == 1 or all(begin < end for begin, end in runs), "no split without pages"


@given(LENGTHS, PARTS)
def test_no_part_has_more_than_its_fair_share(lengths, parts):
    metadata, _ = plan(lengths, parts)
    cost = [0] * parts
    for split in splits_of(metadata, lengths):
        cost[split.part] += START_COST + split.page_end - split.page_begin
    pages = sum(ceil_div(n, PAGE_SIZE) for n in lengths)
    assert max(cost) <= ceil_div(pages + START_COST * (len(lengths) + parts), parts)


@given(LENGTHS, PARTS)
def test_num_splits_counts_the_splits(lengths, parts):
    metadata, num_splits = plan(lengths, parts)
    counts = [0] * len(lengths)
    for split in splits_of(metadata, lengths):
        counts[split.seq] += 1
    assert num_splits.tolist() == [0, *accumulate(counts)]
    assert num_splits[-1] <= len(lengths) + parts, "what the partial results have room for"
    assert metadata.dtype == num_splits.dtype == torch.int32


@given(LENGTHS, PARTS)
def test_idle_parts_are_marked_and_come_last(lengths, parts):
    metadata, _ = plan(lengths, parts)
    busy = {split.part for split in splits_of(metadata, lengths)}
    assert busy == set(range(len(busy)))
    idle = [0] * METADATA_WIDTH
    idle[Field.FIRST_SEQ], idle[Field.MERGE_SEQ] = len(lengths), -1
    assert all(row == idle for row in metadata[len(busy) :].tolist())


@given(LENGTHS, PARTS)
def test_sequences_with_several_splits_are_listed_for_the_merge(lengths, parts):
    metadata, num_splits = plan(lengths, parts)
    counts = num_splits.diff().tolist()
    several = [[seq, num_splits[seq].item(), count] for seq, count in enumerate(counts) if count > 1]
    merges = metadata[:, Field.MERGE_SEQ :].tolist()
    assert merges == several + [[-1, 0, 0]] * (parts - len(several))


def test_one_long_sequence_uses_every_part():
    metadata, num_splits = plan([132 * 64 * PAGE_SIZE], 132)
    assert num_splits.tolist() == [0, 132]
    shares = [split.page_end - split.page_begin for split in splits_of(metadata, [132 * 64 * PAGE_SIZE])]
    assert shares == [64] * 132


def test_short_sequences_are_not_cut():
    _, num_splits = plan([64] * 128, 132)
    assert num_splits.tolist() == list(range(129))


def test_at_least_one_part_for_any_heads_and_query_length(monkeypatch):
    """Known failure 3: many heads times query tokens rounded the number of parts to 0."""
    monkeypatch.setattr("vllm_flashmla_backend.flash_mla.interface._num_sms", lambda device: 132)
    gpu = torch.device("cuda", 0)
    for s_q in range(1, 129):
        for h_q in range(1, 129):
            for h_kv in {1, h_q}:
                assert num_parts(gpu, s_q * h_q // h_kv, h_kv) >= 1
    assert num_parts(gpu, 128, 1) == 66, "two tiles of 64 rows share the machine"


def test_plan_into_fills_the_buffers_in_place():
    """Known failure 1: a replayed graph reads the addresses that it was captured with."""
    lengths = torch.tensor([0, 5000, 64], dtype=torch.int32)
    metadata, num_splits = torch.full((16, 8), -7, dtype=torch.int32), torch.full((4,), -7, dtype=torch.int32)
    plan_into(lengths, metadata, num_splits)
    want = plan(lengths.tolist(), 16)
    assert torch.equal(metadata, want[0])
    assert torch.equal(num_splits, want[1])


@settings(deadline=None, max_examples=20)
@given(st.lists(st.integers(0, 700), min_size=1, max_size=4), st.integers(1, 3), st.integers(2, 40))
def test_merging_any_split_equals_not_splitting(lengths, s_q, parts):
    case = Case(tuple(lengths), s_q=s_q, h_q=3, causal=True, dtype=torch.float32)
    inputs = make_inputs(case, torch.device("cpu"))
    results = []
    for count in (1, parts):
        out = torch.full((len(lengths), s_q, 3, 512), torch.nan)
        lse = torch.full((len(lengths), 3, s_q), torch.nan)
        tensors = (inputs.q_nope, inputs.q_pe, inputs.k_cache, inputs.block_table, inputs.cache_seqlens)
        reference.decode(*tensors, *plan(lengths, count), out, lse, SCALE, True)
        results.append((out, lse))
    torch.testing.assert_close(results[0], results[1], rtol=2e-5, atol=2e-6)


@pytest.mark.gpu
def test_planner_kernel_gives_the_same_bytes():
    generator = torch.Generator().manual_seed(0)

    def pick(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=generator))

    for _ in range(500):
        batch, parts, longest = pick(1, 512), pick(1, 132), 10 ** pick(1, 6)
        lengths = torch.randint(0, longest + 1, (batch,), generator=generator, dtype=torch.int32)
        metadata = torch.full((parts, 8), -7, dtype=torch.int32, device="cuda")
        num_splits = torch.full((batch + 1,), -7, dtype=torch.int32, device="cuda")
        plan_into(lengths.cuda(), metadata, num_splits)
        want = plan(lengths.tolist(), parts)
        assert torch.equal(metadata.cpu(), want[0]), (lengths.tolist(), parts)
        assert torch.equal(num_splits.cpu(), want[1]), (lengths.tolist(), parts)


def test_get_mla_metadata_has_flashmlas_shapes(device):
    lengths = torch.tensor([10, 20_000], dtype=torch.int32, device=device)
    metadata, num_splits = get_mla_metadata(lengths, 128, 1)
    assert metadata.shape == (num_parts(device, 128, 1), 8)
    assert num_splits.shape == (3,)
    assert metadata.dtype == num_splits.dtype == torch.int32
    assert metadata.device == num_splits.device == device
