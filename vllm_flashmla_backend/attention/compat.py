"""Where the vLLM versions that are served (0.26 to 0.33) differ, and nothing else.

Keyword arguments that only some versions pass to a hook need no entry here: the hooks take
`**kwargs` and hand them on.
"""

from __future__ import annotations

from vllm.model_executor.layers.attention.mla_attention import MLACommonPrefillMetadata
from vllm.utils.import_utils import resolve_obj_by_qualname
from vllm.v1.attention.backend import AttentionBackend
from vllm.v1.attention.backends.registry import AttentionBackendEnum


def vllm_flashmla_backend() -> type[AttentionBackend]:
    """Return vLLM's own FLASHMLA backend, wherever this version keeps it.

    An override leaves the enum's value alone, which is the path of vLLM's class.
    """
    return resolve_obj_by_qualname(AttentionBackendEnum.FLASHMLA.value)


def prefill_context_lens(prefill: MLACommonPrefillMetadata) -> list[int]:
    """Tokens that each prefill already has in the cache, one int per prefill.

    To 0.26 a chunk of context is a row of `seq_lens` (chunks, prefills); later versions keep
    the total per prefill.
    """
    context = prefill.chunked_context
    if context is None:
        return [0] * prefill.block_table.shape[0]
    if hasattr(context, "context_lens_list"):
        return context.context_lens_list
    return context.seq_lens.sum(dim=0).tolist()
