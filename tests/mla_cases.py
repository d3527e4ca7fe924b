"""Inputs whose every unused byte is poisoned, calls on them, and bounds within which results must agree."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch

from vllm_flashmla_backend.flash_mla import (
    flash_mla_decode,
    flash_mla_decode_varlen,
    get_mla_metadata,
    schedule,
)
from vllm_flashmla_backend.flash_mla.layout import ceil_div
from vllm_flashmla_backend.flash_mla.reference import naive_attention
from vllm_flashmla_backend.flash_mla.schedule import PAGE_SIZE

SCALE = 576**-0.5
MIXED = (0, 1, 63, 64, 65, 130, 1000, 2500)  # lengths around pages' ends, of several splits, and none
CUT = (
    ((600, 600), 4, 2, False),
    ((1400,) * 3, 2, 2, True),
    ((1400,) * 4, 3, 2, True),  # and a part goes on with a sequence that it leaves to another one
    ((4400, 1000, 1000, 1000), 4, 3, True),
    ((10_600, *[64] * 17), 16, 12, True),
)
"""Lengths, parts, splits of the first sequence that is cut, whether its last part goes on with another."""
WILD_PAGES = (-1, 2147480000)  # what stands in the table past a sequence's end
SPARE_PAGES = 3  # pages of the cache that no sequence refers to


@dataclass(frozen=True)
class Case:
    """The shape of one call."""

    lengths: tuple[int, ...]
    s_q: int = 1
    h_q: int = 16
    h_kv: int = 1
    causal: bool = False
    dtype: torch.dtype = torch.bfloat16
    strided: bool = False  # q, cache and results laid out as vLLM may hand them over, not packed

    def __str__(self) -> str:
        lengths = "-".join(map(str, self.lengths[:4])) + ("-etc" if len(self.lengths) > 4 else "")
        words = [f"len{lengths}", f"sq{self.s_q}", f"h{self.h_q}", f"kv{self.h_kv}", str(self.dtype)[6:]]
        return "_".join(words + ["causal"] * self.causal + ["strided"] * self.strided)


@dataclass(frozen=True)
class Inputs:
    q_nope: torch.Tensor  # (b, s_q, h_q, 512)
    q_pe: torch.Tensor  # (b, s_q, h_q, 64)
    k_cache: torch.Tensor  # (pages, 64, h_kv, 576), NaN wherever no sequence has a token
    block_table: torch.Tensor  # (b, max_pages) int32, wild past each sequence's end
    cache_seqlens: torch.Tensor  # (b,) int32

    @property
    def q(self) -> torch.Tensor:
        return torch.cat([self.q_nope, self.q_pe], dim=-1)


def make_inputs(case: Case, device: torch.device, seed: int = 0) -> Inputs:
    """Random queries and tokens in shuffled pages; everything else is NaN or a wild page number.

    Tokens have a standard deviation of 1/10 and queries of 10, so that scores have one of 1: weights
    in bfloat16 are off by 2^-9, and the bounds of `assert_agree` are absolute ones for values this size.
    """
    generator = torch.Generator(device).manual_seed(seed)
    b, pages = len(case.lengths), [ceil_div(n, PAGE_SIZE) for n in case.lengths]

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float32, device=device).to(case.dtype)

    k_cache = nan_cache(case, sum(pages) + SPARE_PAGES, device)
    order = torch.randperm(k_cache.shape[0], generator=generator, device=device).int()
    block_table = torch.full((b, max(pages) + 2), WILD_PAGES[0], dtype=torch.int32, device=device)
    block_table[:, 1::2] = WILD_PAGES[1]
    for seq, (length, count) in enumerate(zip(case.lengths, pages, strict=True)):
        mine, order = order[:count], order[count:]
        block_table[seq, :count] = mine
        tokens = torch.full((count * PAGE_SIZE, case.h_kv, 576), torch.nan, dtype=case.dtype, device=device)
        tokens[:length] = randn(length, case.h_kv, 576) / 10
        k_cache[mine] = tokens.unflatten(0, (count, PAGE_SIZE))
    if case.strided:
        # As after vLLM's absorption by a batched matmul, (h_q, tokens, 512), and its q of 128 + 64.
        q_nope = (10 * randn(case.h_q, b * case.s_q, 512)).transpose(0, 1).unflatten(0, (b, case.s_q))
        q_pe = (10 * randn(b, case.s_q, case.h_q, 192))[..., 128:]
    else:
        q_nope, q_pe = 10 * randn(b, case.s_q, case.h_q, 512), 10 * randn(b, case.s_q, case.h_q, 64)
    cache_seqlens = torch.tensor(case.lengths, dtype=torch.int32, device=device)
    return Inputs(q_nope, q_pe, k_cache, block_table, cache_seqlens)


def add_growing_scores(inputs: Inputs, growth: float) -> None:
    """Have every page's scores outgrow those of the page before by about `growth`, through the rope part,
    which is no value."""
    inputs.q_pe.abs_()
    for seq, length in enumerate(inputs.cache_seqlens.tolist()):
        for first in range(0, length, PAGE_SIZE):
            page = inputs.block_table[seq, first // PAGE_SIZE]
            inputs.k_cache[page, : length - first, :, 512:] += growth / 20 * first / PAGE_SIZE


def nan_cache(case: Case, num_pages: int, device: torch.device) -> torch.Tensor:
    """(num_pages, 64, h_kv, 576) of NaN; if strided, KV heads outermost in pages larger than needed."""
    if not case.strided:
        return torch.full((num_pages, PAGE_SIZE, case.h_kv, 576), torch.nan, dtype=case.dtype, device=device)
    shape = (num_pages, case.h_kv + 1, PAGE_SIZE, 640)
    return torch.full(shape, torch.nan, dtype=case.dtype, device=device)[:, 1:, :, :576].transpose(1, 2)


def nan_results(case: Case, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Buffers for out and lse, full of NaN; if strided, out is a slice of a larger one."""
    b, extra = len(case.lengths), int(case.strided)
    out = torch.full((b, case.s_q, case.h_q + extra, 512), torch.nan, dtype=case.dtype, device=device)
    lse = torch.full((b, case.h_q, case.s_q), torch.nan, device=device)
    return out[:, :, extra:], lse


