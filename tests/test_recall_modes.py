"""The recall model's answers in every mode that vLLM serves it in: at least 99 % right."""

from __future__ import annotations

import pytest
import torch

from vllm_flashmla_backend import recall

pytest.importorskip("vllm")

from vllm_engines import NO_MULTICAST, count_right, engine, in_a_process  # noqa: E402

pytestmark = [pytest.mark.gpu, pytest.mark.slow]

COUNT = 512

IN_PIECES = {"mode": 3, "backend": "eager"}
TWO_RANKS = dict(tensor_parallel_size=2, environment=NO_MULTICAST)
MODES: dict[str, dict] = {
    "eager": dict(enforce_eager=True),
    "FULL_DECODE_ONLY": {},
    "PIECEWISE": dict(compilation_config=IN_PIECES | {"cudagraph_mode": "PIECEWISE"}),
    "FULL_AND_PIECEWISE": dict(compilation_config=IN_PIECES | {"cudagraph_mode": "FULL_AND_PIECEWISE"}),
    "small steps": dict(max_num_batched_tokens=256),
    "small cache": dict(num_gpu_blocks_override=250),  # room for 5 prompts
    "blocks of 256": dict(block_size=256),
    "ngram": dict(
        speculative_config=dict(
            method="ngram", num_speculative_tokens=4, prompt_lookup_max=2, prompt_lookup_min=1
        )
    ),
    "offloading": dict(kv_offloading_size=1, num_gpu_blocks_override=250),  # GiB
    "fp8": dict(kv_cache_dtype="fp8"),
    "batch-invariant": dict(environment={"VLLM_BATCH_INVARIANT": "1"}),
    "tensor parallel": TWO_RANKS,
    "context parallel": TWO_RANKS | dict(decode_context_parallel_size=2, cp_kv_cache_interleave_size=64),
}


def right_of(options: dict) -> int:
    """How many answers of an engine are right."""
    with engine("FLASHMLA", **dict(max_model_len=4352) | options) as llm:
        return count_right(llm, recall.make_prompts(48, COUNT, 2000, 4000))  # as test_recall_accuracy.py


@pytest.mark.parametrize("mode", MODES)
def test_answers_are_right_in_every_mode(mode, monkeypatch):
    options = dict(MODES[mode])
    if options.get("tensor_parallel_size", 1) > torch.cuda.device_count():
        pytest.skip("needs two GPUs, and there is one")
    for name, value in options.pop("environment", {}).items():
        monkeypatch.setenv(name, value)  # before that process imports vLLM
    assert in_a_process(right_of, options) >= 0.99 * COUNT
