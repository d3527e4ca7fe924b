"""The builder and one layer without an engine: what a step's metadata says, and a decode by it."""

from __future__ import annotations

import inspect
from types import SimpleNamespace

import pytest
import torch

vllm = pytest.importorskip("vllm")

from vllm.model_executor.layers.attention import mla_attention  # noqa: E402

from vllm_flashmla_backend.attention import impl, metadata  # noqa: E402
from vllm_flashmla_backend.flash_mla.schedule import chunk_level  # noqa: E402


def make_builder(monkeypatch, dcp_world_size: int = 1, heads: int = 16, microbatches: bool = False):
    """A builder, and what it asked `num_parts` for."""

    def common_init(self, kv_cache_spec, layer_names, vllm_config, device, metadata_cls):
        self.num_heads, self.dcp_world_size, self.device = heads, dcp_world_size, device

    asked = []
    monkeypatch.setattr(mla_attention.MLACommonMetadataBuilder, "__init__", common_init)
    monkeypatch.setattr(metadata, "num_parts", lambda *shape: asked.append(shape[1:]) or 8)
    config = SimpleNamespace(
        scheduler_config=SimpleNamespace(max_num_seqs=4),
        parallel_config=SimpleNamespace(use_ubatching=microbatches),
    )
    spec, device = SimpleNamespace(cache_dtype_str="auto"), torch.device("cpu")
    return metadata.FlashMLAMetadataBuilder(spec, ["layer"], config, device), asked


def build_decode(builder, query_begin: list[int], num_decode_tokens: int, seq_lens=(5, 70)):
    return builder._build_decode(
        block_table_tensor=torch.tensor([[1, 2, -1], [3, 4, -1]], dtype=torch.int32),
        seq_lens_device=torch.tensor(seq_lens, dtype=torch.int32),
        max_seq_len=70,
        query_start_loc_cpu=torch.tensor(query_begin),
        query_start_loc_device=torch.tensor(query_begin),
        num_decode_tokens=num_decode_tokens,
        dcp_tot_seq_lens_device=None,
        **({"max_query_len": 3} if "max_query_len" in _build_decode_parameters() else {}),
    )


def test_the_plan_counts_the_heads_that_context_parallelism_gathers(monkeypatch):
    builder, asked = make_builder(monkeypatch, dcp_world_size=4)
    planned_with = []
    plan_into = metadata.plan_into
    monkeypatch.setattr(metadata, "plan_into", lambda *args: planned_with.append(args[3]) or plan_into(*args))
    decode = build_decode(builder, [0, 1, 2], 2)
    assert asked == [(1, 16 * 4, 1)] * 2
    assert planned_with == [16 * 4]
    assert decode.num_splits.tolist()[0] == 0 and len(decode.num_splits) == 3


def test_more_heads_than_a_call_may_have_are_refused_at_start(monkeypatch):
    make_builder(monkeypatch, dcp_world_size=8)
    with pytest.raises(ValueError, match="num_attention_heads: got 144 query heads, expected 1 to 128"):
        make_builder(monkeypatch, dcp_world_size=9)


@pytest.mark.parametrize("invariant", [True, False])
def test_a_step_is_planned_in_chunks_where_batch_invariance_is_asked_for(invariant, monkeypatch):
    monkeypatch.setattr(metadata.envs, "VLLM_BATCH_INVARIANT", invariant, raising=False)
    planned_with = []
    monkeypatch.setattr(metadata, "plan_into", lambda *arguments: planned_with.append(arguments[3:]))
    builder, _ = make_builder(monkeypatch)
    assert build_decode(builder, [0, 1, 2], 2).batch_invariant == invariant
    assert planned_with == [(16, chunk_level(16, invariant))]


@pytest.mark.parametrize("query_begin", [[0, 1, 2], [0, 3, 4], [0, 3, 6]])
def test_a_batch_invariant_step_is_planned_for_the_longest_query_that_there_may_be(query_begin, monkeypatch):
    """With drafts. Else a neighbour's drafts would choose the kernel, and with that a request's bits."""
    monkeypatch.setattr(metadata.envs, "VLLM_BATCH_INVARIANT", True, raising=False)
    monkeypatch.setattr(metadata.FlashMLAMetadataBuilder, "reorder_batch_threshold", 3)
    planned_with = []
    monkeypatch.setattr(metadata, "plan_into", lambda *arguments: planned_with.append(arguments[3:]))
    builder, _ = make_builder(monkeypatch)
    decode = build_decode(builder, query_begin, query_begin[-1])
    assert decode.query_len == 3 and (decode.cu_seqlens_q is None) == (query_begin == [0, 3, 6])
    assert planned_with == [(3 * 16, chunk_level(3 * 16, True))]


