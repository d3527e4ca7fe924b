"""What FLASHMLA can serve, and the classes that serve it."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from vllm.config.cache import CacheDType
from vllm.model_executor.layers.attention.mla_attention import MLACommonBackend
from vllm.platforms import current_platform
from vllm.platforms.interface import DeviceCapability
from vllm.v1.attention.backend import AttentionType, MultipleOf
from vllm.v1.kv_cache_interface import KVCacheSpec, is_quantized_kv_cache

from ..flash_mla.providers import provider_for
from ..flash_mla.schedule import PAGE_SIZE
from . import refusals
from .compat import SomeVersionsHooks
from .impl import FlashMLAImpl
from .metadata import FlashMLAMetadataBuilder

HEAD_SIZE = 576  # kv_lora_rank 512 + qk_rope_head_dim 64


class FlashMLABackend(SomeVersionsHooks, MLACommonBackend):
    """MLA decode on pages of 64 tokens: our kernels on Hopper, PyTorch on a CPU.

    A device capability of None stands for a CPU in the hooks below.
    """

    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float16, torch.bfloat16]
    supported_kv_cache_dtypes: ClassVar[list[CacheDType]] = [
        "auto",
        "float16",
        "bfloat16",
        "fp8",
        "fp8_e4m3",
    ]

    @staticmethod
    def get_name() -> str:
        return "FLASHMLA"

    @staticmethod
    def get_impl_cls() -> type[FlashMLAImpl]:
        if current_platform.is_cpu():
            from .cpu import FlashMLACpuImpl

            return FlashMLACpuImpl
        return FlashMLAImpl

    @staticmethod
    def get_builder_cls() -> type[FlashMLAMetadataBuilder]:
        return FlashMLAMetadataBuilder

    @classmethod
    def get_supported_head_sizes(cls) -> list[int]:
        return [HEAD_SIZE]

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: KVCacheSpec | None = None) -> list[int | MultipleOf]:
        return [PAGE_SIZE]

    @classmethod
    def supports_dtype(cls, dtype: torch.dtype) -> bool:
        return super().supports_dtype(dtype) or (current_platform.is_cpu() and dtype == torch.float32)

    @classmethod
    def supports_compute_capability(cls, capability: DeviceCapability | None) -> bool:
        return capability is None or capability.major == 9

    @classmethod
    def supports_batch_invariance(cls) -> bool:
        """Whether the kernels have the mode. Why they cannot run at all, `supports_combination` says."""
        try:
            return provider_for(torch.device(current_platform.device_type)).batch_invariant
        except ValueError:
            return True

    @classmethod
    def validate_configuration(
        cls, *, attn_type: str = AttentionType.DECODER, has_sliding_window: bool = False, **layer: Any
    ) -> list[str]:
        """List why vLLM must not choose this backend for a layer; empty if it may.

        Short reasons come from vLLM, as the other hooks answer; the sentences that tell what to do
        come after, from `supports_combination` and from here, which sees what that is not shown.
        """
        reasons = super().validate_configuration(
            attn_type=attn_type, has_sliding_window=has_sliding_window, **layer
        )
        if not layer["use_mla"]:
            return reasons  # one sentence on that is enough
        if attn_type != AttentionType.DECODER:
            reasons.append(refusals.not_a_decoder(attn_type))
        if has_sliding_window:
            reasons.append(refusals.not_served("sliding_window"))
        cache_dtype = layer["kv_cache_dtype"]
        if layer.get("use_batch_invariant") and cache_dtype and is_quantized_kv_cache(cache_dtype):
            reasons.append(refusals.not_batch_invariant(cache_dtype))
        return reasons

    @classmethod
    def supports_combination(
        cls,
        head_size: int,
        dtype: torch.dtype,
        kv_cache_dtype: CacheDType | None,
        block_size: int | None,
        use_mla: bool,
        has_sink: bool,
        use_sparse: bool,
        use_mm_prefix: bool,
        device_capability: DeviceCapability | None,
    ) -> str | None:
        """Say why a configuration is refused, in sentences that tell what to do; None if it is not.

        vLLM lists the answer after the short reasons that the other hooks lead to.
        """
        reasons = []
        if not use_mla:
            reasons.append(refusals.not_mla())
        elif not cls.supports_head_size(head_size):
            reasons.append(
                f"head size must be {HEAD_SIZE} (kv_lora_rank 512 + rope 64), got {head_size}: "
                "leave --attention-backend out"
            )
        if use_sparse:
            reasons.append(refusals.sparse())
        if use_mla and has_sink:
            reasons.append(refusals.not_served("sinks"))
        if not cls.supports_dtype(dtype):
            reasons.append(f"dtype must be bfloat16 or float16 (on a CPU also float32), got {dtype}")
        if not cls.supports_block_size(block_size):
            reasons.append(
                f"--block-size must be a multiple of {PAGE_SIZE} (64, 128, 256), got {block_size}; "
                "leave it out to get 64"
            )
        quantized = kv_cache_dtype is not None and is_quantized_kv_cache(kv_cache_dtype)
        if not cls.supports_compute_capability(device_capability):
            reasons.append(
                "the kernels are built for Hopper GPUs (compute capability 9.0), "
                f"this GPU has {device_capability.as_version_str()}: leave --attention-backend out"
            )
        elif not quantized:
            reasons.extend(_why_no_kernels())
        if quantized and device_capability is None:
            reasons.append(
                f"--kv-cache-dtype {kv_cache_dtype} needs a Hopper GPU, where vLLM's own kernels serve it; "
                "on a CPU use auto"
            )
        elif kv_cache_dtype in ("float16", "bfloat16") and getattr(torch, kv_cache_dtype) != dtype:
            reasons.append(
                f"--kv-cache-dtype must be auto or the model's dtype ({dtype}), got {kv_cache_dtype}"
            )
        return "; ".join(reasons) or None


def _why_no_kernels() -> list[str]:
    """Return the reason why the chosen kernels cannot run here, if there is one."""
    try:
        provider_for(torch.device(current_platform.device_type))
    except ValueError as error:
        return [str(error)]
    return []