PLAIN_ROWS = 80  # two tiles: no rule of few rows, of full tiles or of a single one


def run(
    case: Case, inputs: Inputs, batch_invariant: bool = False, parts: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Plan, for all parts or for the first few, then decode into results that were NaN before."""
    metadata, num_splits = plan_for(case, inputs, batch_invariant)
    if parts is not None:
        metadata.zero_()[:, schedule.Field.FIRST_SEQ] = len(case.lengths)  # idle
        level = schedule.chunk_level(case.s_q * case.h_q // case.h_kv, batch_invariant)
        planned, counted = schedule.plan(case.lengths, parts, level, PLAIN_ROWS)
        metadata[:parts], num_splits[:] = planned, counted
    out, lse = nan_results(case, inputs.q_nope.device)
    return flash_mla_decode(
        inputs.q_nope,
        inputs.q_pe,
        inputs.k_cache,
        inputs.block_table,
        inputs.cache_seqlens,
        metadata,
        num_splits,
        SCALE,
        case.causal,
        out,
        lse,
        batch_invariant,
    )


def plan_for(case: Case, inputs: Inputs, batch_invariant: bool) -> tuple[torch.Tensor, torch.Tensor]:
    return get_mla_metadata(
        inputs.cache_seqlens,
        case.s_q * case.h_q // case.h_kv,
        case.h_kv,
        batch_invariant=batch_invariant,
    )


def run_ragged(
    case: Case, inputs: Inputs, query_lens: tuple[int, ...], batch_invariant: bool = False
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The first `query_lens[i]` query tokens of sequence i, all in one ragged call; a result for each."""
    device, h_q = inputs.q_nope.device, case.h_q
    plan = plan_for(case, inputs, batch_invariant)
    begins = [0, *accumulate(query_lens)]
    out = torch.full((begins[-1], h_q, 512), torch.nan, dtype=case.dtype, device=device)
    lse = torch.full((h_q, begins[-1]), torch.nan, device=device)
    flash_mla_decode_varlen(
        *(torch.cat([q[i, :n] for i, n in enumerate(query_lens)]) for q in (inputs.q_nope, inputs.q_pe)),
        inputs.k_cache,
        inputs.block_table,
        inputs.cache_seqlens,
        torch.tensor(begins, dtype=torch.int32, device=device),
        case.s_q,
        *plan,
        SCALE,
        case.causal,
        out,
        lse,
        batch_invariant,
    )
    return [(out[None, begin:end], lse[None, :, begin:end]) for begin, end in pairwise(begins)]


def expected(
    case: Case, inputs: Inputs, dtype: torch.dtype = torch.float64
) -> tuple[torch.Tensor, torch.Tensor]:
    return naive_attention(
        inputs.q, inputs.k_cache, inputs.block_table, inputs.cache_seqlens, SCALE, case.causal, dtype
    )


def assert_agree(got: tuple[torch.Tensor, torch.Tensor], want: tuple[torch.Tensor, torch.Tensor]) -> None:
    """The bounds that FlashMLA's own tests ask for, on out and on lse."""
    for name, ours, theirs, abs_tol, rel_tol in (
        ("out", got[0], want[0], 8e-4, 2 / 128),
        ("lse", got[1], want[1], 1e-6, 8 / 65536),
    ):
        ours = ours.to(theirs.dtype)
        assert not ours.isnan().any(), f"{name}: {int(ours.isnan().sum())} of {ours.numel()} values are NaN"
        infinite = theirs.isinf()
        assert torch.equal(ours[infinite], theirs[infinite]), (
            f"{name}: where a row sees no key it must be +inf"
        )
        ours, theirs = ours[~infinite], theirs[~infinite]
        error = (ours - theirs).abs()
        wrong = (error > abs_tol) & (error > rel_tol * theirs.abs())
        assert not wrong.any(), (
            f"{name}: {int(wrong.sum())} of {error.numel()} off, by up to {error.max():.3g}"
        )
    ours, theirs = got[0].to(want[0].dtype), want[0]
    norm = (ours.square() + theirs.square()).sum()
    cosine_difference = 1 - 2 * (ours * theirs).sum() / norm.clamp_min(1e-30)
    assert norm == 0 or cosine_difference < 5e-6, f"out: cosine difference {cosine_difference:.3g}"


def captured(step: Callable[[], None]) -> torch.cuda.CUDAGraph:
    """One call of `step` as a CUDA graph, warmed up before."""
    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph
