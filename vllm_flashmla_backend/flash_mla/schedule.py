"""The split-KV plan: which part of the machine decodes which pages of which sequence.

This module is the specification. `csrc/schedule/plan.cu` computes the same bytes on the GPU, where
every sequence and every part finds its own place by sums and divisions, and none waits for another;
for the batch-invariant mode `plan_chunks.cu` does.

A *part* is one resident worker (a thread block on the GPU). Its share of the plan is one run
of pages in batch order: it may finish a sequence begun by the part before it, decode whole
sequences, and begin a sequence that the next part goes on with. A part's piece of one sequence
is a *split*; a sequence decoded in one split needs no merge. How sequences are laid out over the parts
is up to `layout`, in the batch-invariant mode to `chunk_layout`. That has slots of its own, too: where a
part has all of a sequence, it keeps the sum of its chunks at the slot of its own number; behind these lie
`most_chunks` slots for each sequence that is cut, in batch order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

import torch

from .chunk_layout import lay_out_chunks
from .chunks import most_chunks
from .layout import TILE_ROWS, ceil_div, is_few, lay_out

PAGE_SIZE = 64
"""Tokens in a page of the KV cache."""

CPU_PARTS = 16
"""Parts planned for where there is no GPU; more of them exercise the merge, fewer run faster."""


class Field(IntEnum):
    """Columns of a row of `tile_scheduler_metadata`: a part's work."""

    FIRST_SEQ = 0  # batch index of the first split; the batch size marks an idle part, its other columns 0
    FIRST_PAGE = 1  # page of FIRST_SEQ the part starts at
    LAST_SEQ = 2  # batch index of the last split, inclusive
    LAST_PAGE_END = 3  # page of LAST_SEQ the part stops before
    FIRST_SPLIT = 4  # the first split's number within FIRST_SEQ
    FIRST_SPLITS = 5  # how many splits FIRST_SEQ has; -2 where the first one hands over: see chunk_layout
    LAST_SPLITS = 6  # how many splits LAST_SEQ has, likewise
    FIRST_SLOT = 7  # slot of the first split's partial result: the part + FIRST_SEQ's cut predecessors


METADATA_WIDTH = 8
"""int32 words in a row of `tile_scheduler_metadata` (FlashMLA's width)."""


@dataclass(frozen=True)
class Split:
    """One part's piece of one sequence: pages [page_begin, page_end) of sequence `seq`.

    It is number `split` of the sequence's `splits`. Where these are several, its partial result is
    kept at `slot`: no two splits have the same, and those of a sequence are consecutive.
    """

    part: int
    seq: int
    page_begin: int
    page_end: int
    split: int
    splits: int
    slot: int


