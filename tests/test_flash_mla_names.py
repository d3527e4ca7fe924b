"""Calls written against FlashMLA: its names are taken, and what is not served here is refused by name."""

from __future__ import annotations

import pytest
import torch
from mla_cases import SCALE, Case, make_inputs

from vllm_flashmla_backend.flash_mla import flash_mla_with_kvcache, get_mla_metadata

CASE = Case((100, 0, 64), s_q=2, h_q=4, h_kv=2)
CPU = torch.device("cpu")


def call_as_flash_mla(plan_words: dict, words: dict) -> tuple[torch.Tensor, torch.Tensor]:
    """FlashMLA's two functions, called with further arguments by its names."""
    inputs = make_inputs(CASE, CPU)
    plan = get_mla_metadata(
        cache_seqlens=inputs.cache_seqlens, num_q_tokens_per_head_k=4, num_heads_k=2, **plan_words
    )
    tensors = (inputs.q, inputs.k_cache, inputs.block_table, inputs.cache_seqlens)
    return flash_mla_with_kvcache(*tensors, 512, *plan, SCALE, CASE.causal, **words)


def test_flashmlas_arguments_for_what_is_not_served_may_be_left_unset_by_name():
    unset = call_as_flash_mla(
        {"num_heads_q": 4, "is_fp8_kvcache": False, "topk": None}, {"is_fp8_kvcache": False, "indices": None}
    )
    for found, wanted in zip(unset, call_as_flash_mla({}, {}), strict=True):
        assert torch.equal(found, wanted)


FP8 = "^is_fp8_kvcache: got True, expected False: an FP8 cache is not served here, but by .* FLASHMLA$"
SPARSE = "expected None: sparse attention is not served here, but by .* FLASHMLA_SPARSE$"


@pytest.mark.parametrize(
    ("plan_words", "words", "message"),
    [
        ({"is_fp8_kvcache": True}, {}, FP8),
        ({}, {"is_fp8_kvcache": True}, FP8),
        ({"topk": 2048}, {}, f"^topk: got int, {SPARSE}"),
        ({}, {"indices": torch.zeros(3, 2, 64, dtype=torch.int32)}, f"^indices: got Tensor, {SPARSE}"),
    ],
)
def test_fp8_and_sparse_attention_are_refused_with_what_serves_them(plan_words, words, message):
    with pytest.raises(ValueError, match=message):
        call_as_flash_mla(plan_words, words)
