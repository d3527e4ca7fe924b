"""The batch-invariant mode: the same bits for a sequence, whatever else is in the batch.

Sequences of thousands of tokens, for short ones are never split and prove nothing.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
import torch
from mla_cases import (
    SCALE,
    Case,
    Inputs,
    add_growing_scores,
    assert_agree,
    captured,
    expected,
    make_inputs,
    plan_for,
    run,
    run_ragged,
)

from vllm_flashmla_backend.flash_mla import (
    MLAPlan,
    flash_mla_decode,
    flash_mla_with_kvcache,
    get_mla_metadata,
)
from vllm_flashmla_backend.flash_mla.checks import HEAD_DIM_V
from vllm_flashmla_backend.flash_mla.chunks import chunk_pages, num_chunks
from vllm_flashmla_backend.flash_mla.layout import ceil_div
from vllm_flashmla_backend.flash_mla.planning import plan_into
from vllm_flashmla_backend.flash_mla.providers import CHOICE_VARIABLE, ReferenceProvider
from vllm_flashmla_backend.flash_mla.schedule import (
    PAGE_SIZE,
    Field,
    chunk_level,
    num_pages,
    num_parts,
    plan,
    splits_of,
)

# More sequences than parts, of several chunks each.
MANY = [Case((1100, 300, 700) * 150, h_q=16), Case((300, 1100, 700) * 100, h_q=80)]
MIXED = (2500, 0, 4100, 1, 64, 9000, 65, 1000, 257)
CASES = [
    Case(MIXED, h_q=16),
    Case(MIXED, h_q=128),
    Case(MIXED, s_q=2, h_q=20, causal=True),
    Case(MIXED, h_q=12, h_kv=3, causal=True, strided=True),
    Case((3000,) * 40, h_q=8, dtype=torch.float16),
    Case((20_000, 300), h_q=64),
    # of the last chunk the first query token sees nothing
    *(Case((513, 1025, 8193) * 3, s_q=2, h_q=h_q, causal=True) for h_q in (16, 40)),
    Case((513, 1025, 8193), s_q=4, h_q=40, causal=True),
    Case((700, 3000), s_q=8, h_q=128, causal=True),  # 16 tiles: few parts
    *MANY,
]


def one_of(inputs: Inputs, seqs: list[int]) -> Inputs:
    """These sequences of a batch, in this order, as a batch of their own."""
    of_batch = ("q_nope", "q_pe", "block_table", "cache_seqlens")
    return replace(inputs, **{name: getattr(inputs, name)[seqs].contiguous() for name in of_batch})


@pytest.mark.parametrize("case", CASES, ids=str)
def test_decode_agrees_with_the_naive_attention(case, device):
    inputs = make_inputs(case, device)
    assert_agree(run(case, inputs, batch_invariant=True), expected(case, inputs))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_sequence_alone_has_the_bits_that_it_has_in_a_batch(case, device):
    inputs = make_inputs(replace(case, strided=False), device)
    together = run(case, inputs, batch_invariant=True)
    order = list(reversed(range(len(case.lengths))))
    for seqs in (order, *([seq] for seq in order[:9])):
        alone = run(replace(case, lengths=tuple(case.lengths[i] for i in seqs)), one_of(inputs, seqs), True)
        assert torch.equal(alone[0], together[0][seqs])
        assert torch.equal(alone[1], together[1][seqs])


@pytest.mark.parametrize("case", MANY, ids=str)
def test_a_chunk_may_outweigh_all_before_it(case, device):
    """Where weights grow from page to page, what is summed up is rescaled, whoever has the chunks before."""
    inputs = make_inputs(case, device)
    for seq, length in enumerate(case.lengths):
        pages = inputs.block_table[seq, : num_pages(length)].long()  # (pages of the sequence,)
        growth = torch.arange(1, len(pages) + 1, device=device)[:, None, None, None] ** 2
        inputs.k_cache[pages, ..., HEAD_DIM_V:] *= growth.to(inputs.k_cache.dtype)  # not the values
    together = run(case, inputs, batch_invariant=True)
    assert_agree(together, expected(case, inputs))
    longest = max(range(9), key=lambda seq: case.lengths[seq])
    chunk = PAGE_SIZE * chunk_pages(num_pages(case.lengths[longest]), chunk_level(case.h_q, True))
    first_chunk = replace(one_of(inputs, [longest]), cache_seqlens=inputs.cache_seqlens.new_tensor([chunk]))
    before = run(replace(case, lengths=(chunk,)), first_chunk, True)[1]  # (1, h_q, 1)
    assert (together[1][longest] - before[0]).max() > 8  # 2^kSlack is e^5.5
    for seq in range(9):
        alone = run(replace(case, lengths=case.lengths[seq : seq + 1]), one_of(inputs, [seq]), True)
        assert torch.equal(alone[0][0], together[0][seq])
        assert torch.equal(alone[1][0], together[1][seq])


@pytest.mark.parametrize("growth", [0, 20])
@pytest.mark.parametrize("h_q", [16, 20, 128])
def test_few_parts_give_the_bits_of_all_parts(h_q, growth, device):
    """Whether a part has all of a sequence's chunks or others have some, one or several, and whether what was
    summed up has to be rescaled."""
    case = Case((2500, 600, 0, 9000, 300, 1300, 130), h_q=h_q)
    inputs = make_inputs(case, device)
    add_growing_scores(inputs, growth)
    of_all = run(case, inputs, batch_invariant=True)
    for parts in (1, 3):
        few = run(case, inputs, batch_invariant=True, parts=parts)
        assert torch.equal(few[0], of_all[0])
        assert torch.equal(few[1], of_all[1])


# Two of them are cut on three parts, and the next part goes on with their sums.
FIVE = (4100, 3900, 3000, 4200, 3500)
HANDED_OVER = [
    *(Case(FIVE, h_q=h_q) for h_q in (16, 20, 40, 128)),
    Case(FIVE, s_q=2, h_q=12, h_kv=3, causal=True),
    Case(FIVE, s_q=3, h_q=30, causal=True, dtype=torch.float16),
]


@pytest.mark.parametrize("growth", [0, 20])
@pytest.mark.parametrize("case", HANDED_OVER, ids=str)
def test_a_part_that_goes_on_with_a_sum_gives_the_bits_of_one_that_has_all(case, growth, device):
    """Whether or not what was summed up before has to be rescaled."""
    level = chunk_level(case.s_q * case.h_q // case.h_kv, True)
    assert plan(case.lengths, 3, level)[0][:, Field.FIRST_SPLITS].tolist() == [1, -2, -2]
    inputs = make_inputs(case, device)
    add_growing_scores(inputs, growth)
    of_one = run(case, inputs, batch_invariant=True, parts=1)
    of_three = run(case, inputs, batch_invariant=True, parts=3)
    assert torch.equal(of_three[0], of_one[0])
    assert torch.equal(of_three[1], of_one[1])


def test_the_default_mode_does_not_have_the_same_bits(device):
    """What the test above would miss if the mode made no difference.

    Weights are rounded relative to a split's own maximum, so other cuts show in the output; the float32 sum
    of all weights may come out the same.
    """
    case = Case((4100,) * 12, h_q=16)
    inputs = make_inputs(case, device)
    alone = run(replace(case, lengths=case.lengths[:1]), one_of(inputs, [0]))
    assert not torch.equal(alone[0][0], run(case, inputs)[0][0])


@pytest.mark.parametrize("case", MANY, ids=str)
def test_parts_of_an_h100_have_several_whole_sequences_of_several_chunks(case):
    """What MANY is for: a part keeps the chunks of such sequences in one place, one after the other."""
    level, parts = chunk_level(case.h_q, True), num_parts(132, ceil_div(case.h_q, 64))
    here = Counter(
        split.part
        for split in splits_of(plan(case.lengths, parts, level)[0], case.lengths)
        if split.splits == 1 and num_chunks(num_pages(case.lengths[split.seq]), level) > 1
    )
    assert max(here.values()) > 1


@pytest.mark.parametrize("lengths", [(2500, 4100, 64), (2500, 4100, 64) * 60], ids=["few", "many"])
@pytest.mark.parametrize("h_q", [5, 16])
def test_queries_of_different_lengths_have_the_bits_that_they_have_alone(h_q, lengths, device):
    case = Case(lengths, s_q=4, h_q=h_q, causal=True)
    inputs = make_inputs(case, device)
    query_lens = (3, 1, 4) * (len(lengths) // 3)
    together = run_ragged(case, inputs, query_lens, batch_invariant=True)
    for seq, query_len in enumerate(query_lens[:3]):
        one = replace(case, lengths=case.lengths[seq : seq + 1])  # of the same longest query
        alone = run_ragged(one, one_of(inputs, [seq]), (query_len,), batch_invariant=True)[0]
        assert torch.equal(alone[0], together[seq][0])
        assert torch.equal(alone[1], together[seq][1])


@pytest.mark.parametrize("h_q", [5, 16])
def test_a_ragged_call_gives_the_bits_of_a_uniform_one(h_q, device):
    """Of the same longest query: with drafts a step may be either."""
    case = Case((2500, 4100, 700), s_q=3, h_q=h_q, causal=True)
    inputs = make_inputs(case, device)
    uniform = run(case, inputs, batch_invariant=True)
    for query_lens in ((3, 1, 0), (3, 3, 3)):
        ragged = run_ragged(case, inputs, query_lens, batch_invariant=True)[0]
        assert torch.equal(ragged[0][0], uniform[0][0])
        assert torch.equal(ragged[1][0], uniform[1][0])


def captured_decode(
    case: Case, inputs: Inputs
) -> tuple[torch.cuda.CUDAGraph, tuple[torch.Tensor, torch.Tensor], torch.Tensor]:
    """A graph that plans for the lengths that it finds and decodes; its plan and its output, which are to be
    kept as long as it is."""
    tensors = (inputs.q_nope, inputs.q_pe, inputs.k_cache, inputs.block_table, inputs.cache_seqlens)
    metadata, num_splits = plan_for(case, inputs, True)
    out = torch.empty_like(inputs.q_nope)

    def step() -> None:
        plan_into(inputs.cache_seqlens, metadata, num_splits, case.h_q, chunk_level(case.h_q, True))
        flash_mla_decode(*tensors, metadata, num_splits, SCALE, False, out, batch_invariant=True)

    return captured(step), (metadata, num_splits), out


@pytest.mark.gpu
def test_replayed_graph_gives_the_bits_of_a_sequence_alone():
    gpu = torch.device("cuda", 0)
    case = Case((9000,) * 6, h_q=16)
    inputs = make_inputs(case, gpu)
    graph, _plan, out = captured_decode(case, inputs)
    lengths = (9000, 0, 77, 4097, 8192, 2048)
    inputs.cache_seqlens.copy_(torch.tensor(lengths))
    graph.replay()
    for seq, length in enumerate(lengths):
        alone = run(replace(case, lengths=(length,)), one_of(inputs, [seq]), True)
        assert torch.equal(alone[0][0], out[seq])


@pytest.mark.gpu
@pytest.mark.parametrize("h_q", [16, 60])
def test_a_replayed_graph_hands_the_sums_of_each_replay_over(h_q):
    case = Case((2500,) * 300, h_q=h_q)
    inputs = make_inputs(case, torch.device("cuda", 0))
    graph, (metadata, _num_splits), out = captured_decode(case, inputs)
    for lengths in ((2500, 900, 64) * 100, (64, 900, 2500) * 100, (2500, 900, 64) * 100):
        inputs.cache_seqlens.copy_(torch.tensor(lengths))
        graph.replay()
        assert (metadata[:, Field.FIRST_SPLITS] == -2).sum() > 50
        of_one = run(replace(case, lengths=lengths), inputs, batch_invariant=True, parts=1)
        assert torch.equal(out, of_one[0])


@pytest.mark.gpu
def test_a_ragged_call_hands_the_sums_of_tiles_with_rows_over():
    """The second of two tiles has no row of most sequences, and neither of its parts counts for these."""
    case = Case((300, 1100, 700) * 100, s_q=2, h_q=64, causal=True)
    inputs = make_inputs(case, torch.device("cuda", 0))
    assert (plan_for(case, inputs, True)[0][:, Field.FIRST_SPLITS] == -2).sum() > 20
    query_lens = (2, 1, 0) * 50 + (1, 0, 2) * 50
    first, again = (run_ragged(case, inputs, query_lens, batch_invariant=True) for _ in range(2))
    for seq in (0, 1, 150, 152, 297, 299):  # with a query
        one = replace(case, lengths=case.lengths[seq : seq + 1])
        alone = run_ragged(one, one_of(inputs, [seq]), query_lens[seq : seq + 1], batch_invariant=True)[0]
        for together in (first, again):
            assert torch.equal(alone[0], together[seq][0])
            assert torch.equal(alone[1], together[seq][1])


@pytest.mark.parametrize("h_q", [16, 60])
def test_a_plan_of_this_mode_serves_the_default_one(h_q, device):
    """Where a sum would be handed over, both pieces are merged, and counters are left as they were."""
    case = Case((1100, 700, 900) * 50, h_q=h_q)
    inputs = make_inputs(case, device)
    tensors = (inputs.q_nope, inputs.q_pe, inputs.k_cache, inputs.block_table, inputs.cache_seqlens)
    metadata, num_splits = plan_for(case, inputs, True)
    assert (metadata[:, Field.FIRST_SPLITS] == -2).any()
    for _ in range(3):
        results = flash_mla_decode(*tensors, metadata, num_splits, SCALE, False)
        assert_agree(results, expected(case, inputs))


def test_a_plan_that_cuts_elsewhere_is_refused_on_the_cpu():
    case = Case((3000, 5200), h_q=16)
    inputs = make_inputs(case, torch.device("cpu"))
    tensors = (inputs.q_nope, inputs.q_pe, inputs.k_cache, inputs.block_table, inputs.cache_seqlens)
    default = plan_for(case, inputs, False)
    message = "the other mode or other .* expected one .* with batch_invariant=True"
    with pytest.raises(ValueError, match=message):
        flash_mla_decode(*tensors, *default, SCALE, False, batch_invariant=True)


@pytest.mark.parametrize("num_heads_q", [0, -3, 7, 20, "16"])
def test_heads_that_do_not_make_the_query_rows_are_refused(num_heads_q):
    lengths = torch.tensor([3000], dtype=torch.int32)
    with pytest.raises(ValueError, match=r"num_heads_q: got .*, expected h_q, .* 48 rows"):
        get_mla_metadata(lengths, 48, 2, batch_invariant=True, num_heads_q=num_heads_q)


def test_a_plan_still_to_be_made_keeps_its_mode():
    case = Case((3000, 300), h_q=16)
    inputs = make_inputs(case, torch.device("cpu"))
    tensors = (inputs.q, inputs.k_cache, inputs.block_table, inputs.cache_seqlens)
    plan, _ = get_mla_metadata(batch_invariant=True)
    with pytest.raises(ValueError, match="batch_invariant: got False, expected True, as get_mla_metadata"):
        flash_mla_with_kvcache(*tensors, 512, plan)
    out, _ = flash_mla_with_kvcache(*tensors, 512, plan, batch_invariant=True)
    assert torch.equal(out, run(case, inputs, batch_invariant=True)[0])


@pytest.mark.parametrize("value", ["False", 1, None])
def test_the_mode_is_true_or_false(value):
    for made_by in (get_mla_metadata, MLAPlan):
        with pytest.raises(ValueError, match="batch_invariant: got .*, expected True or False"):
            made_by(batch_invariant=value)


def test_kernels_without_the_mode_refuse_it(monkeypatch):
    monkeypatch.setattr(ReferenceProvider, "batch_invariant", False)
    monkeypatch.setenv(CHOICE_VARIABLE, "reference")
    case = Case((3000,), h_q=16)
    with pytest.raises(ValueError, match="batch_invariant: got True, expected False: the reference kernels"):
        run(case, make_inputs(case, torch.device("cpu")), batch_invariant=True)
