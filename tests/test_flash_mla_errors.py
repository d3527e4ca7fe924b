"""Bad input: each is a ValueError that names the argument, what came and what was expected."""

from __future__ import annotations

import math

import pytest
import torch
from mla_cases import SCALE, Case, make_inputs, run

from vllm_flashmla_backend.flash_mla import (
    flash_mla_decode,
    flash_mla_decode_varlen,
    flash_mla_with_kvcache,
    get_mla_metadata,
    ops,
)
from vllm_flashmla_backend.flash_mla.planning import plan_into
from vllm_flashmla_backend.flash_mla.providers import CHOICE_VARIABLE, provider_for

CASE = Case((100, 0, 64), s_q=2, h_q=4, h_kv=2)
CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


def good_call(device: torch.device = CPU) -> dict:
    """Arguments of `flash_mla_decode` that it accepts, results included."""
    inputs = make_inputs(CASE, device)
    metadata, num_splits = get_mla_metadata(inputs.cache_seqlens, 4, 2)
    return {
        "q_nope": inputs.q_nope,
        "q_pe": inputs.q_pe,
        "k_cache": inputs.k_cache,
        "block_table": inputs.block_table,
        "cache_seqlens": inputs.cache_seqlens,
        "tile_scheduler_metadata": metadata,
        "num_splits": num_splits,
        "softmax_scale": SCALE,
        "causal": True,
        "out": torch.empty(3, 2, 4, 512, dtype=CASE.dtype, device=device),
        "lse": torch.empty(3, 4, 2, device=device),
    }


def every_other(tensor: torch.Tensor) -> torch.Tensor:
    """The same values, two apart in the last dimension."""
    return tensor.repeat_interleave(2, dim=-1)[..., ::2]


def off_by_a_word(tensor: torch.Tensor) -> torch.Tensor:
    """The same int32 values, 4 bytes past an aligned address."""
    room = torch.empty(tensor.numel() + 1, dtype=torch.int32, device=tensor.device)
    return room[1:].view(tensor.shape).copy_(tensor)


