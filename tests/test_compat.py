"""The hooks that this package overrides or calls are there in vLLM, and fit.

`make test-compat` runs this file against the Python code of each release in `tools/compat.py`;
`make test` against the vLLM that is installed.
"""

from __future__ import annotations

import ast
import inspect
import subprocess
import sys
import textwrap
from types import ModuleType, SimpleNamespace

import pytest
import torch

vllm = pytest.importorskip("vllm")

from vllm.model_executor.layers.attention import mla_attention  # noqa: E402
from vllm.platforms import current_platform  # noqa: E402
from vllm.platforms.interface import DeviceCapability  # noqa: E402
from vllm.v1.attention import selector  # noqa: E402
from vllm.v1.attention.backends.registry import AttentionBackendEnum  # noqa: E402

import vllm_flashmla_backend  # noqa: E402
from vllm_flashmla_backend.attention import compat, cpu, impl, metadata, refusals  # noqa: E402
from vllm_flashmla_backend.attention.backend import FlashMLABackend  # noqa: E402

OVERRIDES = [
    (FlashMLABackend, mla_attention.MLACommonBackend),
    (impl.FlashMLAImpl, mla_attention.MLACommonImpl),
    (cpu.FlashMLACpuImpl, mla_attention.MLACommonImpl),
    (metadata.FlashMLAMetadataBuilder, mla_attention.MLACommonMetadataBuilder),
]
if current_platform.is_cpu():  # elsewhere it has no base class
    from vllm_flashmla_backend.attention.platform import FlashMLACpuPlatform

    OVERRIDES.append((FlashMLACpuPlatform, FlashMLACpuPlatform.__mro__[1]))
OURS_ALONE = {"_attend", "_decodes_prompts", "_use_native_rotary_embedding"}  # no hook of vLLM's


def hooks():
    """Every method of ours that stands in for one of vLLM's."""
    for ours, base in OVERRIDES:
        for name, member in vars(ours).items():
            if inspect.isroutine(member) and name not in OURS_ALONE and not name.startswith("__"):
                yield pytest.param(getattr(ours, name), base, name, id=f"{ours.__name__}.{name}")


@pytest.mark.parametrize("ours, base, name", hooks())
def test_overridden_hooks_exist_and_take_what_vllm_passes(ours, base, name):
    assert hasattr(base, name), f"vLLM {vllm.__version__} has no hook {base.__name__}.{name}"
    taken = inspect.signature(ours).parameters
    passed = inspect.signature(inspect.unwrap(getattr(base, name))).parameters
    if any(p.kind is p.VAR_KEYWORD for p in taken.values()):
        return  # all are passed by name: see the tests of the callers below
    assert list(taken)[: len(passed)] == list(passed)  # by place and by name
    assert all(p.default is not p.empty for p in list(taken.values())[len(passed) :])


@pytest.mark.parametrize("ours, base", OVERRIDES, ids=lambda cls: cls.__name__)
def test_nothing_abstract_is_left(ours, base):
    assert not getattr(ours, "__abstractmethods__", None)


