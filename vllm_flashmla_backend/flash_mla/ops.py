"""The only door to the compiled library: loads it and calls it.

The library fills buffers that its caller allocated, on torch's current stream, and never waits
for the GPU. It is bound with Apache TVM FFI, which takes torch tensors without a copy; checks
that fail in C++ arrive here as ValueError.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from tvm_ffi import Module

LIBRARY = Path(__file__).with_name("_kernels.so")


def kernels_built() -> bool:
    """Whether this installation holds the compiled library; it may still fail to load."""
    return LIBRARY.exists()


@cache
def _library() -> Module:
    import tvm_ffi

    return tvm_ffi.load_module(str(LIBRARY))


def load_error() -> str | None:
    """Why the library does not load, or None if it does (it loads without a GPU, too)."""
    if not kernels_built():
        return f"the GPU kernels were not built: there is no {LIBRARY}"
    try:
        _library()
    except (ImportError, OSError, RuntimeError, ValueError) as error:
        return f"{LIBRARY} does not load: {error}"
    return None


def plan(
    cache_seqlens: torch.Tensor,  # (b) int32
    tile_scheduler_metadata: torch.Tensor,  # (num_parts, 8) int32, filled
    num_splits: torch.Tensor,  # (b + 1) int32, filled
    chunk_level: int,
    rows_per_kv_head: int,
) -> None:
    """Launch the planner; `schedule.plan` says what it computes."""
    _library().plan(cache_seqlens, tile_scheduler_metadata, num_splits, chunk_level, rows_per_kv_head)


def decode(
    q_nope: torch.Tensor,  # (b, s_q, h_q, 512), or ragged (1, tokens, h_q, 512)
    q_pe: torch.Tensor,  # (b, s_q, h_q, 64), likewise
    k_cache: torch.Tensor,  # (num_pages, 64, h_kv, 576)
    block_table: torch.Tensor,  # (b, max_pages) int32
    cache_seqlens: torch.Tensor,  # (b) int32
    cu_seqlens_q: torch.Tensor | None,  # (b + 1) int32 if ragged
    max_query_len: int,  # s_q, or the largest of a ragged batch
    tile_scheduler_metadata: torch.Tensor,  # (num_parts, 8) int32
    out: torch.Tensor,  # (b, s_q, h_q, 512) or (1, tokens, h_q, 512), filled
    lse: torch.Tensor,  # (b, h_q, s_q) or (1, h_q, tokens) float32, filled
    out_partial: torch.Tensor,  # (slots, rows, 512) float32, scratch: see providers.empty_partials
    weight_sums: torch.Tensor,  # (slots, rows, 2) float32, scratch
    softmax_scale: float,
    causal: bool,
    chunk_level: int,
) -> None:
    """Launch the decode kernel, which merges the splits, too."""
    _library().decode(
        q_nope,
        q_pe,
        k_cache,
        block_table,
        cache_seqlens,
        cu_seqlens_q,
        max_query_len,
        tile_scheduler_metadata,
        out,
        lse,
        out_partial,
        weight_sums,
        softmax_scale,
        causal,
        chunk_level,
    )