# argument, what is done to it, words of the message
WRONG = [
    ("q_nope", lambda t: t.double(), "got torch.float64, expected one of torch.bfloat16"),
    ("q_nope", lambda t: t[0], r"got shape \(2, 4, 512\), expected a tensor of rank 4"),
    ("q_nope", lambda t: t[..., :500], r"got shape \(3, 2, 4, 500\), expected \(b, s_q, h_q, 512\)"),
    ("q_nope", lambda t: t[:0], r"got shape \(0, 2, 4, 512\)"),
    ("q_nope", lambda t: t.repeat(1, 1, 33, 1), "got 132 query heads, expected 1 to 128"),
    ("q_nope", every_other, "got stride 2 in the last dimension, expected 1"),
    ("q_pe", lambda t: t[..., :32], r"expected \(b, s_q, h_q, 64\)"),
    ("q_pe", lambda t: t[:, :1], r"got shape \(3, 1, 4, 64\), expected \(3, 2, 4, 64\)"),
    ("q_pe", lambda t: t.half(), "got torch.float16, expected torch.bfloat16"),
    ("k_cache", lambda t: t.half(), "got torch.float16, expected torch.bfloat16"),
    ("k_cache", lambda t: t.to("meta"), "got a tensor on meta, expected one on cpu"),
    ("k_cache", lambda t: t[:, :, 0], "expected a tensor of rank 4"),
    ("k_cache", lambda t: t[:, :16], r"got shape \(6, 16, 2, 576\), expected \(pages, 64, h_kv, 576\)"),
    ("k_cache", lambda t: t[..., :512], r"expected \(pages, 64, h_kv, 576\)"),
    ("k_cache", lambda t: t.repeat(1, 1, 2, 1)[:, :, :3], "got 3 KV heads, expected a divisor of q's 4"),
    ("k_cache", every_other, "got stride 2 in the last dimension"),
    ("k_cache", lambda t: t[:1], r"block_table: got page \d at \[\d, \d\], expected 0 to 0"),
    ("block_table", lambda t: t.long(), "got torch.int64, expected torch.int32"),
    ("block_table", lambda t: t[:2], r"got shape \(2, 4\), expected \(3, 4\)"),
    ("block_table", lambda t: t[0], "expected a tensor of rank 2"),
    ("block_table", lambda t: t[:, :1], "got room for 1 pages per sequence, expected at least 2"),
    ("block_table", lambda t: t * 0 - 1, r"got page -1 at \[0, 0\], expected 0 to"),
    ("block_table", every_other, "got stride 2 in the last dimension"),
    ("block_table", lambda t: None, "got NoneType, expected a tensor"),
    ("cache_seqlens", lambda t: t.long(), "got torch.int64, expected torch.int32"),
    ("cache_seqlens", lambda t: t[:2], r"got shape \(2,\), expected \(3,\)"),
    ("cache_seqlens", lambda t: t - 1, r"got -1 at \[1\], expected lengths of 0 or more"),
    ("cache_seqlens", lambda t: t - t // 2, "got a plan for other lengths"),
    ("tile_scheduler_metadata", lambda t: t.long(), "got torch.int64, expected torch.int32"),
    ("tile_scheduler_metadata", lambda t: t[:5], r"got shape \(5, 8\), expected \(16, 8\)"),
    ("tile_scheduler_metadata", lambda t: t.fill_(99), "got a plan for other lengths"),
    ("tile_scheduler_metadata", lambda t: t.fill_(0), "got a plan for other lengths"),
    ("tile_scheduler_metadata", off_by_a_word, "got data at address .* multiple of 32 bytes"),
    ("softmax_scale", lambda x: 0.0, "got 0.0, expected a finite number above 0"),
    ("softmax_scale", lambda x: -x, "expected a finite number above 0"),
    ("softmax_scale", lambda x: math.nan, "got nan, expected a finite number above 0"),
    ("softmax_scale", lambda x: math.inf, "got inf, expected a finite number above 0"),
    ("causal", lambda x: "yes", "got 'yes', expected True or False"),
    ("num_splits", lambda t: t[:3], r"got shape \(3,\), expected \(4,\)"),
    ("num_splits", lambda t: None, "got NoneType, expected a tensor"),
    ("num_splits", lambda t: t * 2, "got a plan for other lengths"),
    ("out", lambda t: t.float(), "got torch.float32, expected torch.bfloat16"),
    ("out", lambda t: t[:, :1], r"got shape \(3, 1, 4, 512\), expected \(3, 2, 4, 512\)"),
    ("out", every_other, "got stride 2 in the last dimension"),
    ("out", lambda t: t[:, :, :1].expand(t.shape), r"got strides \(\d+, \d+, 0, 1\), expected none of 0"),
    ("lse", lambda t: t[:1].expand(t.shape), r"got strides \(0, \d+, 1\), expected none of 0"),
    ("lse", lambda t: t.double(), "got torch.float64, expected torch.float32"),
    ("lse", lambda t: t.transpose(1, 2), r"got shape \(3, 2, 4\), expected \(3, 4, 2\)"),
]


def test_the_call_that_the_rest_spoil_is_right():
    out, _ = flash_mla_decode(**good_call())
    assert not out.isnan().any()


@pytest.mark.parametrize(("argument", "spoil", "message"), WRONG)
def test_wrong_argument_is_named(argument, spoil, message):
    call = good_call()
    call[argument] = spoil(call[argument])
    with pytest.raises(ValueError, match=message) as error:
        flash_mla_decode(**call)
    assert argument in str(error.value)


@pytest.mark.parametrize(
    ("argument", "value", "message"),
    [
        ("q_nope", torch.zeros(2, 2, 4, 512), "expected a tensor of rank 3"),
        ("cu_seqlens_q", torch.tensor([0, 2, 3, 9]), "got torch.int64, expected torch.int32"),
        ("cu_seqlens_q", torch.tensor([0, 2, 4], dtype=torch.int32), r"got shape \(3,\), expected \(4,\)"),
        ("cu_seqlens_q", torch.tensor([0, 2, 1, 6], dtype=torch.int32), "rise from 0 to q's 6 tokens"),
        ("cu_seqlens_q", torch.tensor([0, 2, 4, 5], dtype=torch.int32), "rise from 0 to q's 6 tokens"),
        ("max_query_len", 0, "got 0, expected an int of at least 1"),
        ("max_query_len", 1, "got 1, expected at least 2, which cu_seqlens_q has"),
    ],
)
def test_wrong_argument_of_a_ragged_call_is_named(argument, value, message):
    call = good_call()
    for name in ("q_nope", "q_pe"):
        call[name] = call[name].flatten(0, 1)  # (tokens, h_q, d)
    call |= {"cu_seqlens_q": torch.tensor([0, 2, 4, 6], dtype=torch.int32), "max_query_len": 2}
    call |= {"out": None, "lse": None}
    flash_mla_decode_varlen(**call)
    call[argument] = value
    with pytest.raises(ValueError, match=message) as error:
        flash_mla_decode_varlen(**call)
    assert argument in str(error.value)


@pytest.mark.parametrize(("width", "head_dim_v", "name"), [(512, 512, "q"), (576, 576, "head_dim_v")])
def test_wrong_head_size_is_named_by_flashmlas_entry(width, head_dim_v, name):
    call = good_call()
    q = torch.cat([call["q_nope"], call["q_pe"]], dim=-1)[..., :width]
    plan = (call["tile_scheduler_metadata"], call["num_splits"])
    with pytest.raises(ValueError, match=f"^{name}: got .* expected"):
        flash_mla_with_kvcache(
            q, call["k_cache"], call["block_table"], call["cache_seqlens"], head_dim_v, *plan
        )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.zeros(2), 16, 1), "cache_seqlens: got torch.float32, expected torch.int32"),
        ((torch.zeros(2, 2, dtype=torch.int32), 16, 1), r"cache_seqlens: got shape \(2, 2\)"),
        ((torch.zeros(0, dtype=torch.int32), 16, 1), "cache_seqlens: got no sequences"),
        ((torch.tensor([3, -5], dtype=torch.int32), 16, 1), r"cache_seqlens: got -5 at \[1\]"),
        (
            (torch.zeros(2, dtype=torch.int32, device="meta"), 16, 1),
            "got a tensor on meta, expected one on cpu",
        ),
        ((None, 16, 1), "cache_seqlens: got NoneType"),
        ((torch.zeros(2, dtype=torch.int32), None, 1), "num_q_tokens_per_head_k: got None"),
        ((torch.zeros(2, dtype=torch.int32), 16, 0), "num_heads_k: got 0, expected an int of at least 1"),
    ],
)
def test_wrong_argument_of_the_planner_is_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        get_mla_metadata(*arguments)


