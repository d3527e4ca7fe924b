"""FlashMLA's decode interface: multi-head latent attention over a paged cache. Needs torch, not vLLM."""

from .interface import flash_mla_decode, flash_mla_decode_varlen, flash_mla_with_kvcache
from .planning import MLAPlan, get_mla_metadata

__all__ = [
    "MLAPlan",
    "flash_mla_decode",
    "flash_mla_decode_varlen",
    "flash_mla_with_kvcache",
    "get_mla_metadata",
]
