"""The split-KV plan: which part of the machine decodes which pages of which sequence.

This module is the specification. `csrc/schedule/plan.cu` computes the same bytes on the GPU.

A *part* is one resident worker (a thread block on the GPU). Its share of the plan is one run
of pages in batch order: it may finish a sequence begun by the part before it, decode whole
sequences, and begin a sequence that the next part goes on with. A part's piece of one sequence
is a *split*; a sequence decoded in one split needs no merge.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

import torch

PAGE_SIZE = 64
"""Tokens in a page of the KV cache."""

TILE_ROWS = 64
"""Query rows (query tokens × heads that share a KV head) one part works on: wgmma's M."""

START_COST = 3
"""What starting a split costs, in pages: loading q, filling the pipeline, storing the result."""

CPU_PARTS = 16
"""Parts planned for where there is no GPU; more of them exercise the merge, fewer run faster."""


class Field(IntEnum):
    """Columns of a row of `tile_scheduler_metadata`: a part's work, and an entry of the merge list."""

    FIRST_SEQ = 0  # batch index of the first split; the batch size marks an idle part
    FIRST_PAGE = 1  # page of FIRST_SEQ the part starts at
    LAST_SEQ = 2  # batch index of the last split, inclusive
    LAST_PAGE_END = 3  # page of LAST_SEQ the part stops before
    FIRST_SPLIT = 4  # the first split's number within FIRST_SEQ
    MERGE_SEQ = 5  # in row i: the i-th sequence that has several splits; -1 past the last
    MERGE_FIRST_SLOT = 6  # its first split's place among all splits, num_splits[MERGE_SEQ]
    MERGE_SPLITS = 7  # how many it has


METADATA_WIDTH = 8
"""int32 words in a row of `tile_scheduler_metadata` (FlashMLA's width)."""


@dataclass(frozen=True)
class Split:
    """One part's piece of one sequence: pages [page_begin, page_end) of sequence `seq`."""

    part: int
    seq: int
    page_begin: int
    page_end: int
    split: int


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def num_parts(num_sms: int, rows_per_kv_head: int, num_kv_heads: int) -> int:
    """Parts to plan for: as many as fill the machine, and always at least one.

    Parameters
    ----------
    num_sms : streaming multiprocessors of the GPU.
    rows_per_kv_head : query rows per sequence and KV head, `s_q * h_q // h_kv`.
    num_kv_heads : KV heads, `h_kv`.

    Every part is run by `h_kv * ceil(rows / 64)` thread blocks, one for each KV head and
    tile of 64 rows.
    """
    return max(1, num_sms // (num_kv_heads * ceil_div(rows_per_kv_head, TILE_ROWS)))


def _parts_needed(pages: Sequence[int], budget: int) -> int:
    """How many parts a batch takes when each may spend `budget` pages, starts included."""
    parts, left = 1, budget
    for n in pages:
        room = max(0, left - START_COST)
        if START_COST + n <= left:
            left -= START_COST + n
            continue
        full = budget - START_COST  # pages that fit a fresh part
        rest = n - room
        extra = max(1, ceil_div(rest, full))
        parts += extra
        left = full - (rest - (extra - 1) * full)
    return parts


def _smallest_budget(pages: Sequence[int], parts: int) -> int:
    """The least budget with which the batch fits `parts` parts.

    A part loses at most one start's cost at its end (the room left is too small to start in, or
    the sequence cut there is started once more), so the fair share plus that always fits:
    START_COST + 1 candidates are enough, and the GPU tries them side by side.
    """
    fair = max(1, ceil_div(sum(pages) + START_COST * len(pages), parts))
    budget = max(fair, START_COST + 1)
    while _parts_needed(pages, budget) > parts:
        budget += 1
    return budget


def plan(cache_seqlens: Sequence[int], parts: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Plan one decode step on the host.

    Parameters
    ----------
    cache_seqlens : tokens in the cache for each sequence; 0 is allowed.
    parts : what `num_parts` returned.

    Returns
    -------
    tile_scheduler_metadata : (parts, 8) int32, columns as in `Field`.
    num_splits : (b + 1) int32, running total of splits; sequence i has
        `num_splits[i + 1] - num_splits[i]` of them, at least one.
    """
    pages = [ceil_div(n, PAGE_SIZE) for n in cache_seqlens]
    batch, budget = len(pages), _smallest_budget(pages, parts)
    metadata = torch.zeros(parts, METADATA_WIDTH, dtype=torch.int32)
    metadata[:, Field.MERGE_SEQ] = -1
    merged = 0
    num_splits = torch.zeros(batch + 1, dtype=torch.int32)
    seq, page, split = 0, 0, 0  # the next page to hand out, and its split's number
    for part in range(parts):
        row = metadata[part]
        if seq == batch:
            row[Field.FIRST_SEQ] = batch
            continue
        row[Field.FIRST_SEQ], row[Field.FIRST_PAGE], row[Field.FIRST_SPLIT] = seq, page, split
        left = budget
        while seq < batch:
            rest = pages[seq] - page
            if START_COST + rest <= left:  # the sequence ends in this part
                left -= START_COST + rest
                num_splits[seq + 1] = num_splits[seq] + split + 1
                row[Field.LAST_SEQ], row[Field.LAST_PAGE_END] = seq, pages[seq]
                if split > 0:
                    metadata[merged, Field.MERGE_SEQ] = seq
                    metadata[merged, Field.MERGE_FIRST_SLOT] = num_splits[seq]
                    metadata[merged, Field.MERGE_SPLITS] = split + 1
                    merged += 1
                seq, page, split = seq + 1, 0, 0
                continue
            if left > START_COST:  # the sequence is cut here
                page += left - START_COST
                split += 1
                row[Field.LAST_SEQ], row[Field.LAST_PAGE_END] = seq, page
            break
    return metadata, num_splits


def splits_of(metadata: torch.Tensor, cache_seqlens: Sequence[int]) -> list[Split]:
    """Spell a plan out as splits, in the order in which its parts work on them."""
    batch = len(cache_seqlens)
    splits = []
    for part, row in enumerate(metadata.tolist()):
        if row[Field.FIRST_SEQ] >= batch:
            continue
        for seq in range(row[Field.FIRST_SEQ], row[Field.LAST_SEQ] + 1):
            is_first, is_last = seq == row[Field.FIRST_SEQ], seq == row[Field.LAST_SEQ]
            splits.append(
                Split(
                    part=part,
                    seq=seq,
                    page_begin=row[Field.FIRST_PAGE] if is_first else 0,
                    page_end=row[Field.LAST_PAGE_END] if is_last else ceil_div(cache_seqlens[seq], PAGE_SIZE),
                    split=row[Field.FIRST_SPLIT] if is_first else 0,
                )
            )
    return splits