def test_more_heads_than_128_are_refused_by_planner_and_decode_alike():
    lengths = torch.tensor([5, 6], dtype=torch.int32)
    get_mla_metadata(lengths, 2 * 128, 1, num_heads_q=128)
    with pytest.raises(ValueError, match="^num_heads_q: got 129 query heads, expected 1 to 128"):
        get_mla_metadata(lengths, 2 * 129, 1, num_heads_q=129)
    q, cache = torch.zeros(2, 1, 129, 576), torch.zeros(2, 64, 1, 576)
    table = torch.tensor([[0], [1]], dtype=torch.int32)
    with pytest.raises(ValueError, match="^q: got 129 query heads, expected 1 to 128"):
        flash_mla_with_kvcache(q, cache, table, lengths, 512, *get_mla_metadata())


def test_plan_buffers_of_another_batch_are_refused():
    lengths = torch.tensor([5, 6], dtype=torch.int32)
    metadata = torch.zeros(16, 8, dtype=torch.int32)
    with pytest.raises(ValueError, match=r"num_splits: got shape \(5,\), expected \(3,\)"):
        plan_into(lengths, metadata, torch.zeros(5, dtype=torch.int32), 16)
    with pytest.raises(ValueError, match=r"tile_scheduler_metadata: got shape \(16, 4\)"):
        plan_into(lengths, metadata[:, :4], torch.zeros(3, dtype=torch.int32), 16)


