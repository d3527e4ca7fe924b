"""vLLM's FLASHMLA attention backend with kernels of its own for Hopper, and PyTorch on a CPU.

vLLM finds the two functions below through entry points and calls them in every process it
starts. They are light: neither imports CUDA nor a compiled extension.
"""

from __future__ import annotations

BACKEND = "vllm_flashmla_backend.attention.backend.FlashMLABackend"
CPU_PLATFORM = "vllm_flashmla_backend.attention.platform.FlashMLACpuPlatform"


def register() -> None:
    """Make `--attention-backend FLASHMLA` mean this backend (group `vllm.general_plugins`).

    Calling it again changes nothing. vLLM's own class stays within reach: see
    `attention.compat.vllm_flashmla_backend`.
    """
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    register_backend(AttentionBackendEnum.FLASHMLA, BACKEND)


def cpu_platform() -> str | None:
    """Name the platform class for vLLM on a CPU (group `vllm.platform_plugins`).

    Returns
    -------
    The dotted name of `FlashMLACpuPlatform` where vLLM would run on a CPU, None elsewhere.
    """
    from vllm.platforms import cpu_platform_plugin

    return CPU_PLATFORM if cpu_platform_plugin() else None
