"""Decode context parallelism in one process: its ranks decode one after the other, then are merged.

A rank holds every N-th run of `interleave` tokens of a sequence, in pages of its own, and decodes the
heads of all ranks over them; vLLM merges the results by their LSE. tests/test_vllm_parallel.py has
ranks that are processes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from mla_cases import Case, Inputs, assert_agree, expected, make_inputs, run

from vllm_flashmla_backend.flash_mla.schedule import PAGE_SIZE

# with interleave 64, lengths up to 64 leave every rank but the first without a token
LENGTHS = (0, 1, 2, 63, 64, 65, 127, 129, 1000, 2500)
LAYOUTS = [(2, 1, 16), (2, 64, 24), (4, 16, 128), (8, 1, 64)]  # ranks, interleave, heads of all ranks


@dataclass(frozen=True)
class Sharing:
    """A case shared out among ranks, with what each rank makes of its share."""

    case: Case
    inputs: Inputs
    lengths: list[tuple[int, ...]]  # of each rank's shares
    out: torch.Tensor  # (ranks, b, 1, h_q, 512)
    lse: torch.Tensor  # (ranks, b, h_q, 1)


def share_out(ranks: int, interleave: int, h_q: int, device: torch.device) -> Sharing:
    case = Case(LENGTHS, h_q=h_q, causal=True)
    inputs = make_inputs(case, device)
    shares = [share(case, inputs, ranks, rank, interleave) for rank in range(ranks)]
    out, lse = zip(*(run(*of_rank) for of_rank in shares), strict=True)
    return Sharing(
        case, inputs, [of_rank.lengths for of_rank, _ in shares], torch.stack(out), torch.stack(lse)
    )


def share(case: Case, inputs: Inputs, ranks: int, rank: int, interleave: int) -> tuple[Case, Inputs]:
    """What one rank holds: its tokens side by side in pages of its own, poison around them; all heads."""
    positions = [torch.arange(length, device=inputs.q_nope.device) for length in case.lengths]
    held = [p[p // interleave % ranks == rank] for p in positions]  # a sequence's tokens of this rank
    of_rank = replace(case, lengths=tuple(map(len, held)))
    mine = make_inputs(of_rank, inputs.q_nope.device, seed=1 + rank)
    for seq, tokens in enumerate(held):
        there, here = slots(inputs, seq, tokens), slots(mine, seq, torch.arange(len(tokens)).to(tokens))
        mine.k_cache[here] = inputs.k_cache[there]
    return of_rank, replace(mine, q_nope=inputs.q_nope, q_pe=inputs.q_pe)


def slots(inputs: Inputs, seq: int, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Page and place within it, (n,) each, of a sequence's tokens (n,)."""
    return inputs.block_table[seq, tokens // PAGE_SIZE].long(), tokens % PAGE_SIZE


def merge(out: torch.Tensor, lse: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(ranks, b, s_q, h_q, 512) and (ranks, b, h_q, s_q) -> out (b, s_q, h_q, 512), lse (b, h_q, s_q)."""
    lse = lse.masked_fill(lse == torch.inf, -torch.inf)  # no key seen: no weight
    total = lse.logsumexp(0)  # (b, h_q, s_q)
    weight = torch.exp(lse - total.masked_fill(total == -torch.inf, 0.0))
    merged = (out.float() * weight.transpose(2, 3).unsqueeze(-1)).sum(0)  # (b, s_q, h_q, 512)
    return merged.to(out.dtype), total.masked_fill(total == -torch.inf, torch.inf)


@pytest.mark.parametrize("ranks, interleave, h_q", LAYOUTS)
def test_ranks_with_shares_of_a_context_agree_with_one_that_has_all(ranks, interleave, h_q, device):
    """Known failure 8: heads of all ranks at once, shares of any length, empty ones among them."""
    shared = share_out(ranks, interleave, h_q, device)
    assert any(0 in lengths[1:] for lengths in shared.lengths), "no rank had an empty share"
    assert_agree(merge(shared.out, shared.lse), expected(shared.case, shared.inputs))


@pytest.mark.parametrize("ranks, interleave, h_q", LAYOUTS)
def test_vllms_merges_take_what_a_rank_returns_for_an_empty_share(ranks, interleave, h_q, device):
    """Known failure 8: out 0 and lse +inf count for nothing in vLLM's own code, and leave no NaN."""
    pytest.importorskip("vllm")
    import vllm_merges

    shared = share_out(ranks, interleave, h_q, device)
    want, _ = expected(shared.case, shared.inputs)
    out, lse = shared.out.squeeze(2), shared.lse.squeeze(3)  # (ranks, tokens, h_q, 512), (ranks, tokens, h_q)
    assert lse.isposinf().any()
    for name, merge_as_vllm in vllm_merges.on(device):
        merged = merge_as_vllm(out.clone(), lse.clone()).unsqueeze(1)  # (b, 1, h_q, 512)
        assert not merged.isnan().any(), name
        error = (merged - want).abs()
        assert (error < 2e-3 + want.abs() / 64).all(), f"{name}: off by up to {error.max():.3g}"


@pytest.mark.parametrize("ranks, interleave", [layout[:2] for layout in LAYOUTS])
def test_a_rank_has_as_many_tokens_as_vllm_says(ranks, interleave):
    pytest.importorskip("vllm")
    from vllm.v1.attention.backends.utils import get_dcp_local_seq_lens

    lengths = torch.arange(1000, dtype=torch.int32)
    said = get_dcp_local_seq_lens(lengths, ranks, None, interleave)  # (1000, ranks)
    for rank in range(ranks):
        held = (lengths // interleave % ranks == rank).cumsum(0)  # of the tokens 0 to n
        assert torch.equal(said[1:, rank].long(), held[:-1])