def test_plan_made_at_the_first_call_is_for_one_shape_and_its_lengths():
    inputs = make_inputs(CASE, CPU)
    plan, _ = get_mla_metadata()
    tensors = (inputs.k_cache, inputs.block_table, inputs.cache_seqlens)
    flash_mla_with_kvcache(inputs.q, *tensors, 512, plan)
    with pytest.raises(ValueError, match=r"made for .* = \(3, 2, 4, 2\)"):
        flash_mla_with_kvcache(inputs.q[:, :1], *tensors, 512, plan)
    with pytest.raises(ValueError, match="num_splits: got a value beside an MLAPlan"):
        flash_mla_with_kvcache(inputs.q, *tensors, 512, plan, plan.num_splits)
    inputs.cache_seqlens[0] = 64
    with pytest.raises(ValueError, match="got a plan for other lengths"):
        flash_mla_with_kvcache(inputs.q, *tensors, 512, plan)


def test_unknown_kernels_are_refused_with_the_choices(monkeypatch):
    monkeypatch.setenv(CHOICE_VARIABLE, "fastest")
    with pytest.raises(ValueError, match="got 'fastest', expected one of auto, native, flash_mla, reference"):
        run(CASE, make_inputs(CASE, CPU))


@pytest.mark.parametrize("kernels", ["native", "flash_mla"])
def test_gpu_kernels_are_refused_on_a_cpu(kernels, monkeypatch):
    monkeypatch.setenv(CHOICE_VARIABLE, kernels)
    with pytest.raises(ValueError, match=f"got '{kernels}' for tensors on cpu, expected a Hopper GPU"):
        provider_for(CPU)


def test_gpu_that_is_not_hopper_is_refused(monkeypatch):
    """Known failure 14: an unsupported GPU is told so at once, and what to do."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100")
    with pytest.raises(ValueError, match=r"NVIDIA A100 \(compute capability 8.0\), expected a Hopper GPU"):
        provider_for(GPU)


def test_build_without_kernels_is_refused_on_a_gpu(monkeypatch, tmp_path):
    """Known failure 14: never a silent fallback."""
    monkeypatch.delenv(CHOICE_VARIABLE, raising=False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(ops, "LIBRARY", tmp_path / "none.so")
    with pytest.raises(ValueError, match="got 'native' on cuda:1, but .* not built.* nvcc 12.4"):
        provider_for(torch.device("cuda", 1))


def test_flash_mla_that_is_not_installed_is_refused(monkeypatch):
    monkeypatch.setenv(CHOICE_VARIABLE, "flash_mla")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))

    def missing(name: str):
        raise ImportError(f"no {name}")

    monkeypatch.setattr("importlib.import_module", missing)
    with pytest.raises(ValueError, match="cannot be imported .*flash_mla.*vllm.third_party"):
        provider_for(torch.device("cuda", 1))


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("argument", "spoil", "message"),
    [
        ("q_nope", lambda t: t.float(), "got torch.float32, expected one of torch.bfloat16, torch.float16"),
        ("k_cache", lambda t: t.cpu(), "got a tensor on cpu, expected one on cuda:0"),
        ("block_table", lambda t: t.cpu(), "got a tensor on cpu, expected one on cuda:0"),
        ("tile_scheduler_metadata", lambda t: t[:-1], r"got shape \(\d+, 8\), expected \(\d+, 8\)"),
        ("q_pe", lambda t: torch.cat([t, t], -1)[..., 4:68], "got data at address .* multiple of 16 bytes"),
        (
            "q_nope",
            lambda t: torch.cat([t, t[..., :4]], -1)[..., :512],
            "multiples of 8 elements: data moves",
        ),
        (
            "k_cache",
            lambda t: torch.cat([t, t[..., :4]], -1)[..., :576],
            "multiples of 8 elements: data moves",
        ),
    ],
)
def test_wrong_argument_on_a_gpu_is_named(argument, spoil, message):
    call = good_call(GPU)
    call[argument] = spoil(call[argument])
    with pytest.raises(ValueError, match=message) as error:
        flash_mla_decode(**call)
    assert argument in str(error.value)
