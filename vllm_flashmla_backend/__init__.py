"""vLLM's FLASHMLA attention backend with kernels of its own for Hopper, and PyTorch on a CPU.

vLLM finds the two functions below through entry points and calls them in every process it
starts. They are light: neither imports CUDA nor a compiled extension.
"""

from __future__ import annotations

import re

BACKEND = "vllm_flashmla_backend.attention.backend.FlashMLABackend"
CPU_PLATFORM = "vllm_flashmla_backend.attention.platform.FlashMLACpuPlatform"
TESTED_VLLM = "0.26 to 0.33"
"""The releases of vLLM that this package is tested with, both included."""

LONGEST_DECODED = 128
"""Query tokens of a sequence that are decoded rather than prefilled: measured, see docs/settings.md."""


def register() -> None:
    """Make `--attention-backend FLASHMLA` mean this backend (group `vllm.general_plugins`).

    Calling it again changes nothing. vLLM's own class stays within reach: see
    `attention.compat.vllm_flashmla_backend`. A vLLM outside `TESTED_VLLM` gets one warning.
    """
    import vllm
    from vllm.logger import init_logger
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    register_backend(AttentionBackendEnum.FLASHMLA, BACKEND)
    if not is_tested(vllm.__version__):
        init_logger(f"vllm.{__name__}").warning_once(
            "vllm-flashmla-backend is tested with vLLM %s, and this is vLLM %s: FLASHMLA may fail.",
            TESTED_VLLM,
            vllm.__version__,
        )


def is_tested(vllm_version: str) -> bool:
    """Whether a version of vLLM, such as `0.26.0` or `0.32.1+cpu`, is within `TESTED_VLLM`."""
    oldest, newest = map(_release, TESTED_VLLM.split(" to "))
    return oldest <= _release(vllm_version) <= newest


def _release(version: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", version)[:2]]


def cpu_platform() -> str | None:
    """Name the platform class for vLLM on a CPU (group `vllm.platform_plugins`).

    Returns
    -------
    The dotted name of `FlashMLACpuPlatform` where vLLM would run on a CPU, None elsewhere.
    """
    from vllm.platforms import cpu_platform_plugin

    return CPU_PLATFORM if cpu_platform_plugin() else None
