"""Whose kernels run: ours, DeepSeek's FlashMLA, or PyTorch. `VLLM_FLASHMLA_KERNELS` decides.

`auto` takes native on a Hopper GPU and reference on a CPU. A choice that cannot run is an error,
never another choice: the variable is there to tell a kernel's fault from the integration's.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from functools import lru_cache
from types import ModuleType
from typing import NamedTuple, Protocol

import torch

from . import reference, schedule
from .layout import ceil_div
from .row_tiling import row_tiling

CHOICE_VARIABLE = "VLLM_FLASHMLA_KERNELS"
HOPPER = (9, 0)


class DecodeArguments(NamedTuple):
    """What a provider's `decode` gets, checked by `interface`.

    A ragged batch has its query tokens one after another, in a single entry of the batch: then q_nope is
    (1, tokens, h_q, 512), so are q_pe and out, and lse is (1, h_q, tokens).
    """

    q_nope: torch.Tensor  # (b, s_q, h_q, 512)
    q_pe: torch.Tensor  # (b, s_q, h_q, 64)
    k_cache: torch.Tensor  # (pages, 64, h_kv, 576)
    block_table: torch.Tensor  # (b, max_pages) int32
    cache_seqlens: torch.Tensor  # (b,) int32
    cu_seqlens_q: torch.Tensor | None  # (b + 1,) int32 if ragged: where each sequence's tokens begin
    max_query_len: int  # s_q, or the largest of a ragged batch
    tile_scheduler_metadata: torch.Tensor  # (parts, 8) int32
    out: torch.Tensor  # (b, s_q, h_q, 512), written
    lse: torch.Tensor  # (b, h_q, s_q) float32, written
    softmax_scale: float
    causal: bool
    chunk_level: int = 0  # above 0: batch-invariant, see `chunks`


class Provider(Protocol):
    """A set of kernels: it fills a plan's buffers, and decodes by the plan in them."""

    name: str
    takes_ragged: bool  # queries of different lengths
    batch_invariant: bool  # has a mode that is

    def plan(
        self,
        cache_seqlens: torch.Tensor,  # (b,) int32
        tile_scheduler_metadata: torch.Tensor,  # (parts, 8) int32, written
        num_splits: torch.Tensor,  # (b + 1,) int32, written
        chunk_level: int,
        rows_per_kv_head: int,
    ) -> None: ...

    def decode(self, args: DecodeArguments) -> None: ...


class NativeProvider:
    """This package's CUDA kernels for Hopper."""

    name = "native"
    takes_ragged = True
    batch_invariant = True

    def __init__(self, device: torch.device) -> None:
        _require_hopper(self.name, device)
        from . import ops

        reason = ops.load_error()
        if reason is not None:
            raise ValueError(
                f"{CHOICE_VARIABLE}: got 'native' on {device}, but {reason}; expected a package built where "
                f"nvcc 12.4 or newer is found (set CUDA_HOME and reinstall), or one of the other choices, "
                f"flash_mla and reference"
            )
        self._ops, self._device = ops, device

    def plan(self, cache_seqlens, tile_scheduler_metadata, num_splits, chunk_level, rows_per_kv_head) -> None:
        with torch.cuda.device(self._device):  # launches go to the current device, whatever the tensors' is
            self._ops.plan(cache_seqlens, tile_scheduler_metadata, num_splits, chunk_level, rows_per_kv_head)

    def decode(self, args: DecodeArguments) -> None:
        out_partial, weight_sums = empty_partials(args)
        with torch.cuda.device(self._device):
            self._ops.decode(
                args.q_nope,
                args.q_pe,
                args.k_cache,
                args.block_table,
                args.cache_seqlens,
                args.cu_seqlens_q,
                args.max_query_len,
                args.tile_scheduler_metadata,
                args.out,
                args.lse,
                out_partial,
                weight_sums,
                args.softmax_scale,
                args.causal,
                args.chunk_level,
            )


def empty_partials(args: DecodeArguments) -> tuple[torch.Tensor, torch.Tensor]:
    """Room for the partial results of a call, float32: values and weight_sums, as `ops.decode` takes them.

    How many splits there are is known on the GPU alone, so it is enough for as many as can be.
    """
    parts, (b, max_pages) = args.tile_scheduler_metadata.shape[0], args.block_table.shape
    slots = schedule.partial_slots(b, parts, max_pages, args.chunk_level)
    rows = args.max_query_len * args.out.shape[2]
    if args.chunk_level > 0:  # each tile of a slot by itself, in whole octets of rows
        tiling = row_tiling(args.max_query_len, args.out.shape[2], args.k_cache.shape[2])
        tile_rows = tiling.heads_per_tile * tiling.tokens_per_tile
        slots, rows = slots * tiling.num_row_tiles, ceil_div(tile_rows, 8) * 8
    return args.lse.new_empty(slots, rows, args.out.shape[3]), args.lse.new_empty(slots, rows, 2)


