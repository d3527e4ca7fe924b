"""The builder: one plan per step, made from the decode slice, into buffers that live on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
import vllm.envs as envs
from vllm.config import VllmConfig
from vllm.model_executor.layers.attention.mla_attention import (
    MLACommonDecodeMetadata,
    MLACommonMetadata,
    MLACommonMetadataBuilder,
    QueryLenSupport,
)
from vllm.v1.attention.backend import AttentionCGSupport, CommonAttentionMetadata
from vllm.v1.kv_cache_interface import AttentionSpec, is_quantized_kv_cache

from .. import LONGEST_DECODED
from ..flash_mla.checks import check_heads
from ..flash_mla.layout import TILE_ROWS
from ..flash_mla.planning import num_parts, plan_into
from ..flash_mla.providers import provider_for
from ..flash_mla.schedule import METADATA_WIDTH, chunk_level, num_pages
from . import long_queries
from .compat import vllm_flashmla_backend

MOST_DECODED_ROWS = 4096
"""Query tokens × heads of a sequence that are decoded, of up to LONGEST_DECODED tokens: from 64 heads on each
token works through its context by itself, and a step of many whole prompts of 100 tokens should be prefilled
faster; that is an estimate."""


@dataclass
class FlashMLADecodeMetadata(MLACommonDecodeMetadata):
    """What every layer needs to decode: the tables, and the step's plan over them.

    Where long queries are cut, sequences are runs (`long_queries`), in vLLM's own fields, too.
    """

    tile_scheduler_metadata: torch.Tensor  # (parts, 8) int32
    num_splits: torch.Tensor  # (sequences + 1,) int32
    query_len: int  # of every sequence, or no sequence has a longer one
    cu_seqlens_q: torch.Tensor | None  # (sequences + 1,) int32 where query lengths differ
    num_query_tokens: int  # before any padding
    batch_invariant: bool


@dataclass
class FlashMLAMetadata(MLACommonMetadata[FlashMLADecodeMetadata]):
    """Metadata of one step, shared by all layers."""


class FlashMLAMetadataBuilder(MLACommonMetadataBuilder[FlashMLAMetadata]):
    """Builds the metadata of a step and plans its decode slice, once for all layers.

    The plan is written into the same two buffers every step that a full CUDA graph may have been captured of:
    the graph reads their addresses, and finds the plan of the step that it is replayed in.

    With an FP8 cache, constructing this class gives vLLM's own builder instead.
    """

    _cudagraph_support: ClassVar[AttentionCGSupport] = AttentionCGSupport.UNIFORM_BATCH
    query_len_support: ClassVar[QueryLenSupport] = QueryLenSupport.VARLEN
    reorder_batch_threshold: int = 1

    @classmethod
    def get_cudagraph_support(
        cls, vllm_config: VllmConfig, kv_cache_spec: AttentionSpec
    ) -> AttentionCGSupport:
        """Tell of which decodes vLLM may capture full graphs.

        Under decode context parallelism vLLM prefills every query of more than one token, drafts too;
        capturing a graph of such decodes would end in an assertion.
        """
        if vllm_config.parallel_config.decode_context_parallel_size > 1:
            return AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE
        return super().get_cudagraph_support(vllm_config, kv_cache_spec)

    def __new__(cls, kv_cache_spec: AttentionSpec, *args: Any, **kwargs: Any):
        if is_quantized_kv_cache(kv_cache_spec.cache_dtype_str):
            return vllm_flashmla_backend().get_builder_cls()(kv_cache_spec, *args, **kwargs)
        return super().__new__(cls)

    def __init__(
        self,
        kv_cache_spec: AttentionSpec,
        layer_names: list[str],
        vllm_config: VllmConfig,
        device: torch.device,
    ) -> None:
        takes_ragged = provider_for(device).takes_ragged
        if not takes_ragged:
            self.query_len_support = QueryLenSupport.UNIFORM  # vLLM prefills what it cannot decode so
        super().__init__(kv_cache_spec, layer_names, vllm_config, device, FlashMLAMetadata)
        # decode context parallelism gathers the heads of its ranks before the kernel runs
        self.num_query_heads = self.num_heads * self.dcp_world_size
        check_heads("num_attention_heads", self.num_query_heads)
        # vLLM has set the threshold to the tokens of a decode with its drafts, which full graphs are of
        self.run_len = max(self.reorder_batch_threshold, TILE_ROWS // self.num_query_heads)
        if takes_ragged and self._decodes_prompts(vllm_config):
            longest = min(LONGEST_DECODED, MOST_DECODED_ROWS // self.num_query_heads)
            self.reorder_batch_threshold = max(self.reorder_batch_threshold, longest)
        self.batch_invariant = bool(envs.VLLM_BATCH_INVARIANT)
        # There a sequence's neighbours must not decide what decodes it: every step is planned for the longest
        # query that there may be.
        self.least_query_len = self.reorder_batch_threshold if self.batch_invariant else 1
        # one query token a sequence takes the most parts: more rows need more blocks per part
        max_parts = num_parts(device, 1, self.num_query_heads, 1)
        max_num_seqs = vllm_config.scheduler_config.max_num_seqs
        self.tile_scheduler_metadata = torch.zeros(
            max_parts, METADATA_WIDTH, dtype=torch.int32, device=device
        )
        self.num_splits = torch.zeros(max_num_seqs + 1, dtype=torch.int32, device=device)

    def _decodes_prompts(self, vllm_config: VllmConfig) -> bool:
        """Whether prompts, or their tails, may be decoded where they are short.

        Not under context parallelism, which decodes single tokens; nor batch-invariant, as a prompt's way
        then depends on what stands before it in the batch; nor where a step is divided into microbatches, for
        vLLM 0.32 there takes for readers of another request's new blocks only what is prefilled.
        """
        invariant, microbatches = envs.VLLM_BATCH_INVARIANT, vllm_config.parallel_config.use_ubatching
        return self.dcp_world_size == 1 and not invariant and not microbatches

    def build_for_cudagraph_capture(self, common_attn_metadata: CommonAttentionMetadata) -> FlashMLAMetadata:
        """Build what a full graph is captured with.

        Raises ValueError for queries that are cut, since that plan has no place of its own.
        """
        if common_attn_metadata.max_query_len > self.run_len:
            raise ValueError(
                f"FLASHMLA: full CUDA graphs are of queries of up to {self.run_len} tokens, "
                f"got {common_attn_metadata.max_query_len}"
            )
        return super().build_for_cudagraph_capture(common_attn_metadata)

    def _build_decode(self, **kwargs: Any) -> FlashMLADecodeMetadata:
        decode = super()._build_decode(**kwargs)
        batch = decode.seq_lens.shape[0]
        query_lens = np.diff(kwargs["query_start_loc_cpu"].numpy())  # (num_decodes,)
        num_query_tokens = int(query_lens.sum())
        max_query_len = max(self.least_query_len, int(query_lens.max()))
        if self.dcp_world_size > 1 and max_query_len > 1:
            # seq_lens are this rank's share: of what an earlier query token may see they say nothing
            raise ValueError(
                "FLASHMLA decodes one query token per sequence under decode context parallelism, "
                f"got {max_query_len}"
            )
        if max_query_len > self.run_len:
            runs = long_queries.cut(query_lens, self.run_len)
            block_table = decode.block_table[:, : num_pages(kwargs["max_seq_len"])]
            decode.block_table, decode.seq_lens, cu_seqlens_q = runs.apply(block_table, decode.seq_lens)
            # no full graph has such a step, so its plan need not stay where it is
            max_query_len, num_splits = self.run_len, torch.empty_like(cu_seqlens_q)
        else:
            # The rows that pad a captured graph's batch come last: no query token here, but room in q.
            num_queries = num_query_tokens // max_query_len
            is_uniform = (
                kwargs["num_decode_tokens"] == batch * max_query_len
                and num_query_tokens == num_queries * max_query_len == query_lens[:num_queries].sum()
            )
            cu_seqlens_q = None if is_uniform else kwargs["query_start_loc_device"]
            num_splits = self.num_splits[: batch + 1]
        rows = max_query_len * self.num_query_heads
        parts = num_parts(self.device, max_query_len, self.num_query_heads, 1)
        tile_scheduler_metadata = self.tile_scheduler_metadata[:parts]
        level = chunk_level(rows, self.batch_invariant)
        plan_into(decode.seq_lens, tile_scheduler_metadata, num_splits, rows, level)
        return FlashMLADecodeMetadata(
            **vars(decode),
            tile_scheduler_metadata=tile_scheduler_metadata,
            num_splits=num_splits,
            query_len=max_query_len,
            cu_seqlens_q=cu_seqlens_q,
            num_query_tokens=num_query_tokens,
            batch_invariant=self.batch_invariant,
        )
