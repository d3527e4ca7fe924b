"""The plan of a decode step: how many parts, in which buffers, made when and for which mode.

What a plan is, and how it is made, is `schedule`'s; names and call styles here are FlashMLA's
(https://github.com/deepseek-ai/FlashMLA, `flash_mla_interface.py`).
"""

from __future__ import annotations

from functools import lru_cache

import torch

from . import schedule
from .checks import (
    check_bool,
    check_heads,
    check_lengths,
    check_not_negative,
    check_not_served,
    check_plan_buffers,
    fail,
)
from .providers import Provider, provider_for
from .row_tiling import row_tiling
from .schedule import METADATA_WIDTH


class MLAPlan:
    """A plan still to be made: the first decode that is given it fills it, later ones reuse it.

    Reuse it for calls of one shape and the same lengths (the layers of one decode step).
    """

    def __init__(self, batch_invariant: bool = False) -> None:
        check_bool("batch_invariant", batch_invariant)
        self.batch_invariant = batch_invariant
        self.tile_scheduler_metadata: torch.Tensor | None = None  # (parts, 8) int32
        self.num_splits: torch.Tensor | None = None  # (b + 1,) int32
        self._shape: tuple[int, int, int, int] | None = None  # b, s_q, h_q, h_kv

    def for_call(
        self, cache_seqlens: torch.Tensor, s_q: int, h_q: int, h_kv: int, batch_invariant: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The plan's two tensors, made now if this is the first call."""
        if batch_invariant != self.batch_invariant:
            fail(
                "batch_invariant", batch_invariant, f"{self.batch_invariant}, as get_mla_metadata() was told"
            )
        shape = (cache_seqlens.shape[0], s_q, h_q, h_kv)
        if self._shape is None:
            self.tile_scheduler_metadata, self.num_splits = get_mla_metadata(
                cache_seqlens, s_q * h_q // h_kv, h_kv, h_q, batch_invariant=batch_invariant
            )
            self._shape = shape
        elif shape != self._shape:
            fail(
                "tile_scheduler_metadata",
                f"a plan made for (b, s_q, h_q, h_kv) = {self._shape}",
                f"one for {shape}: take a new one from get_mla_metadata()",
            )
        return self.tile_scheduler_metadata, self.num_splits


def num_parts(device: torch.device, query_len: int, num_heads: int, num_kv_heads: int) -> int:
    """Parts to plan for on `device`: `schedule.num_parts` for its SMs, `CPU_PARTS` on a CPU."""
    if device.type == "cpu":
        return schedule.CPU_PARTS
    tiling = row_tiling(query_len, num_heads, num_kv_heads)
    return schedule.num_parts(_num_sms(device), tiling.num_row_tiles)


def num_parts_of_rows(device: torch.device, rows_per_kv_head: int, num_kv_heads: int) -> int:
    """The same where nobody has told of how many heads the query tokens are: FlashMLA's callers need not.

    The rows are taken as those of a single token, which fill their tiles. With 5 tokens and more, and with 3
    of 85 or of 106 heads, that may be more parts than `num_parts` says, and the call takes a second launch.
    """
    return num_parts(device, 1, rows_per_kv_head * num_kv_heads, num_kv_heads)


@lru_cache
def parts_of_call(device: torch.device, query_len: int, num_heads: int, num_kv_heads: int) -> tuple[int, int]:
    """How many parts a call's plan may have: made for its heads, or for rows alone. Each layer asks."""
    return (
        num_parts(device, query_len, num_heads, num_kv_heads),
        num_parts_of_rows(device, query_len * num_heads // num_kv_heads, num_kv_heads),
    )


def get_mla_metadata(
    cache_seqlens: torch.Tensor | None = None,
    num_q_tokens_per_head_k: int | None = None,
    num_heads_k: int | None = None,
    num_heads_q: int | None = None,
    is_fp8_kvcache: bool = False,
    topk: int | None = None,
    *,
    batch_invariant: bool = False,
) -> tuple[torch.Tensor, torch.Tensor] | tuple[MLAPlan, None]:
    """Plan one decode step.

    Parameters
    ----------
    cache_seqlens : (b,) int32, tokens in the cache; 0 is allowed.
    num_q_tokens_per_head_k : query rows that share a KV head, `s_q * h_q // h_kv`.
    num_heads_k : KV heads, `h_kv`.
    num_heads_q : `h_q`, 1 to 128. Worth giving, as at times it saves a launch: see
        `num_parts_of_rows`.
    is_fp8_kvcache, topk : FlashMLA's, for what is not served here; anything but False and None is refused.
    batch_invariant : plan for decoding each sequence to the same bits whatever else is in the batch; the call
        that decodes says so, too.

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
    check_bool("batch_invariant", batch_invariant)
    check_not_served(is_fp8_kvcache, "topk", topk)
    if cache_seqlens is None and num_q_tokens_per_head_k is None and num_heads_k is None:
        return MLAPlan(batch_invariant), None
    check_lengths(cache_seqlens)
    for name, value in (("num_q_tokens_per_head_k", num_q_tokens_per_head_k), ("num_heads_k", num_heads_k)):
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            fail(name, repr(value), "an int of at least 1")
    device = cache_seqlens.device
    if num_heads_q is None:
        parts = num_parts_of_rows(device, num_q_tokens_per_head_k, num_heads_k)
    else:
        _check_num_heads_q(num_heads_q, num_q_tokens_per_head_k, num_heads_k)
        query_len = num_q_tokens_per_head_k * num_heads_k // num_heads_q
        parts = num_parts(device, query_len, num_heads_q, num_heads_k)
    tile_scheduler_metadata = cache_seqlens.new_empty(parts, METADATA_WIDTH)
    num_splits = cache_seqlens.new_empty(cache_seqlens.shape[0] + 1)
    level = schedule.chunk_level(num_q_tokens_per_head_k, batch_invariant)
    plan_into(cache_seqlens, tile_scheduler_metadata, num_splits, num_q_tokens_per_head_k, level)
    return tile_scheduler_metadata, num_splits


def plan_into(
    cache_seqlens: torch.Tensor,
    tile_scheduler_metadata: torch.Tensor,
    num_splits: torch.Tensor,
    rows_per_kv_head: int,
    chunk_level: int = 0,
) -> None:
    """Plan one decode step into existing buffers; on a GPU a kernel does it and nothing waits.

    Parameters
    ----------
    cache_seqlens : (b,) int32, tokens in the cache; 0 is allowed.
    tile_scheduler_metadata : (parts, 8) int32, written; `parts` is what `num_parts` returned.
    num_splits : (b + 1,) int32, written.
    rows_per_kv_head : query rows that share a KV head, `s_q * h_q // h_kv`.
    chunk_level : for a batch-invariant plan, what `schedule.chunk_level` says of the rows.

    Raises
    ------
    ValueError
        An argument has the wrong type, shape or device, or the kernels cannot run on this device.
    """
    check_lengths(cache_seqlens)
    device = cache_seqlens.device
    any_number = range(1, 2**31)
    check_plan_buffers(tile_scheduler_metadata, num_splits, any_number, cache_seqlens.shape[0], device)
    if device.type == "cpu":
        check_not_negative(cache_seqlens.tolist())
    provider_with(device, chunk_level).plan(
        cache_seqlens, tile_scheduler_metadata, num_splits, chunk_level, rows_per_kv_head
    )


def _check_num_heads_q(num_heads_q: int, num_q_tokens_per_head_k: int, num_heads_k: int) -> None:
    """Whole query tokens of so many heads make the rows that share a KV head."""
    divides = isinstance(num_heads_q, int) and num_heads_q > 0 and num_heads_q % num_heads_k == 0
    if not divides or num_q_tokens_per_head_k % (num_heads_q // num_heads_k):
        expected = f"h_q, whole query tokens of which are {num_q_tokens_per_head_k} rows for a KV head"
        fail("num_heads_q", repr(num_heads_q), expected)
    check_heads("num_heads_q", num_heads_q)


def provider_with(device: torch.device, chunk_level: int) -> Provider:
    """The kernels to call, which must have the mode that is asked for."""
    provider = provider_for(device)
    if chunk_level and not provider.batch_invariant:
        fail("batch_invariant", True, f"False: the {provider.name} kernels have no such mode")
    return provider


@lru_cache
def _num_sms(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count
