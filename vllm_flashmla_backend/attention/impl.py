"""One layer's attention: decode through `flash_mla`, everything else as vLLM does it."""

from __future__ import annotations

from typing import Any

import torch
from vllm.logger import init_logger
from vllm.model_executor.layers.attention.mla_attention import MLACommonImpl
from vllm.platforms import current_platform
from vllm.v1.attention.backend import AttentionLayer
from vllm.v1.kv_cache_interface import is_quantized_kv_cache

from ..flash_mla import flash_mla_decode, flash_mla_decode_varlen
from ..flash_mla.providers import provider_for
from ..flash_mla.schedule import PAGE_SIZE
from . import refusals
from .compat import vllm_flashmla_backend
from .metadata import FlashMLAMetadata

logger = init_logger(f"vllm.{__name__}")  # vLLM configures only loggers below its own name


class FlashMLAImpl(MLACommonImpl[FlashMLAMetadata]):
    """MLA attention of one layer.

    With an FP8 cache, constructing this class gives vLLM's own implementation instead.
    """

    can_return_lse_for_decode: bool = True
    supports_dcp: bool = True

    def __new__(cls, *args: Any, kv_cache_dtype: str, **kwargs: Any):
        if is_quantized_kv_cache(kv_cache_dtype):
            logger.info_once("FLASHMLA: %s cache, left to vLLM's own backend", kv_cache_dtype)
            impl_cls = vllm_flashmla_backend().get_impl_cls()
            return impl_cls(*args, kv_cache_dtype=kv_cache_dtype, **kwargs)
        return super().__new__(cls)

    def __init__(self, **kwargs: Any) -> None:
        refusals.check_layer(kwargs)
        super().__init__(**kwargs)
        device = torch.device(current_platform.device_type)
        kernels = provider_for(device).name
        logger.info_once("FLASHMLA: %s kernels on %s, pages of %d tokens.", kernels, device, PAGE_SIZE)

    def forward_mqa(
        self,
        q: torch.Tensor | tuple[torch.Tensor, torch.Tensor],
        kv_c_and_k_pe_cache: torch.Tensor,
        attn_metadata: FlashMLAMetadata,
        layer: AttentionLayer,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Decode with the step's plan.

        Parameters
        ----------
        q : q_nope (tokens, h_q, 512) and q_pe (tokens, h_q, 64), taken in place with their
            strides; or one tensor (tokens, h_q, 576), as decode context parallelism gathers it.
        kv_c_and_k_pe_cache : (pages, 64, 576).
        attn_metadata : the step's metadata; tokens are those of its decodes, padding included.

        Returns
        -------
        out : (tokens, h_q, 512), in q's dtype.
        lse : (tokens, h_q) float32, natural logarithm.
        """
        if not isinstance(q, tuple):
            q = q.split([self.kv_lora_rank, self.qk_rope_head_dim], dim=-1)
        q_nope, q_pe = q
        decode = attn_metadata.decode
        of_layer = (kv_c_and_k_pe_cache.unsqueeze(2), decode.block_table, decode.seq_lens)
        plan = (decode.tile_scheduler_metadata, decode.num_splits)
        out = q_nope.new_empty(q_nope.shape)  # (tokens, h_q, 512)
        if decode.cu_seqlens_q is None:
            shape = (attn_metadata.num_decodes, decode.query_len)
            _, lse = flash_mla_decode(
                q_nope.unflatten(0, shape),  # (b, s_q, h_q, 512)
                q_pe.unflatten(0, shape),  # (b, s_q, h_q, 64)
                *of_layer,
                *plan,
                softmax_scale=self.scale,
                causal=True,
                out=out.unflatten(0, shape),  # (b, s_q, h_q, 512)
                batch_invariant=decode.batch_invariant,
            )
            return out, lse.transpose(1, 2).flatten(0, 1)  # (b, h_q, s_q) -> (tokens, h_q)
        used = decode.num_query_tokens
        lse = q_nope.new_empty(q_nope.shape[1], q_nope.shape[0], dtype=torch.float32)  # (h_q, tokens)
        # The graph of a captured step may be replayed with fewer query tokens, and more padding.
        padding = 0 if _is_captured(q_nope) else used
        out[padding:].zero_()  # these launch nothing where there is no padding
        lse[:, padding:].fill_(torch.inf)
        flash_mla_decode_varlen(
            q_nope[:used],
            q_pe[:used],
            *of_layer,
            decode.cu_seqlens_q,
            decode.query_len,
            *plan,
            softmax_scale=self.scale,
            causal=True,
            out=out[:used],
            lse=lse[:, :used],
            batch_invariant=decode.batch_invariant,
        )
        return out, lse.T


def _is_captured(tensor: torch.Tensor) -> bool:
    """Whether what is now done with `tensor` goes into a CUDA graph."""
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()
