"""The kernel API: has arguments checked, allocates results, hands the call to the chosen kernels.

Source of the interface: https://github.com/deepseek-ai/FlashMLA (`flash_mla_interface.py`).

Names, shapes and call styles are FlashMLA's. Every wrong argument is a `ValueError` that names it.
On a GPU only shapes, types and strides are looked at, never values: nothing waits for the device.
"""

from __future__ import annotations

from functools import lru_cache

import torch

from . import chunks, schedule
from .checks import (
    HEAD_DIM,
    HEAD_DIM_ROPE,
    HEAD_DIM_V,
    check_cache,
    check_last_dimension,
    check_lengths,
    check_like,
    check_not_negative,
    check_plan_buffers,
    check_query,
    check_query_lengths,
    check_rank,
    check_softmax_scale,
    check_strides,
    check_values,
    fail,
)
from .providers import DecodeArguments, Provider, provider_for
from .schedule import METADATA_WIDTH


class MLAPlan:
    """A plan still to be made: the first decode that is given it fills it, later ones reuse it.

    Reuse it for calls of one shape and the same lengths (the layers of one decode step).
    """

    def __init__(self) -> None:
        self.tile_scheduler_metadata: torch.Tensor | None = None  # (parts, 8) int32
        self.num_splits: torch.Tensor | None = None  # (b + 1,) int32
        self._shape: tuple[int, int, int, int, bool] | None = None  # b, s_q, h_q, h_kv, batch_invariant

    def for_call(
        self, cache_seqlens: torch.Tensor, s_q: int, h_q: int, h_kv: int, batch_invariant: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The plan's two tensors, made now if this is the first call."""
        shape = (cache_seqlens.shape[0], s_q, h_q, h_kv, batch_invariant)
        if self._shape is None:
            self.tile_scheduler_metadata, self.num_splits = get_mla_metadata(
                cache_seqlens, s_q * h_q // h_kv, h_kv, batch_invariant=batch_invariant, num_heads_q=h_q
            )
            self._shape = shape
        elif shape != self._shape:
            fail(
                "tile_scheduler_metadata",
                f"a plan made for (b, s_q, h_q, h_kv, batch_invariant) = {self._shape}",
                f"one for {shape}: take a new one from get_mla_metadata()",
            )
        return self.tile_scheduler_metadata, self.num_splits


def num_parts(device: torch.device, rows_per_kv_head: int, num_kv_heads: int) -> int:
    """Parts to plan for on `device`: `schedule.num_parts` for its SMs, `CPU_PARTS` on a CPU."""
    if device.type == "cpu":
        return schedule.CPU_PARTS
    return schedule.num_parts(_num_sms(device), rows_per_kv_head, num_kv_heads)


def get_mla_metadata(
    cache_seqlens: torch.Tensor | None = None,
    num_heads_per_head_k: int | None = None,
    num_heads_k: int | None = None,
    *,
    batch_invariant: bool = False,
    num_heads_q: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor] | tuple[MLAPlan, None]:
    """Plan one decode step.

    Parameters
    ----------
    cache_seqlens : (b,) int32, tokens in the cache; 0 is allowed.
    num_heads_per_head_k : query rows that share a KV head, `s_q * h_q // h_kv`.
    num_heads_k : KV heads, `h_kv`.
    batch_invariant : plan for decoding each sequence to the same bits whatever else is in the batch; the call
        that decodes says so, too.
    num_heads_q : `h_q`. Only a batch-invariant plan of several query tokens has to know it; unless given, the
        query rows are taken for the heads of one token.

    Returns
    -------
    tile_scheduler_metadata : (parts, 8) int32 on the lengths' device.
    num_splits : (b + 1,) int32, likewise.

    Without arguments (FlashMLA's later style): an `MLAPlan`, planned at its first use, and None.

    Raises
    ------
    ValueError
        An argument has the wrong type or shape, or the chosen kernels cannot run on this device.
    """
    if cache_seqlens is None and num_heads_per_head_k is None and num_heads_k is None:
        return MLAPlan(), None
    check_lengths(cache_seqlens)
    for name, value in (("num_heads_per_head_k", num_heads_per_head_k), ("num_heads_k", num_heads_k)):
        if not isinstance(value, int) or value < 1:
            fail(name, repr(value), "an int of at least 1")
    parts = num_parts(cache_seqlens.device, num_heads_per_head_k, num_heads_k)
    tile_scheduler_metadata = cache_seqlens.new_empty(parts, METADATA_WIDTH)
    num_splits = cache_seqlens.new_empty(cache_seqlens.shape[0] + 1)
    heads_per_kv_head = num_heads_per_head_k if num_heads_q is None else num_heads_q // num_heads_k
    level = chunks.chunk_level(heads_per_kv_head) if batch_invariant else 0
    plan_into(cache_seqlens, tile_scheduler_metadata, num_splits, level)
    return tile_scheduler_metadata, num_splits


def plan_into(
    cache_seqlens: torch.Tensor,
    tile_scheduler_metadata: torch.Tensor,
    num_splits: torch.Tensor,
    chunk_level: int = 0,
) -> None:
    """Plan one decode step into existing buffers; on a GPU a kernel does it and nothing waits.

    Parameters
    ----------
    cache_seqlens : (b,) int32, tokens in the cache; 0 is allowed.
    tile_scheduler_metadata : (parts, 8) int32, written; `parts` is what `num_parts` returned.
    num_splits : (b + 1,) int32, written.
    chunk_level : for a batch-invariant plan, `chunks.chunk_level` of the heads that share a KV head.

    Raises
    ------
    ValueError
        An argument has the wrong type, shape or device, or the kernels cannot run on this device.
    """
    check_lengths(cache_seqlens)
    device = cache_seqlens.device
    check_rank("tile_scheduler_metadata", tile_scheduler_metadata, 2)
    parts = max(1, tile_scheduler_metadata.shape[0])
    check_plan_buffers(tile_scheduler_metadata, num_splits, parts, cache_seqlens.shape[0], device)
    if device.type == "cpu":
        check_not_negative(cache_seqlens.tolist())
    _provider(device, chunk_level).plan(cache_seqlens, tile_scheduler_metadata, num_splits, chunk_level)


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
    batch_invariant: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Multi-head latent attention of a few new tokens over a paged cache.

    Parameters
    ----------
    q : (b, s_q, h_q, 576) bfloat16 or float16, on a CPU also float32. The last dimension is
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
    batch_invariant : a sequence's result has the same bits whatever else is in the batch, wherever it
        stands there. Takes a plan made so, and scratch memory for every chunk that a sequence may have.

    Returns
    -------
    out : (b, s_q, h_q, 512) in q's dtype; zero where a row sees no key.
    lse : (b, h_q, s_q) float32, natural logarithm; +inf where a row sees no key.

    Raises
    ------
    ValueError
        An argument does not fit, or the chosen kernels cannot run on this device.
    """
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
        `max_query_len * h_q // h_kv` rows that share a KV head.
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
    if lse is None:
        lse = q_nope.new_empty(lse_shape, dtype=torch.float32)
    else:
        check_like("lse", lse, lse_shape, torch.float32, q_nope.device)
        check_last_dimension("lse", lse)
    return out, lse


def _decode(args: DecodeArguments, num_splits: torch.Tensor | None, batch_invariant: bool) -> None:
    """Check what both entries have in common; plan, if the plan is an `MLAPlan` still to be made; decode."""
    q_nope, k_cache, cache_seqlens = args.q_nope, args.k_cache, args.cache_seqlens
    b = q_nope.shape[0] if args.cu_seqlens_q is None else args.cu_seqlens_q.shape[0] - 1
    check_cache(b, q_nope, k_cache, args.block_table, cache_seqlens)
    check_softmax_scale(args.softmax_scale)
    h_q, h_kv, device = q_nope.shape[2], k_cache.shape[2], q_nope.device
    metadata = args.tile_scheduler_metadata
    if isinstance(metadata, MLAPlan):
        if num_splits is not None:
            fail("num_splits", "a value beside an MLAPlan", "None: the MLAPlan holds it")
        metadata, num_splits = metadata.for_call(
            cache_seqlens, args.max_query_len, h_q, h_kv, batch_invariant
        )
    level = chunks.chunk_level(h_q // h_kv) if batch_invariant else 0
    args = args._replace(tile_scheduler_metadata=metadata, chunk_level=level)
    parts = num_parts(device, args.max_query_len * h_q // h_kv, h_kv)
    check_plan_buffers(metadata, num_splits, parts, b, device)
    if device.type == "cpu":
        check_values(k_cache, args.block_table, cache_seqlens, metadata, num_splits, level)
    _provider(device, level).decode(args)


def _provider(device: torch.device, chunk_level: int) -> Provider:
    """The kernels to call, which must have the mode that is asked for."""
    provider = provider_for(device)
    if chunk_level and not provider.batch_invariant:
        fail("batch_invariant", True, f"False: the {provider.name} kernels have no such mode")
    return provider


@lru_cache
def _num_sms(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count
