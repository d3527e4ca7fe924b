"""The kernel API: has arguments checked, allocates results, hands the call to the chosen kernels.

Source of the interface: https://github.com/deepseek-ai/FlashMLA (`flash_mla_interface.py`).

Names, shapes and call styles are FlashMLA's. Every wrong argument is a `ValueError` that names it.
On a GPU only shapes, types and strides are looked at, never values: nothing waits for the device.
"""

from __future__ import annotations

import torch

from . import schedule
from .checks import (
    HEAD_DIM,
    HEAD_DIM_ROPE,
    HEAD_DIM_V,
    check_bool,
    check_cache,
    check_last_dimension,
    check_like,
    check_not_expanded,
    check_not_served,
    check_plan_buffers,
    check_query,
    check_query_lengths,
    check_softmax_scale,
    check_strides,
    check_values,
    fail,
)
from .planning import MLAPlan, parts_of_call, provider_with
from .providers import DecodeArguments


def flash_mla_with_kvcache(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    block_table: torch.Tensor,
    cache_seqlens: torch.Tensor,
    head_dim_v: int,
    tile_scheduler_metadata: torch.Tensor | MLAPlan,
    num_splits: torch.Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    is_fp8_kvcache: bool = False,
    indices: torch.Tensor | None = None,
    *,
    batch_invariant: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Multi-head latent attention of a few new tokens over a paged cache.

    Parameters
    ----------
    q : (b, s_q, h_q, 576) bfloat16 or float16, on a CPU also float32; up to 128 heads. The last dimension is
        contiguous; the others have any strides, on a GPU multiples of 16 bytes. So have the cache's.
    k_cache : (pages, 64, h_kv, 576) in q's dtype; V is the first 512 of K.
    block_table : (b, max_pages) int32; only the first `ceil(length / 64)` of a row count.
    cache_seqlens : (b,) int32, tokens in the cache, the new ones included; 0 is allowed.
    head_dim_v : 512.
    tile_scheduler_metadata, num_splits : what `get_mla_metadata` returned for these lengths. On a GPU
        only their shapes are compared: with a plan of other lengths rows are wrong, and words that no
        planner wrote, or only a part of a plan, may leave the kernel waiting for ever.
    softmax_scale : factor on the scores, above 0; 576 ** -0.5 unless given.
    causal : query token i of s_q sees keys up to `length - s_q + i`.
    is_fp8_kvcache, indices : FlashMLA's, for what is not served here; anything but False and None is refused.
    batch_invariant : a sequence's result has the same bits whatever else is in the batch, wherever it
        stands there, in all calls of the same s_q. Takes a plan made so, and scratch memory for the chunks of
        sequences.

    Returns
    -------
    out : (b, s_q, h_q, 512) in q's dtype; zero where a row sees no key.
    lse : (b, h_q, s_q) float32, natural logarithm; +inf where a row sees no key.

    Raises
    ------
    ValueError
        An argument does not fit, or the chosen kernels cannot run on this device.
    """
    check_not_served(is_fp8_kvcache, "indices", indices)
    check_query("q", q, "b s_q h_q", HEAD_DIM)
    if head_dim_v != HEAD_DIM_V:
        fail("head_dim_v", repr(head_dim_v), HEAD_DIM_V)
    return flash_mla_decode(
        q[..., :HEAD_DIM_V],
        q[..., HEAD_DIM_V:],
        k_cache,
        block_table,
        cache_seqlens,
        tile_scheduler_metadata,
        num_splits,
        HEAD_DIM**-0.5 if softmax_scale is None else softmax_scale,
        causal,
        batch_invariant=batch_invariant,
    )


def flash_mla_decode(
    q_nope: torch.Tensor,
    q_pe: torch.Tensor,
    k_cache: torch.Tensor,
    block_table: torch.Tensor,
    cache_seqlens: torch.Tensor,
    tile_scheduler_metadata: torch.Tensor | MLAPlan,
    num_splits: torch.Tensor | None,
    softmax_scale: float,
    causal: bool,
    out: torch.Tensor | None = None,
    lse: torch.Tensor | None = None,
    batch_invariant: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`flash_mla_with_kvcache` with q in two tensors, and results into given buffers.

    Parameters
    ----------
    q_nope : (b, s_q, h_q, 512), the part of q that meets the latent, its strides like any q's.
    q_pe : (b, s_q, h_q, 64), the part that meets the rotary key; strides of its own.
    out : (b, s_q, h_q, 512) in q's dtype, written, its strides like q's; allocated unless given.
    lse : (b, h_q, s_q) float32, written, strides as they come; allocated unless given.

    The other parameters, the results and the errors are those of `flash_mla_with_kvcache`.
    """
    check_query("q_nope", q_nope, "b s_q h_q", HEAD_DIM_V)
    check_query("q_pe", q_pe, "b s_q h_q", HEAD_DIM_ROPE)
    b, s_q, h_q, _ = q_nope.shape
    check_like("q_pe", q_pe, (b, s_q, h_q, HEAD_DIM_ROPE), q_nope.dtype, q_nope.device)
    out, lse = _results(q_nope, (b, h_q, s_q), out, lse)
    _decode(
        DecodeArguments(
            q_nope,
            q_pe,
            k_cache,
            block_table,
            cache_seqlens,
            None,
            s_q,
            tile_scheduler_metadata,
            out,
            lse,
            softmax_scale,
            causal,
        ),
        num_splits,
        batch_invariant,
    )
    return out, lse


def flash_mla_decode_varlen(
    q_nope: torch.Tensor,
    q_pe: torch.Tensor,
    k_cache: torch.Tensor,
    block_table: torch.Tensor,
    cache_seqlens: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    max_query_len: int,
    tile_scheduler_metadata: torch.Tensor | MLAPlan,
    num_splits: torch.Tensor | None,
    softmax_scale: float,
    causal: bool,
    out: torch.Tensor | None = None,
    lse: torch.Tensor | None = None,
    batch_invariant: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`flash_mla_decode` for sequences with different numbers of query tokens, 0 among them.

    Parameters
    ----------
    q_nope : (tokens, h_q, 512), the sequences' query tokens one after another.
    q_pe : (tokens, h_q, 64).
    cu_seqlens_q : (b + 1,) int32; sequence i has the tokens from `cu_seqlens_q[i]` to `cu_seqlens_q[i + 1]`.
    max_query_len : no sequence has more query tokens. The plan is made for
        `max_query_len * h_q // h_kv` rows that share a KV head. With `batch_invariant`, calls of the same
        one give the same bits: take the most that there may be, not the most that this batch has.
    out : (tokens, h_q, 512) in q's dtype, written; allocated unless given.
    lse : (h_q, tokens) float32, written; allocated unless given.

    The other parameters, the results and the errors are those of `flash_mla_with_kvcache`; query token i
    of a sequence's s_q sees keys up to `length - s_q + i`.
    """
    check_query("q_nope", q_nope, "tokens h_q", HEAD_DIM_V)
    check_query("q_pe", q_pe, "tokens h_q", HEAD_DIM_ROPE)
    tokens, h_q, _ = q_nope.shape
    check_like("q_pe", q_pe, (tokens, h_q, HEAD_DIM_ROPE), q_nope.dtype, q_nope.device)
    check_query_lengths(cu_seqlens_q, max_query_len, cache_seqlens, q_nope)
    out, lse = _results(q_nope, (h_q, tokens), out, lse)
    _decode(
        DecodeArguments(
            q_nope.unsqueeze(0),
            q_pe.unsqueeze(0),
            k_cache,
            block_table,
            cache_seqlens,
            cu_seqlens_q,
            max_query_len,
            tile_scheduler_metadata,
            out.unsqueeze(0),
            lse.unsqueeze(0),
            softmax_scale,
            causal,
        ),
        num_splits,
        batch_invariant,
    )
    return out, lse


def _results(
    q_nope: torch.Tensor, lse_shape: tuple[int, ...], out: torch.Tensor | None, lse: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The buffers to write to: checked if given, else allocated."""
    if out is None:
        out = q_nope.new_empty(q_nope.shape)
    else:
        check_like("out", out, q_nope.shape, q_nope.dtype, q_nope.device)
        check_strides("out", out)
        check_not_expanded("out", out)
    if lse is None:
        lse = q_nope.new_empty(lse_shape, dtype=torch.float32)
    else:
        check_like("lse", lse, lse_shape, torch.float32, q_nope.device)
        check_last_dimension("lse", lse)
        check_not_expanded("lse", lse)
    return out, lse


def _decode(args: DecodeArguments, num_splits: torch.Tensor | None, batch_invariant: bool) -> None:
    """Check what both entries have in common; plan, if the plan is an `MLAPlan` still to be made; decode."""
    q_nope, k_cache, cache_seqlens = args.q_nope, args.k_cache, args.cache_seqlens
    b = q_nope.shape[0] if args.cu_seqlens_q is None else args.cu_seqlens_q.shape[0] - 1
    check_cache(b, q_nope, k_cache, args.block_table, cache_seqlens)
    check_softmax_scale(args.softmax_scale)
    check_bool("causal", args.causal)
    check_bool("batch_invariant", batch_invariant)
    h_q, h_kv, device = q_nope.shape[2], k_cache.shape[2], q_nope.device
    metadata = args.tile_scheduler_metadata
    if isinstance(metadata, MLAPlan):
        if num_splits is not None:
            fail("num_splits", "a value beside an MLAPlan", "None: the MLAPlan holds it")
        metadata, num_splits = metadata.for_call(
            cache_seqlens, args.max_query_len, h_q, h_kv, batch_invariant
        )
    rows = args.max_query_len * h_q // h_kv
    level = schedule.chunk_level(rows, batch_invariant)
    args = args._replace(tile_scheduler_metadata=metadata, chunk_level=level)
    parts = parts_of_call(device, args.max_query_len, h_q, h_kv)
    check_plan_buffers(metadata, num_splits, parts, b, device)
    if device.type == "cpu":
        check_values(k_cache, args.block_table, cache_seqlens, metadata, num_splits, level)
    provider_with(device, level).decode(args)