def test_padding_of_a_captured_ragged_step_is_zero_however_much_a_replay_has(monkeypatch):
    """Its graph's query tokens may be fewer than at the capture."""
    monkeypatch.setattr(metadata.envs, "VLLM_BATCH_INVARIANT", True, raising=False)
    monkeypatch.setattr(metadata.FlashMLAMetadataBuilder, "reorder_batch_threshold", 3)
    decode = build_decode(make_builder(monkeypatch)[0], [0, 1, 2], 2)
    assert decode.num_query_tokens == 2
    monkeypatch.setattr(impl, "_is_captured", lambda tensor: True)

    def decode_of_a_replay(*tensors, out, lse, **options):  # of one query token
        out[:1], lse[:, :1] = 1.0, 2.0

    monkeypatch.setattr(impl, "flash_mla_decode_varlen", decode_of_a_replay)
    new_empty = torch.Tensor.new_empty
    poisoned = lambda *arguments, **of: new_empty(*arguments, **of).fill_(torch.nan)  # noqa: E731
    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned)
    layer = SimpleNamespace(kv_lora_rank=512, qk_rope_head_dim=64, scale=0.04)
    step = SimpleNamespace(decode=decode, num_decodes=2)
    q, cache = torch.randn(2, 16, 576), torch.randn(5, 64, 576)
    out, lse = impl.FlashMLAImpl.forward_mqa(layer, q, cache, step, None)
    assert (out[0] == 1).all() and (lse[0] == 2).all()
    assert (out[1] == 0).all() and (lse[1] == torch.inf).all()


def test_a_rank_of_context_parallelism_refuses_queries_whose_causal_limits_it_cannot_know(monkeypatch):
    """Known failures 4, 8: a rank has every N-th token, so lengths minus query tokens say nothing."""
    builder, _ = make_builder(monkeypatch, dcp_world_size=2)
    with pytest.raises(ValueError, match="one query token per sequence under decode context .* got 3"):
        build_decode(builder, [0, 3, 6], 6)


def test_a_long_query_is_planned_as_runs_that_fill_a_tile(monkeypatch):
    """9 tokens of 16 heads and one: runs of 4, 4, 1 and 1 tokens, each of which sees its own last key."""
    builder, asked = make_builder(monkeypatch)
    decode = build_decode(builder, [0, 9, 10], 10, seq_lens=[70, 5])
    assert decode.seq_lens.tolist() == [65, 69, 70, 5]
    assert decode.cu_seqlens_q.tolist() == [0, 4, 8, 9, 10]
    assert decode.block_table.tolist() == [[1, 2], [1, 2], [1, 2], [3, 4]]
    assert (decode.query_len, decode.num_query_tokens) == (4, 10)
    assert asked[-1] == (4, 16, 1) and len(decode.num_splits) == 5


@pytest.mark.parametrize("heads, tokens", [(16, 128), (20, 128), (32, 128), (64, 64), (128, 32)])
def test_short_prompts_are_decoded_up_to_so_many_query_tokens_and_rows(heads, tokens, monkeypatch):
    builder, _ = make_builder(monkeypatch, heads=heads)
    assert builder.reorder_batch_threshold == tokens


@pytest.mark.parametrize("where", [dict(dcp_world_size=2), dict(microbatches=True), "batch-invariant"])
def test_prompts_are_prefilled_where_something_depends_on_the_way(where, monkeypatch):
    """Known failure 8: context parallelism decodes single tokens. Batch invariance: neighbours in the batch
    may decide whether a short prompt is decoded."""
    monkeypatch.setattr(metadata.envs, "VLLM_BATCH_INVARIANT", where == "batch-invariant", raising=False)
    builder, _ = make_builder(monkeypatch, **where if isinstance(where, dict) else {})
    assert builder.reorder_batch_threshold == 1


def test_no_full_graph_is_captured_of_queries_that_are_cut(monkeypatch):
    """Its plan would not be where later steps write theirs."""
    builder, _ = make_builder(monkeypatch)
    with pytest.raises(ValueError, match="full CUDA graphs are of queries of up to 4 tokens, got 5"):
        builder.build_for_cudagraph_capture(SimpleNamespace(max_query_len=5))


@pytest.mark.parametrize("ranks, support", [(1, "UNIFORM_BATCH"), (2, "UNIFORM_SINGLE_TOKEN_DECODE")])
def test_context_parallelism_captures_graphs_of_the_queries_that_it_decodes(ranks, support):
    """vLLM asserts while it captures graphs of drafts that context parallelism prefills."""
    config = SimpleNamespace(parallel_config=SimpleNamespace(decode_context_parallel_size=ranks))
    spec = SimpleNamespace(cache_dtype_str="auto")
    assert metadata.FlashMLAMetadataBuilder.get_cudagraph_support(config, spec).name == support


