"""Why a layer is refused, in sentences that name what was asked for and what to use instead."""

from __future__ import annotations

from typing import Any

from vllm.platforms import current_platform
from vllm.v1.attention.backend import AttentionType

NOT_SERVED = {
    "sinks": "attention sinks",
    "sliding_window": "a sliding window",
    "alibi_slopes": "ALiBi",
    "logits_soft_cap": "a soft cap on its logits",
    "kv_sharing_target_layer_name": "the KV cache of another layer",
}
"""Arguments of a layer's constructor that must be unset, and what they give the layer."""


def not_mla() -> str:
    return (
        "FLASHMLA serves MLA models only, and this model's attention is not MLA, or VLLM_MLA_DISABLE is on: "
        f"use --attention-backend {_dense_backend()}, or leave the flag out"
    )


def sparse() -> str:
    instead = (
        "on a CPU vLLM has no backend for it"
        if current_platform.is_cpu()
        else "use --attention-backend FLASHMLA_SPARSE, or leave the flag out"
    )
    return f"FLASHMLA attends to every token, and this model's attention is sparse (DSA): {instead}"


def not_a_decoder(attn_type: str) -> str:
    return f"FLASHMLA serves decoder self-attention, and this layer's type is {attn_type!r}: {_without_mla()}"


def not_batch_invariant(cache_dtype: str) -> str:
    return (
        f"--kv-cache-dtype {cache_dtype} is served by vLLM's own FLASHMLA, which is not batch-invariant: "
        "use --kv-cache-dtype auto, or leave VLLM_BATCH_INVARIANT unset"
    )


def not_served(argument: str, value: object = None) -> str:
    """Refuse a feature of `NOT_SERVED`; a `value` is shown where it is at hand."""
    got = "" if value is None else f" ({argument}={value!r})"
    return f"FLASHMLA cannot give a layer {NOT_SERVED[argument]}{got}: {_without_mla()}"


def check_layer(arguments: dict[str, Any]) -> None:
    """Check what vLLM constructs a layer with, for it chooses the backend without knowing all of it.

    Raises
    ------
    ValueError : the layer wants what FLASHMLA does not have; names it, and what to use instead.
    """
    reasons = [not_served(name, arguments[name]) for name in NOT_SERVED if arguments.get(name)]
    if arguments.get("topk_indices_buffer") is not None:
        reasons.append(sparse())
    attn_type = arguments.get("attn_type", AttentionType.DECODER)
    if attn_type != AttentionType.DECODER:
        reasons.append(not_a_decoder(attn_type))
    if reasons:
        raise ValueError("; ".join(reasons))


def _dense_backend() -> str:
    return "CPU_ATTN" if current_platform.is_cpu() else "FLASH_ATTN"


def _without_mla() -> str:
    return f"use --attention-backend {_dense_backend()} with VLLM_MLA_DISABLE=1, which serves it without MLA"
