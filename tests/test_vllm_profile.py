"""What a decode step has the GPU do: one plan, a decode kernel for each layer, and nothing in between."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

pytest.importorskip("vllm")

from vllm.model_executor.layers.attention.mla_attention import MLAAttention  # noqa: E402
from vllm_engines import engine, generate, random_prompts  # noqa: E402

from vllm_flashmla_backend.attention.metadata import FlashMLAMetadataBuilder  # noqa: E402

pytestmark = pytest.mark.gpu

LENGTHS, TOKENS = [65, 700, 1300], 9


@pytest.fixture(scope="module")
def llm(request):
    """With CUDA graphs, or eager."""
    with (
        pytest.MonkeyPatch.context() as patch,
        engine("FLASHMLA", max_num_batched_tokens=4096, enforce_eager=request.param == "eager") as llm,
    ):
        patch.setenv("TEARDOWN_CUPTI", "0")  # CUPTI that is set up anew fails among CUDA graphs
        yield llm


def on_the_gpu(call: Callable[[], object]) -> list[str]:
    """Names of the kernels, copies and fills that the GPU runs in `call`, in order."""
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as watched:
        call()
        torch.cuda.synchronize()
    events = [event for event in watched.events() if event.device_type == DeviceType.CUDA]
    assert events, "the profiler saw nothing on the GPU"
    return [event.name for event in sorted(events, key=lambda event: event.time_range.start)]


def is_ours(name: str, kernel: str) -> bool:
    return "mla::" in name and kernel in name  # between them the compiler's name of an unnamed namespace


def count(names: list[str], kernel: str) -> int:
    return sum(is_ours(name, kernel) for name in names)


@pytest.mark.parametrize("llm", ["eager", "graphs"], indirect=True)
def test_a_decode_step_plans_once_and_decodes_once_a_layer(llm, monkeypatch):
    """Known failure 12: metadata planned per layer."""
    build, steps = FlashMLAMetadataBuilder.build, []

    def watched_build(self, *args, **kwargs):
        steps.append(build(self, *args, **kwargs))
        return steps[-1]

    monkeypatch.setattr(FlashMLAMetadataBuilder, "build", watched_build)
    prompts = random_prompts(llm, LENGTHS)
    names = on_the_gpu(lambda: generate(llm, prompts, max_tokens=TOKENS))
    decoding = sum(step.num_decodes > 0 for step in steps)
    # All decode together, and once more if a prompt's last token, all else cached, passes for a decode.
    assert TOKENS - 1 <= decoding <= TOKENS
    layers = llm.llm_engine.model_config.get_num_layers(llm.llm_engine.vllm_config.parallel_config)
    assert layers > 1
    assert count(names, "plan_kernel") == decoding
    assert count(names, "decode_kernel") == layers * decoding


@pytest.mark.parametrize("llm", ["eager"], indirect=True)
def test_nothing_is_copied_or_filled_around_a_layers_decode(llm, monkeypatch):
    """Known failure 12. A layer's attention is two matrix products, and the decode kernel between them."""
    forward, calls = MLAAttention.forward_impl, []

    def watched_forward(self, q, kv_c_normed, k_pe, kv_cache, attn_metadata, *args, **kwargs):
        arguments = (self, q, kv_c_normed, k_pe, kv_cache, attn_metadata, *args)
        if attn_metadata.num_prefills or len(calls) >= 2:  # profiling each step would take long
            return forward(*arguments, **kwargs)
        results = []
        calls.append(on_the_gpu(lambda: results.append(forward(*arguments, **kwargs))))
        return results[0]

    prompts = random_prompts(llm, LENGTHS)
    generate(llm, prompts, max_tokens=4)  # cuBLAS sets itself up here
    monkeypatch.setattr(MLAAttention, "forward_impl", watched_forward)
    generate(llm, prompts, max_tokens=4)
    assert len(calls) == 2
    for names in calls:
        assert count(names, "decode_kernel") == 1, names
        assert not is_ours(names[0], "decode_kernel") and not is_ours(names[-1], "decode_kernel"), names
        # PyTorch's own kernels: cat, fill, copy; a matrix product's are cuBLAS's
        assert not [name for name in names if "at::native" in name or name.startswith("Mem")], names