@pytest.mark.parametrize("takes_ragged", [True, False])
def test_kernels_that_take_no_ragged_queries_are_given_none(takes_ragged, monkeypatch):
    monkeypatch.setattr(metadata, "provider_for", lambda device: SimpleNamespace(takes_ragged=takes_ragged))
    builder, _ = make_builder(monkeypatch)
    assert builder.query_len_support is (
        metadata.QueryLenSupport.VARLEN if takes_ragged else metadata.QueryLenSupport.UNIFORM
    )


@pytest.mark.parametrize(
    ("query_begin", "tokens", "query_len", "is_ragged"),
    [
        ([0, 3, 6], 6, 3, False),
        ([0, 1, 1], 2, 1, False),  # a captured graph's padding: a row of q, but no query
        ([0, 3, 4], 4, 3, True),
        ([0, 3, 4], 6, 3, True),  # and padding behind them
        ([0, 0, 2], 2, 2, True),
        ([0, 0, 2], 4, 2, True),  # as many tokens as if uniform, but not where they would be
    ],
)
def test_the_builder_tells_ragged_queries_from_padded_ones(
    query_begin, tokens, query_len, is_ragged, monkeypatch
):
    decode = build_decode(make_builder(monkeypatch)[0], query_begin, tokens)
    assert decode.query_len == query_len
    assert (decode.cu_seqlens_q is not None) == is_ragged
    assert decode.num_query_tokens == query_begin[-1]


def _build_decode_parameters():
    return inspect.signature(mla_attention.MLACommonMetadataBuilder._build_decode).parameters


def make_layer_and_step(lengths: list[int], block_table: list[list[int]], *queries):
    """A layer without weights, and a planned step of decodes; `queries`: three fields of the metadata."""
    layer = object.__new__(impl.FlashMLAImpl)
    layer.kv_lora_rank, layer.qk_rope_head_dim, layer.scale = 512, 64, 576**-0.5
    seq_lens, table = (torch.tensor(values, dtype=torch.int32) for values in (lengths, block_table))
    buffers = torch.zeros(16, 8, dtype=torch.int32), torch.zeros(len(lengths) + 1, dtype=torch.int32)
    metadata.plan_into(seq_lens, *buffers, 4)
    decode = metadata.FlashMLADecodeMetadata(table, seq_lens, None, *buffers, *queries, False)
    return layer, SimpleNamespace(decode=decode, num_decodes=len(lengths))


def test_decode_takes_q_in_one_tensor_too_and_returns_lse_by_token():
    """Decode context parallelism gathers q as one tensor, and reduces out and lse by token."""
    torch.manual_seed(0)
    layer, step = make_layer_and_step([100, 7, 0], [[1, 2], [3, -1], [-1, -1]], 2, None, 6)
    q, cache = torch.randn(6, 4, 576), torch.randn(4, 64, 576)
    out, lse = layer.forward_mqa(q, cache, step, None)
    split_out, split_lse = layer.forward_mqa(q.split([512, 64], dim=-1), cache, step, None)
    assert out.shape == (6, 4, 512) and lse.shape == (6, 4)
    assert torch.equal(out, split_out) and torch.equal(lse, split_lse)
    last = (q[1] @ cache[[1, 2]].flatten(0, 1)[:100].T * layer.scale).logsumexp(-1)  # sees all 100 keys
    torch.testing.assert_close(lse[1], last)
    assert not out[4:].any() and lse[4:].isposinf().all()  # an empty shard


def test_sequences_with_different_query_lengths_decode_together():
    """Known failure 4: drafts of different lengths, one sequence without any, and padding at the end."""
    torch.manual_seed(0)
    begins = torch.tensor([0, 3, 3, 4], dtype=torch.int32)
    layer, step = make_layer_and_step([100, 7, 70], [[1, 2], [3, -1], [4, 5]], 3, begins, 4)
    q, cache = torch.randn(6, 4, 576), torch.randn(6, 64, 576)
    out, lse = layer.forward_mqa(q, cache, step, None)
    assert out.shape == (6, 4, 512) and lse.shape == (6, 4)
    for token, pages, keys in ((0, [1, 2], 98), (2, [1, 2], 100), (3, [4, 5], 70)):
        k = cache[pages].flatten(0, 1)[:keys]
        scores = q[token] @ k.T * layer.scale
        torch.testing.assert_close(out[token], scores.softmax(-1) @ k[:, :512])
        torch.testing.assert_close(lse[token], scores.logsumexp(-1))
    assert not out[4:].any() and lse[4:].isposinf().all()
