"""What vLLM leaves to a backend on a CPU: writing the cache, and prefill over cached context.

vLLM's common code does both with CUDA operators.
"""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F

from ..flash_mla.layout import ceil_div
from ..flash_mla.schedule import PAGE_SIZE
from .compat import prefill_context_lens
from .impl import FlashMLAImpl
from .metadata import FlashMLAMetadata


class FlashMLACpuImpl(FlashMLAImpl):
    """`FlashMLAImpl` with the cache update and the prefill in PyTorch."""

    def do_kv_cache_update(
        self,
        kv_c_normed: torch.Tensor,
        k_pe: torch.Tensor,
        kv_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
        kv_cache_dtype: str,
        k_scale: torch.Tensor,
        skip_scale: bool = False,
    ) -> None:
        """Write the step's tokens into their slots.

        Parameters
        ----------
        kv_c_normed : (tokens, 512).
        k_pe : (tokens, 1, 64).
        kv_cache : (pages, 64, 576), written in place; empty while vLLM measures memory.
        slot_mapping : (tokens,) int64, page * 64 + offset; negative marks padding.
        k_scale, skip_scale : of FP8 caches, which a CPU does not have; 0.33 passes both.
        """
        if kv_cache.numel() == 0:
            return
        rows = torch.cat((kv_c_normed, k_pe.squeeze(1)), dim=-1)  # (tokens, 576)
        slots = slot_mapping.flatten()
        used = slots >= 0
        kv_cache.view(-1, self.head_size).index_copy_(0, slots[used], rows[used])

    def forward_mha(
        self,
        q: torch.Tensor,
        kv_c_normed: torch.Tensor,
        k_pe: torch.Tensor,
        kv_c_and_k_pe_cache: torch.Tensor,
        attn_metadata: FlashMLAMetadata,
        k_scale: torch.Tensor,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
    ) -> None:
        """Prefill each request over its whole context in one pass.

        The step's own tokens are in the cache by now, so keys are read from there alone, and
        neither chunks of context nor a merge by LSE are needed.

        Parameters
        ----------
        q : (tokens, h, nope + 64), prefill tokens only.
        kv_c_and_k_pe_cache : (pages, 64, 576).
        output : (tokens, h * v), written in place.
        """
        prefill = attn_metadata.prefill
        output = output.unflatten(-1, (self.num_heads, self.v_head_dim))  # (tokens, h, v)
        bounds = pairwise(prefill.query_start_loc.tolist())
        requests = zip(bounds, prefill_context_lens(prefill), prefill.block_table, strict=True)
        for (start, end), context_len, pages in requests:
            seq_len = context_len + end - start
            used_pages = pages[: ceil_div(seq_len, PAGE_SIZE)]
            latent = kv_c_and_k_pe_cache[used_pages].flatten(0, 1)[:seq_len]  # (k, 576)
            output[start:end] = self._attend(q[start:end], latent)

    def _attend(self, q: torch.Tensor, latent: torch.Tensor) -> torch.Tensor:
        """Causal attention of the last len(q) tokens over all of `latent`.

        q (s, h, nope + 64), latent (k, 576) -> (s, h, v)
        """
        kv_c, k_pe = latent.split([self.kv_lora_rank, self.qk_rope_head_dim], dim=-1)
        kv = self.kv_b_proj(kv_c)[0].unflatten(-1, (self.num_heads, -1))  # (k, h, nope + v)
        k_nope, v = kv.split([self.qk_nope_head_dim, self.v_head_dim], dim=-1)
        k = torch.cat((k_nope, k_pe.unsqueeze(1).expand(-1, self.num_heads, -1)), dim=-1)
        # PyTorch's fast CPU kernel takes one head size only: zeros added to v are cut off below
        v = F.pad(v, (0, max(0, self.qk_head_dim - self.v_head_dim)))
        mask = None
        if len(q) < len(k):  # query i sees keys up to k - s + i
            mask = torch.ones(len(q), len(k), dtype=torch.bool).tril(len(k) - len(q))
        q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))  # (1, h, s or k, d)
        out = F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, scale=self.scale)
        return out[0].transpose(0, 1)[..., : self.v_head_dim]
