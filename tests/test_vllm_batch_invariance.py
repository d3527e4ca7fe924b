"""VLLM_BATCH_INVARIANT through vLLM: a request's logprobs do not depend on what else is served."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

vllm = pytest.importorskip("vllm")

from vllm.platforms.interface import DeviceCapability  # noqa: E402
from vllm_engines import ASKED  # noqa: E402

from vllm_flashmla_backend.attention.backend import FlashMLABackend  # noqa: E402
from vllm_flashmla_backend.flash_mla.providers import ReferenceProvider  # noqa: E402

LAYER = ASKED | dict(
    use_per_head_quant_scales=False, device_capability=DeviceCapability(9, 0), attn_type="decoder"
)


def test_the_backend_says_whether_its_kernels_have_the_mode(monkeypatch):
    monkeypatch.setenv("VLLM_FLASHMLA_KERNELS", "reference")
    assert FlashMLABackend.supports_batch_invariance()
    monkeypatch.setattr(ReferenceProvider, "batch_invariant", False)
    assert not FlashMLABackend.supports_batch_invariance()


def test_kernels_that_cannot_run_are_a_reason_and_no_error_while_vllm_looks_for_a_backend(monkeypatch):
    monkeypatch.setenv("VLLM_FLASHMLA_KERNELS", "nobody's")
    reasons = FlashMLABackend.validate_configuration(**LAYER, use_batch_invariant=True)
    assert any('VLLM_FLASHMLA_KERNELS: got "nobody\'s"' in reason for reason in reasons)


def test_an_fp8_cache_is_refused_for_vllms_own_kernels_have_no_such_mode(monkeypatch):
    monkeypatch.setenv("VLLM_FLASHMLA_KERNELS", "reference")
    fp8 = LAYER | {"kv_cache_dtype": "fp8"}
    assert FlashMLABackend.validate_configuration(**fp8) == []
    (reason,) = FlashMLABackend.validate_configuration(**fp8, use_batch_invariant=True)
    assert "--kv-cache-dtype fp8" in reason and "use --kv-cache-dtype auto" in reason


@pytest.mark.gpu
def test_a_request_alone_has_the_logprobs_that_it_has_among_63_others():
    """Prompts of 2,000 to 4,000 tokens, 16 decode steps, CUDA graphs; bit for bit."""
    script = Path(__file__).with_name("batch_invariant_answers.py")
    environment = os.environ | {"VLLM_BATCH_INVARIANT": "1"}
    command = [sys.executable, str(script)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-4000:]
    answers = json.loads(done.stdout.splitlines()[-1])
    assert all(len(steps) == 16 for steps in answers["alone"])
    assert answers["in_chunks"] == [True], "a builder that plans in chunks"
    assert answers["alone"] == answers["together"]