def keywords_of_call(function, called: str) -> set[str]:
    """Names that `function` passes to `called`; fails where it passes anything by place."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    calls = [n for n in ast.walk(tree) if isinstance(n, ast.Call) and ast.unparse(n.func) == called]
    assert len(calls) == 1, f"{function.__qualname__} calls {called} {len(calls)} times"
    assert not calls[0].args
    return {keyword.arg for keyword in calls[0].keywords} - {None}


def test_vllm_constructs_a_layer_by_name_with_what_we_refuse_and_hand_on():
    passed = keywords_of_call(mla_attention.MLAAttention.__init__, "impl_cls")
    assert "kv_cache_dtype" in passed  # tells our implementation from vLLM's own
    assert {"attn_type", *refusals.NOT_SERVED} - {"sinks"} <= passed
    assert passed <= set(inspect.signature(mla_attention.MLACommonImpl.__init__).parameters)


def test_vllm_builds_the_decode_slice_by_name_with_the_tokens_we_plan_by():
    passed = keywords_of_call(mla_attention.MLACommonMetadataBuilder.build, "self._build_decode")
    assert "num_decode_tokens" in passed


def test_vllm_constructs_our_builder_and_ours_vllms(monkeypatch):
    from vllm.v1.kv_cache_interface import MLAAttentionSpec
    from vllm.v1.worker.utils import AttentionGroup

    def common_init(self, *args, **kwargs):
        inspect.signature(original).bind(self, *args, **kwargs)
        self.num_heads, self.dcp_world_size, self.device = 16, 1, torch.device("cpu")

    original = mla_attention.MLACommonMetadataBuilder.__init__
    monkeypatch.setattr(mla_attention.MLACommonMetadataBuilder, "__init__", common_init)
    spec = MLAAttentionSpec(
        block_size=128, num_kv_heads=1, head_size=576, dtype=torch.bfloat16, cache_dtype_str="auto"
    )
    group = AttentionGroup(FlashMLABackend, ["layer"], spec, 0)
    config = SimpleNamespace(
        scheduler_config=SimpleNamespace(max_num_seqs=4),
        model_config=SimpleNamespace(max_model_len=1024),
        parallel_config=SimpleNamespace(
            decode_context_parallel_size=1, prefill_context_parallel_size=1, use_ubatching=False
        ),
    )
    group.create_metadata_builders(config, torch.device("cpu"), kernel_block_size=64)
    assert type(group.get_metadata_builder()) is metadata.FlashMLAMetadataBuilder


def test_decode_metadata_is_vllms_with_the_plan_and_the_queries_added():
    fields = mla_attention.MLACommonDecodeMetadata.__dataclass_fields__
    ours = list(metadata.FlashMLADecodeMetadata.__dataclass_fields__)
    plan, queries = (
        ["tile_scheduler_metadata", "num_splits"],
        ["query_len", "cu_seqlens_q", "num_query_tokens", "batch_invariant"],
    )
    assert ours == [*fields, *plan, *queries]


def test_cache_layout_is_what_vllms_own_class_says():
    vllm_flashmla_backend.register()
    own, sizes = (
        compat.vllm_flashmla_backend(),
        dict(num_blocks=7, block_size=64, num_kv_heads=1, head_size=576),
    )
    questions = {
        "get_kv_cache_shape": [sizes],
        "get_kv_cache_stride_order": [dict(include_num_layers_dimension=each) for each in (False, True)],
        "indexes_kv_by_block_stride": [{}],
        "supported_kv_cache_layouts": [{}],
        "get_required_kv_cache_layout": [{}],
        "get_supported_kernel_block_sizes": [{}],
        "supports_dcp": [{}],
        "supports_pcp": [{}],
    }
    asked = [(hook, question) for hook in questions if hasattr(own, hook) for question in questions[hook]]
    assert asked
    for hook, question in asked:
        assert getattr(FlashMLABackend, hook)(**question) == getattr(own, hook)(**question), hook


class ChunkedContext(SimpleNamespace):
    """The fields that `compat.prefill_context_lens` reads, under the names of either vLLM."""


def test_context_lengths_are_found_under_this_versions_name():
    fields = mla_attention.MLACommonPrefillMetadata.ChunkedContextMetadata.__dataclass_fields__
    if "context_lens_list" in fields:
        context = ChunkedContext(context_lens_list=[70, 5])
    else:
        assert "seq_lens" in fields
        context = ChunkedContext(seq_lens=torch.tensor([[64, 5], [6, 0]]))
    prefill = SimpleNamespace(block_table=torch.zeros(2, 3), chunked_context=context)
    assert compat.prefill_context_lens(prefill) == [70, 5]
    prefill.chunked_context = None
    assert compat.prefill_context_lens(prefill) == [0, 0]


def test_vllm_reads_both_entry_point_groups(monkeypatch):
    from vllm import plugins

    monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    general = plugins.load_plugins_by_group(plugins.DEFAULT_PLUGINS_GROUP)
    assert general["flashmla"] is vllm_flashmla_backend.register
    of_platforms = plugins.load_plugins_by_group(plugins.PLATFORM_PLUGINS_GROUP)
    assert of_platforms["flashmla_cpu"] is vllm_flashmla_backend.cpu_platform


@pytest.fixture
def hopper(monkeypatch):
    """vLLM's CUDA platform, which chooses the backend on a GPU, told that there is a Hopper."""
    if not torch.cuda.is_available():  # its compiled operators are not needed to choose a backend
        for extension in ("vllm._C", "vllm._C_stable_libtorch"):
            monkeypatch.setitem(sys.modules, extension, ModuleType(extension))
    from vllm.platforms import cuda

    class Hopper(cuda.CudaPlatformBase):
        @classmethod
        def get_device_capability(cls, device_id: int = 0) -> DeviceCapability:
            return DeviceCapability(9, 0)

    monkeypatch.setenv("VLLM_FLASHMLA_KERNELS", "reference")  # runs wherever this test does
    vllm_flashmla_backend.register()
    return Hopper


MLA_LAYER = selector.AttentionSelectorConfig(576, torch.bfloat16, "auto", None, use_mla=True)


@pytest.mark.parametrize(
    "changes", [{}, dict(block_size=128), dict(kv_cache_dtype="fp8"), dict(use_pcp=True)]
)
def test_the_cuda_platform_chooses_us_for_flashmla(hopper, changes):
    chosen = hopper.get_attn_backend_cls(AttentionBackendEnum.FLASHMLA, MLA_LAYER._replace(**changes), 16)
    assert chosen == vllm_flashmla_backend.BACKEND


@pytest.mark.parametrize(
    "changes, reason",
    [
        (dict(use_mla=False, head_size=128), "this model's attention is not MLA.*backend (FLASH|CPU)_ATTN"),
        (dict(use_sparse=True), r"this model's attention is sparse \(DSA\)"),
        (dict(has_sink=True), "cannot give a layer attention sinks: .*VLLM_MLA_DISABLE=1"),
        (dict(has_sliding_window=True), "cannot give a layer a sliding window: .*VLLM_MLA_DISABLE=1"),
        (dict(attn_type="encoder_only"), "this layer's type is 'encoder_only': .*VLLM_MLA_DISABLE=1"),
    ],
)
def test_the_cuda_platform_shows_our_reasons(hopper, changes, reason):
    with pytest.raises(ValueError, match=f"(?s)FLASHMLA is not valid.*{reason}"):
        hopper.get_attn_backend_cls(AttentionBackendEnum.FLASHMLA, MLA_LAYER._replace(**changes), 16)


@pytest.mark.parametrize(
    "version, tested",
    [("0.25.1", False), ("0.26.0", True), ("0.33.4+cu130", True), ("0.34.0rc1", False), ("1.0", False)],
)
def test_versions_within_the_range_are_tested(version, tested):
    assert vllm_flashmla_backend.is_tested(version) is tested


@pytest.mark.parametrize("version, warnings", [("0.33.9", 0), ("0.34.0", 1)])
def test_an_untested_vllm_is_warned_of_once_with_the_range(version, warnings):
    code = (
        f"import vllm, vllm_flashmla_backend as plugin; vllm.__version__ = '{version}'\n"
        "plugin.register(); plugin.register()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    said = done.stdout + done.stderr
    assert said.count(f"is tested with vLLM 0.26 to 0.33, and this is vLLM {version}") == warnings