class ReferenceProvider:
    """PyTorch. On a GPU it reads lengths on the host, so it cannot be captured in a CUDA graph."""

    name = "reference"
    takes_ragged = True
    batch_invariant = True

    def __init__(self, device: torch.device) -> None:
        pass

    def plan(self, cache_seqlens, tile_scheduler_metadata, num_splits, chunk_level, rows_per_kv_head) -> None:
        _refuse_capture(cache_seqlens)
        parts = tile_scheduler_metadata.shape[0]
        metadata, splits = schedule.plan(cache_seqlens.tolist(), parts, chunk_level, rows_per_kv_head)
        tile_scheduler_metadata.copy_(metadata)
        num_splits.copy_(splits)

    def decode(self, args: DecodeArguments) -> None:
        _refuse_capture(args.cache_seqlens)
        reference.decode(**args._asdict())


class FlashMLAProvider:
    """DeepSeek's FlashMLA: the package `flash_mla` where installed, else the copy inside vLLM.

    Its newer versions plan within their first decode call, in buffers of their own. So `plan` leaves
    zeros in ours, and every decode has FlashMLA plan anew: one launch more per layer, right under
    CUDA graphs too, and meant for comparing, not for serving.
    """

    name = "flash_mla"
    takes_ragged = False
    batch_invariant = False

    def __init__(self, device: torch.device) -> None:
        _require_hopper(self.name, device)
        self._flash_mla = _import_flash_mla()

    def plan(self, cache_seqlens, tile_scheduler_metadata, num_splits, chunk_level, rows_per_kv_head) -> None:
        tile_scheduler_metadata.zero_()
        num_splits.zero_()

    def decode(self, args: DecodeArguments) -> None:
        if args.cu_seqlens_q is not None:
            raise ValueError(
                f"{CHOICE_VARIABLE}: got 'flash_mla' for queries of different lengths, expected native or "
                f"reference: FlashMLA takes one length for all"
            )
        q = torch.cat([args.q_nope, args.q_pe], dim=-1)  # (b, s_q, h_q, 576)
        num_kv_heads = args.k_cache.shape[2]
        rows_per_kv_head = q.shape[1] * q.shape[2] // num_kv_heads
        # Old versions return (metadata, num_splits) here; new ones ignore the arguments and return
        # (an empty plan, None). Both take the pair back.
        metadata = self._flash_mla.get_mla_metadata(args.cache_seqlens, rows_per_kv_head, num_kv_heads)
        out, lse = self._flash_mla.flash_mla_with_kvcache(
            q,
            args.k_cache,
            args.block_table,
            args.cache_seqlens,
            args.out.shape[-1],
            *metadata,
            softmax_scale=args.softmax_scale,
            causal=args.causal,
        )
        args.out.copy_(out)
        args.lse.copy_(lse)


CHOICES: dict[str, Callable[[torch.device], Provider]] = {
    "native": NativeProvider,
    "flash_mla": FlashMLAProvider,
    "reference": ReferenceProvider,
}


def chosen() -> str:
    """What `VLLM_FLASHMLA_KERNELS` says; empty is unset."""
    return os.environ.get(CHOICE_VARIABLE) or "auto"


def provider_for(device: torch.device) -> Provider:
    """The kernels that run on `device`, as `VLLM_FLASHMLA_KERNELS` says.

    Raises
    ------
    ValueError
        The variable holds no known choice, or its choice cannot run on this device.
    """
    return _provider(chosen(), device)


@lru_cache
def _provider(choice: str, device: torch.device) -> Provider:
    if choice == "auto":
        choice = "reference" if device.type == "cpu" else "native"
    if choice not in CHOICES:
        known = ", ".join(["auto", *CHOICES])
        raise ValueError(f"{CHOICE_VARIABLE}: got {choice!r}, expected one of {known}")
    return CHOICES[choice](device)


def _require_hopper(choice: str, device: torch.device) -> None:
    if device.type != "cuda":
        raise ValueError(
            f"{CHOICE_VARIABLE}: got {choice!r} for tensors on {device}, expected a Hopper GPU; "
            f"on a CPU use auto or reference"
        )
    capability = torch.cuda.get_device_capability(device)
    if capability != HOPPER:
        raise ValueError(
            f"{CHOICE_VARIABLE}: got {choice!r} on {torch.cuda.get_device_name(device)} (compute capability "
            f"{capability[0]}.{capability[1]}), expected a Hopper GPU (9.0); choose another attention "
            f"backend, or {CHOICE_VARIABLE}=reference to run in PyTorch"
        )


def _refuse_capture(tensor: torch.Tensor) -> None:
    if tensor.is_cuda and torch.cuda.is_current_stream_capturing():
        raise ValueError(
            f"{CHOICE_VARIABLE}: got 'reference' under CUDA graph capture, expected eager execution "
            f"(vLLM: --enforce-eager), since it reads the lengths on the host"
        )


def _import_flash_mla() -> ModuleType:
    reasons = []
    for name in ("flash_mla", "vllm.third_party.flashmla.flash_mla_interface"):
        try:
            return importlib.import_module(name)
        except ImportError as error:
            reasons.append(f"{name}: {error}")
    raise ValueError(
        f"{CHOICE_VARIABLE}: got 'flash_mla', but it cannot be imported ({'; '.join(reasons)}); expected "
        f"DeepSeek's package (extra [flash-mla]) or a CUDA build of vLLM"
    )
