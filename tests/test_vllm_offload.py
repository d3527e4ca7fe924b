"""KV offloading: blocks leave the GPU, come back, and are read right from a cache that is strided."""

from __future__ import annotations

import pytest

vllm = pytest.importorskip("vllm")

from vllm.model_executor.layers.attention.mla_attention import MLAAttention  # noqa: E402
from vllm_engines import engine  # noqa: E402

from vllm_flashmla_backend import recall  # noqa: E402
from vllm_flashmla_backend.flash_mla.schedule import PAGE_SIZE  # noqa: E402

pytestmark = pytest.mark.gpu

GPU_TOKENS = 6400  # room for three of the prompts
PROMPTS = recall.make_prompts(seed=91, count=24, min_tokens=1800, max_tokens=2000)


def ask(llm) -> tuple[int, int]:
    """How many answers are right, and how many tokens of the prompts were not computed."""
    greedy = vllm.SamplingParams(temperature=0, max_tokens=recall.ANSWER_TOKENS)
    outputs = llm.generate([prompt.text for prompt in PROMPTS], greedy, use_tqdm=False)
    answers = zip(PROMPTS, outputs, strict=True)
    right = sum(recall.is_right(prompt, output.outputs[0].text) for prompt, output in answers)
    return right, sum(output.num_cached_tokens for output in outputs)


@pytest.mark.parametrize("block_size", [64, 128])
def test_blocks_that_come_back_are_read_right(block_size):
    """Known failure 10: for its connector vLLM lays a page's layers side by side, so pages are strided."""
    options = dict(block_size=block_size, num_gpu_blocks_override=GPU_TOKENS // block_size)
    with engine("FLASHMLA", kv_offloading_size=1, max_num_batched_tokens=4096, **options) as llm:  # GiB
        layers = llm.llm_engine.vllm_config.compilation_config.static_forward_context.values()
        caches = [layer.kv_cache for layer in layers if isinstance(layer, MLAAttention)]
        page = PAGE_SIZE * 576
        assert {cache.stride() for cache in caches} == {(len(caches) * page, 576, 1)}
        assert {cache.data_ptr() - caches[0].data_ptr() for cache in caches} == {0, 2 * page}  # bytes
        assert ask(llm)[0] == len(PROMPTS)
        right, cached = ask(llm)
    tokens = sum(prompt.num_tokens for prompt in PROMPTS)
    assert tokens > 7 * GPU_TOKENS
    assert cached > tokens / 2, "blocks were not loaded back"
    assert right == len(PROMPTS)
