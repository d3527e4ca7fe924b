"""Prefix-cached tails: what the last tokens of prompts cost through decode, and what through prefill.

A prompt of which all but a tail is in the prefix cache may go either way, and
`reorder_batch_threshold` of the metadata builder says up to which length it decodes. Decode attends to the
latent cache with all heads; prefill first multiplies the cached context up to keys and values of every
head. What runs in the process is `tails_engine`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from .report import OURS
from .serve import PAGE_TOKENS

LENGTHS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
CACHED = 8192

SHAPES = ((1, 0), (16, 0), (1, 15))
"""Tails in a step, and sequences that decode one token beside them: a call has one plan for all."""

WARM_STEPS = 2

PREFILL, DECODE = "prefill_us", "decode_us"


@dataclass(frozen=True)
class TailsJob:
    """What one process is to measure.

    Attributes
    ----------
    model : directory with a config.json; no weights are read.
    layers, heads : of the model.
    cached : tokens of each prompt that are in the prefix cache; whole pages.
    lengths : of the tails; a row for each and each of `SHAPES`.
    repeat : steps of which the times are taken, by each way.
    """

    engine: ClassVar[str] = "tails_engine"
    backend: ClassVar[str] = OURS

    model: str
    layers: int
    heads: int
    cached: int
    lengths: tuple[int, ...]
    repeat: int

    @property
    def rows(self) -> list[tuple[int, int, int]]:
        """Tails, decodes, length of each row. Beside decodes, a tail of 1 is one of them."""
        return [(*shape, n) for shape in SHAPES for n in self.lengths if n > 1 or not shape[1]]

    @property
    def num_steps(self) -> int:
        """More steps than a row has: what decodes beside the tails must not end before."""
        return 2 * (WARM_STEPS + self.repeat) + 8

    @property
    def num_prompts(self) -> int:
        return max(map(sum, SHAPES))

    @property
    def max_model_len(self) -> int:
        return self.cached + max(self.lengths) + self.num_steps

    @property
    def cache_tokens(self) -> int:
        """Tokens of all prompts, in whole pages: less room, and the prefix cache forgets some."""
        return self.num_prompts * -(-self.max_model_len // PAGE_TOKENS) * PAGE_TOKENS
