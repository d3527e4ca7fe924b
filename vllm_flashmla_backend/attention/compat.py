"""Where the vLLM versions that are served (0.26 to 0.33) differ, and nothing else.

Keyword arguments that only some versions pass to a hook need no entry here: the hooks take
`**kwargs` and hand them on, or give the argument a default.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm.utils.import_utils import resolve_obj_by_qualname
from vllm.v1.attention.backends.registry import AttentionBackendEnum

if TYPE_CHECKING:
    from vllm.model_executor.layers.attention.mla_attention import MLACommonPrefillMetadata
    from vllm.v1.attention.backend import AttentionBackend


class SomeVersionsHooks:
    """Hooks of a backend class that only some versions of vLLM ask for."""

    @classmethod
    def supports_device_cpu_query_lens_mismatch(cls) -> bool:
        """Whether query lengths on the device may be less than on the host; asked from 0.30 on.

        No: the plan and the kernels' grid take the largest one from the host.
        """
        return False

    @staticmethod
    def get_kv_cache_stride_order(include_num_layers_dimension: bool = False) -> tuple[int, ...]:
        """Order of the cache's dimensions in memory, of (layers,) pages, tokens, numbers.

        Up to 0.28 MLA's common answer keeps layers apart; this one lets vLLM put a page's layers side
        by side for KV connectors, and pad pages, as its own FLASHMLA does: the kernels read the
        cache by its strides. Later versions allow that to every backend without asking.
        """
        return (1, 0, 2, 3) if include_num_layers_dimension else (0, 1, 2)


def vllm_flashmla_backend() -> type[AttentionBackend]:
    """Return vLLM's own FLASHMLA backend, wherever this version keeps it.

    An override leaves the enum's value alone, which is the path of vLLM's class.
    """
    return resolve_obj_by_qualname(AttentionBackendEnum.FLASHMLA.value)


def has_mla_on_cpu() -> bool:
    """Whether this vLLM runs MLA models on a CPU at all; before 0.28 it does not."""
    return "CPU_MLA" in AttentionBackendEnum.__members__


def prefill_context_lens(prefill: MLACommonPrefillMetadata) -> list[int]:
    """Tokens that each prefill already has in the cache, one int per prefill.

    Up to 0.27 a chunk of context is a row of `seq_lens` (chunks, prefills); later versions keep
    the total per prefill.
    """
    context = prefill.chunked_context
    if context is None:
        return [0] * prefill.block_table.shape[0]
    if hasattr(context, "context_lens_list"):
        return context.context_lens_list
    return context.seq_lens.sum(dim=0).tolist()
