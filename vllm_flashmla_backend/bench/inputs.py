"""The tensors that every peer gets, and what their results are compared with."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..flash_mla.reference import naive_attention
from ..flash_mla.schedule import PAGE_SIZE
from .cases import SEED, Case

SCALE = 576**-0.5


@dataclass(frozen=True)
class Inputs:
    """One call's tensors; q both in one piece and in two, as peers differ in which they take."""

    case: Case
    q: torch.Tensor  # (b, s_q, h_q, 576)
    q_nope: torch.Tensor  # (b, s_q, h_q, 512), contiguous
    q_pe: torch.Tensor  # (b, s_q, h_q, 64), contiguous
    k_cache: torch.Tensor  # (pages, 64, 1, 576)
    block_table: torch.Tensor  # (b, max_pages) int32, page 0 past a sequence's end
    pages: torch.Tensor  # (sum of pages,) int32: the table without what lies past the ends
    pages_before: torch.Tensor  # (b + 1,) int32, running total of pages
    cache_seqlens: torch.Tensor  # (b,) int32
    max_len: int


def make_inputs(case: Case, device: torch.device) -> Inputs:
    """Normally distributed numbers in shuffled pages, all made on `device`, the same in every run."""
    generator = torch.Generator(device).manual_seed(SEED)
    dtype = getattr(torch, case.dtype)
    lengths = torch.tensor(case.cache_seqlens(), dtype=torch.int32, device=device)
    page_counts = (lengths + PAGE_SIZE - 1) // PAGE_SIZE  # (b,)
    pages_before = torch.zeros(case.b + 1, dtype=torch.int32, device=device)
    pages_before[1:] = page_counts.cumsum(0)
    total, most = int(pages_before[-1]), int(page_counts.max())
    pages = torch.randperm(total, generator=generator, device=device).int()
    block_table = torch.zeros(case.b, most, dtype=torch.int32, device=device)
    block_table[torch.arange(most, device=device) < page_counts.unsqueeze(1)] = pages
    shape = (case.b, case.s_q, case.h_q, 576)
    q = torch.randn(shape, generator=generator, dtype=dtype, device=device)
    return Inputs(
        case=case,
        q=q,
        q_nope=q[..., :512].contiguous(),
        q_pe=q[..., 512:].contiguous(),
        k_cache=torch.randn(total, PAGE_SIZE, 1, 576, generator=generator, dtype=dtype, device=device),
        block_table=block_table,
        pages=pages,
        pages_before=pages_before,
        cache_seqlens=lengths,
        max_len=max(case.cache_seqlens()),
    )


def reference(inputs: Inputs) -> torch.Tensor:  # (b, s_q, h_q, 512) float32
    """The result in float32 on the inputs' device."""
    return naive_attention(
        inputs.q,
        inputs.k_cache,
        inputs.block_table,
        inputs.cache_seqlens,
        SCALE,
        causal=True,
        dtype=torch.float32,
    )[0]


def relative_error(out: torch.Tensor, want: torch.Tensor) -> float:
    """The worst sequence's ‖out - want‖ ÷ ‖want‖; both (b, s_q, h_q, 512). NaN where `out` has one."""
    difference = (out.float() - want).flatten(1).norm(dim=1)  # (b,)
    return (difference / want.flatten(1).norm(dim=1)).max().item()
