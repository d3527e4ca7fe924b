"""Long queries among a step's decodes: cut into runs of tokens, which are planned like sequences.

Left whole, a query of 100 tokens would make room for 100 tokens' rows in every sequence of the step: thread
blocks that for most sequences find nothing to do, and few parts for all pages. Cut, all have about as many
rows, and the plan shares out their pages evenly. Runs of one query read the same pages.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from ..flash_mla.layout import ceil_div


@dataclass(frozen=True)
class Runs:
    """Queries cut into runs of at most so many tokens, in order; a query without tokens is one run."""

    sequence: np.ndarray  # (runs,) the sequence that each is of
    begin: np.ndarray  # (runs + 1,) each one's first token, among all sequences' tokens
    keys_after: np.ndarray  # (runs,) how many of the sequence's last keys no token of it may see

    def apply(
        self, block_table: torch.Tensor, seq_lens: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Make the runs' own of the sequences' `block_table` (b, max_pages) and `seq_lens` (b,), int32.

        Returns block table (runs, max_pages), lengths (runs,) and first query tokens (runs + 1,), int32.
        Nothing waits for the GPU.
        """
        runs, device = len(self.sequence), seq_lens.device
        packed = torch.from_numpy(
            np.concatenate([self.sequence, self.keys_after, self.begin]).astype(np.int32)
        )
        if device.type == "cuda":
            packed = packed.pin_memory().to(device, non_blocking=True)
        sequence, keys_after, begin = packed.split([runs, runs, runs + 1])
        return block_table[sequence], seq_lens[sequence] - keys_after, begin


def cut(query_lens: np.ndarray, longest: int) -> Runs:
    """Cut queries of `query_lens` (b,) tokens into runs of at most `longest`."""
    counts = np.maximum(1, ceil_div(query_lens, longest))  # (b,)
    sequence = np.repeat(np.arange(len(query_lens)), counts)
    number = np.arange(len(sequence)) - np.repeat(np.cumsum(counts) - counts, counts)
    of_query = query_lens[sequence]
    end = np.minimum((number + 1) * longest, of_query)  # within its query
    lens = end - number * longest
    return Runs(sequence, np.concatenate([[0], np.cumsum(lens)]), of_query - end)