def num_parts(num_sms: int, num_row_tiles: int) -> int:
    """Parts to plan for: as many as fill the machine, and always at least one.

    Every part is run by a thread block for each of the `row_tiling`'s tiles, each on a streaming
    multiprocessor of its own. Blocks that do not fit the machine at once are launched after the others.
    """
    return max(1, num_sms // num_row_tiles)


def chunk_level(rows_per_kv_head: int, batch_invariant: bool) -> int:
    """How long chunks are, see `chunks`: 0 in the default mode, which has none; in the batch-invariant one 1
    for few rows, with which storing and merging one is cheap, else 2.

    The rows are those of the longest query that there may be, not of the longest in a batch.
    """
    if not batch_invariant:
        return 0
    return 1 if is_few(rows_per_kv_head) else 2


def partial_slots(batch: int, parts: int, max_pages: int, chunk_level: int) -> int:
    """Room for partial results that is enough for any lengths.

    Part p's split of sequence i has slot p + r, r being the sequences before i that have several
    splits. Each of these begins in a part of its own, and none of them in the last one, so there are at most
    min(batch, parts - 1). A single part splits nothing. In the batch-invariant mode each part has a slot for
    the sums of sequences that it has all of, and each sequence with several splits, of up to `max_pages`, one
    for each chunk.
    """
    if chunk_level > 0:
        return parts + min(batch, parts - 1) * most_chunks(max_pages, chunk_level)
    return parts - 1 + min(batch, parts - 1)


def num_pages(length: int) -> int:
    """Pages of a sequence of `length` tokens; a negative length counts as none."""
    return max(0, ceil_div(length, PAGE_SIZE))


def plan(
    cache_seqlens: Sequence[int], parts: int, chunk_level: int = 0, rows_per_kv_head: int = TILE_ROWS
) -> tuple[torch.Tensor, torch.Tensor]:
    """Plan one decode step on the host.

    Parameters
    ----------
    cache_seqlens : tokens in the cache for each sequence, in all less than 2^31 pages; 0 is allowed,
        and less counts as 0.
    parts : what `num_parts` returned.
    chunk_level : above 0, sequences are cut between chunks only: see `chunks`.
    rows_per_kv_head : query rows that share a KV head, `s_q * h_q // h_kv`.

    Returns
    -------
    tile_scheduler_metadata : (parts, 8) int32, columns as in `Field`.
    num_splits : (b + 1) int32, running total of splits; sequence i has
        `num_splits[i + 1] - num_splits[i]` of them, at least one.
    """
    pages = [num_pages(length) for length in cache_seqlens]
    if chunk_level > 0:
        layout = lay_out_chunks(pages, parts, chunk_level, rows_per_kv_head)
    else:
        layout = lay_out(pages, parts, rows_per_kv_head)

    rows = [[len(pages)] + [0] * (METADATA_WIDTH - 1) for _ in range(parts)]
    num_splits, cut = [0], 0  # cut: sequences so far that have several splits
    for seq, (first, last) in enumerate(zip(layout.first_part, layout.last_part, strict=True)):
        splits = last - first + 1
        shown = -splits if seq in layout.handed_over else splits
        for part in range(first, last + 1):
            row = rows[part]
            if row[Field.FIRST_SEQ] == len(pages):
                row[Field.FIRST_SEQ], row[Field.FIRST_PAGE] = seq, layout.page_at(seq, part)
                row[Field.FIRST_SPLIT], row[Field.FIRST_SPLITS] = part - first, shown
                row[Field.FIRST_SLOT] = part + cut
            row[Field.LAST_SEQ], row[Field.LAST_PAGE_END] = seq, layout.page_at(seq, part + 1)
            row[Field.LAST_SPLITS] = shown
        num_splits.append(num_splits[-1] + splits)
        cut += splits > 1
    return torch.tensor(rows, dtype=torch.int32), torch.tensor(num_splits, dtype=torch.int32)


def splits_of(metadata: torch.Tensor, cache_seqlens: Sequence[int]) -> list[Split]:
    """Spell a plan out as splits, by part and by sequence."""
    found = []
    for part, row in enumerate(metadata.tolist()):
        first, last = row[Field.FIRST_SEQ], row[Field.LAST_SEQ]
        if first >= len(cache_seqlens):
            continue
        # Only the first and the last may be cut; if both are, their slots are neighbours.
        splits = {last: abs(row[Field.LAST_SPLITS]), first: abs(row[Field.FIRST_SPLITS])}
        last_slot = row[Field.FIRST_SLOT] + (splits[first] > 1)
        for seq in range(first, last + 1):
            found.append(
                Split(
                    part=part,
                    seq=seq,
                    page_begin=row[Field.FIRST_PAGE] if seq == first else 0,
                    page_end=row[Field.LAST_PAGE_END] if seq == last else num_pages(cache_seqlens[seq]),
                    split=row[Field.FIRST_SPLIT] if seq == first else 0,
                    splits=splits.get(seq, 1),
                    slot=row[Field.FIRST_SLOT] if seq == first else last_slot,
                )
            )
    return found
