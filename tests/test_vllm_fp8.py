"""With an FP8 cache FLASHMLA is vLLM's own, whether this plugin is on or off."""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import pytest

pytest.importorskip("vllm")

from vllm import RequestOutput  # noqa: E402
from vllm.model_executor.layers.attention.mla_attention import MLAAttention  # noqa: E402
from vllm_engines import engine, generate, largest_difference, random_prompts  # noqa: E402

pytestmark = pytest.mark.gpu

LENGTHS, TURNS, TOKENS = [65, 130, 300, 700, 1200, 90], 3, 24
K_SCALES, Q_SCALE = (0.03, 0.07), 0.5  # of the two layers; the model's numbers fit e4m3 in these units


def fp8_turns(plugins: str) -> tuple[set[tuple[str, str]], list[list[RequestOutput]]]:
    """What serves the layers, and several turns of six conversations.

    Run in a process of its own, since vLLM loads plugins once.
    """
    options = dict(kv_cache_dtype="fp8", max_num_batched_tokens=512)
    with engine("FLASHMLA", {"VLLM_PLUGINS": plugins}, **options) as llm:
        layers = llm.llm_engine.vllm_config.compilation_config.static_forward_context.values()
        layers = [layer for layer in layers if isinstance(layer, MLAAttention)]
        for layer, k_scale in zip(layers, K_SCALES, strict=True):  # captured graphs read these, too
            layer._k_scale.fill_(k_scale)
            layer._q_scale.fill_(Q_SCALE)
            layer._k_scale_float, layer._q_scale_float = k_scale, Q_SCALE
        served_by = {(layer.attn_backend.__module__, type(layer.impl).__module__) for layer in layers}
        prompts, turns = random_prompts(llm, LENGTHS), []
        for turn in range(TURNS):
            turns.append(generate(llm, prompts, max_tokens=TOKENS))
            said = [list(output.outputs[0].token_ids) for output in turns[-1]]
            more = random_prompts(llm, [30 + turn] * len(LENGTHS))
            prompts = [
                {"prompt_token_ids": before["prompt_token_ids"] + answer + after["prompt_token_ids"]}
                for before, answer, after in zip(prompts, said, more, strict=True)
            ]
    return served_by, turns


def test_fp8_cache_gives_the_logprobs_of_vllms_own_flashmla():
    """Known failure 5: scales other than 1, several turns, prefix hits, conversations side by side."""
    with ProcessPoolExecutor(2, get_context("spawn")) as processes:
        (on, ours), (off, theirs) = processes.map(fp8_turns, ["flashmla", ""])
    ((vllms_backend, vllms_impl),) = off
    assert vllms_backend.startswith("vllm.") and vllms_impl == vllms_backend
    assert on == {("vllm_flashmla_backend.attention.backend", vllms_impl)}
    for turn, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        for output in a + b if turn else []:
            assert output.num_cached_tokens >= 64, "the turn before was not found in the cache"
        assert [x.outputs[0].token_ids for x in a] == [x.outputs[0].token_ids for x in b]
        assert largest_difference(a, b) < 1e-3  # the same kernels on the same numbers
