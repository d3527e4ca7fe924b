"""The split-KV plan: which part of the machine decodes which pages of which sequence.

This module is the specification. `csrc/schedule/plan.cu` computes the same bytes on the GPU, where
every sequence and every part finds its own place by sums and divisions, and none waits for another;
for the batch-invariant mode `plan_chunks.cu` does.

A *part* is one resident worker (a thread block on the GPU). Its share of the plan is one run
of pages in batch order: it may finish a sequence begun by the part before it, decode whole
sequences, and begin a sequence that the next part goes on with. A part's piece of one sequence
is a *split*; a sequence decoded in one split needs no merge. Sequences are laid out over the parts
in one of three ways: `_a_split_a_part` where that costs no more, or `_whole_sequences`, else `_on_a_line`.
The batch-invariant mode has a layout of its own, `_in_chunks`, and slots of its own. Where a part has all of
a sequence, it keeps the sum of its chunks at the slot of its own number. Behind these lie `most_chunks` slots
for each sequence that is cut, in batch order.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from itertools import accumulate

import torch

from .chunks import chunk_pages, most_chunks, num_chunks

PAGE_SIZE = 64
"""Tokens in a page of the KV cache."""

TILE_ROWS = 64
"""Query rows (query tokens × heads that share a KV head) one part works on: wgmma's M."""

START_COST = 3
"""What starting a split costs, in pages: loading q, filling the pipeline, storing the result."""

PARTIAL_COST = 3
"""What a split costs beside where it is not the only one of its sequence, in pages: writing its partial
result, and reading it for the merge."""

FEW_ROWS = 32
"""Query rows that share a KV head: with up to so many a part is through with pages faster than memory gives
them to all parts."""

FEW_PAGES = 4
"""With few rows, the least limit for the pages of a split that is tried, for shorter ones are more to merge;
half of it where the batch has at most so many pages a part, and a share for half of the parts where that is
less. (Sequences are cut evenly: some splits are shorter than the limit, and it may not be enough.)"""

WHOLE_PAGES = 16
"""With few rows, sequences of up to so many pages stay whole where none has more than a share for half of the
parts: nothing to merge."""

FULL_TILE = 48
"""With more rows in a tile, partial results are so large that many of them take long to merge."""

TWO_PAGE_SPLITS = 13
"""With full tiles, splits of one page take two where every sequence then has so many or fewer, one had more,
and more than BUSY_PERCENT of the parts were busy: half of the partial results is worth more than a page."""

BUSY_PERCENT = 40
"""Of the parts; where no more are busy, partial results do not keep the L2 busy."""

CHUNK_COST = 1
"""What ending a chunk of the batch-invariant mode costs beside, in pages: storing and merging its result."""

NUM_BUDGETS = 32
"""How many budgets the batch-invariant mode tries: a lane of a warp each."""

CPU_PARTS = 16
"""Parts planned for where there is no GPU; more of them exercise the merge, fewer run faster."""


class Field(IntEnum):
    """Columns of a row of `tile_scheduler_metadata`: a part's work."""

    FIRST_SEQ = 0  # batch index of the first split; the batch size marks an idle part, its other columns 0
    FIRST_PAGE = 1  # page of FIRST_SEQ the part starts at
    LAST_SEQ = 2  # batch index of the last split, inclusive
    LAST_PAGE_END = 3  # page of LAST_SEQ the part stops before
    FIRST_SPLIT = 4  # the first split's number within FIRST_SEQ
    FIRST_SPLITS = 5  # how many splits FIRST_SEQ has; -2 where the first one hands over: see _in_chunks
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


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def num_parts(num_sms: int, num_row_tiles: int) -> int:
    """Parts to plan for: as many as fill the machine, and always at least one.

    Every part is run by a thread block for each of the `row_tiling`'s tiles, each on a streaming
    multiprocessor of its own. Blocks that do not fit the machine at once are launched after the others.
    """
    return max(1, num_sms // num_row_tiles)


def is_few(rows_per_kv_head: int) -> bool:
    """Whether so many query rows that share a KV head, `s_q * h_q // h_kv`, are planned for as few."""
    return rows_per_kv_head <= FEW_ROWS


def is_full(rows_per_kv_head: int) -> bool:
    """Whether tiles are full where so many query rows that share a KV head are cut into equal ones.

    Heads may not allow that: 3 tokens of 32 heads are tiles of 64 and 32 rows, which count as 48 each.
    """
    return ceil_div(rows_per_kv_head, ceil_div(rows_per_kv_head, TILE_ROWS)) > FULL_TILE


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


@dataclass(frozen=True)
class _Layout:
    """Which parts each sequence is on, and where it is cut between them."""

    first_part: list[int]
    last_part: list[int]  # inclusive
    page_at: Callable[[int, int], int]  # (seq, part) -> page of `seq` that `part` begins at
    handed_over: frozenset[int] = frozenset()  # sequences whose first part hands its sum over to the second


def _share(total: int, ways: int, number: int) -> int:
    """Where a share begins when `total` is cut into even ones: the first total % ways have one more."""
    return number * (total // ways) + min(number, total % ways)


def _num_splits(pages: int, length: int) -> int:
    """Splits of at most `length` pages; of so few that a partial result would cost what it saves, one."""
    return 1 if pages <= PARTIAL_COST + 1 else ceil_div(pages, length)


def _a_split_a_part(pages: Sequence[int], parts: int, share: int, rows: int) -> _Layout | None:
    """Sequences cut evenly into splits of at most `length` pages, handed out a split a part.

    The length is the least with which the parts are enough, of those up to a share of the line, or that and
    PARTIAL_COST: the worst part costs its pages, a start and a partial result, where one of a line may have
    to go on with a sequence and to leave another to go on with. None if that is not enough. With more
    sequences than parts no length will do, with fewer none below share - START_COST is better. Some
    lengths are too little: with few rows FEW_PAGES, WHOLE_PAGES; with full tiles TWO_PAGE_SPLITS.
    """
    least = _least_of_few_rows(pages, parts) if is_few(rows) else 1
    for length in (*range(share - START_COST, share + 1), share + PARTIAL_COST):
        length = max(least, length)
        splits = [_num_splits(n, length) for n in pages]
        if sum(splits) <= parts:
            break
    else:
        return None
    halves = TWO_PAGE_SPLITS < max(pages) <= 2 * TWO_PAGE_SPLITS
    is_busy = 100 * sum(splits) > BUSY_PERCENT * parts
    if length == 1 and halves and is_busy and is_full(rows):
        splits = [_num_splits(n, 2) for n in pages]
    end = list(accumulate(splits))
    first = [e - k for e, k in zip(end, splits, strict=True)]
    return _Layout(
        first, [e - 1 for e in end], lambda seq, part: _share(pages[seq], splits[seq], part - first[seq])
    )


def _least_of_few_rows(pages: Sequence[int], parts: int) -> int:
    """The least length of splits that is tried: `half`, where no sequence is longer, leaves all whole."""
    taken = [max(1, n) for n in pages]  # an empty sequence takes a part too: its result is written
    half = ceil_div(sum(taken), max(1, parts // 2))  # a share for half of the parts
    if max(taken) <= min(half, WHOLE_PAGES):
        return half
    return min(half, FEW_PAGES if sum(taken) > FEW_PAGES // 2 * parts else FEW_PAGES // 2)


class _Line:
    """Sequences one after another, each START_COST places and its pages long, cut evenly into shares."""

    def __init__(self, pages: Sequence[int], parts: int) -> None:
        self.pages, self.parts = pages, parts
        self.taken = [START_COST + max(1, n) for n in pages]
        self.end = list(accumulate(self.taken))
        self.page_0 = [e - n + START_COST for e, n in zip(self.end, self.taken, strict=True)]
        self.begin_of_part = [_share(self.end[-1], parts, part) for part in range(parts + 1)]
        self.share = ceil_div(self.end[-1], parts)  # of the parts that have most
        # Pages that a cut may be moved by: a share that loses as many at both ends keeps a start and a page.
        self.reach = min(PARTIAL_COST, max(0, self.end[-1] // parts - START_COST - 1) // 2)

    def part_of(self, place: int) -> int:
        return bisect_right(self.begin_of_part, place) - 1

    def page_at(self, seq: int, part: int) -> int:
        """The page of `seq` that `part` begins at: not the first or last few ones, which cost less than a
        partial result, but the sequence's begin or end."""
        before = min(max(0, self.begin_of_part[part] - self.page_0[seq]), self.pages[seq])
        after = self.pages[seq] - before
        if min(before, after) > self.reach:
            return before
        return 0 if before <= after else self.pages[seq]


def _whole_sequences(line: _Line) -> _Layout | None:
    """Nothing cut: each sequence on the part whose share of the line has its middle.

    None where a part would cost more than the worst one of `_on_a_line`: its share, one more start and two
    partial results. A part whose share lies within a sequence may be idle. None, too, with no more sequences
    than parts: few of these are left by `_a_split_a_part`, and looking for them costs the GPU's planner time.
    """
    if len(line.pages) <= line.parts:
        return None
    part = [line.part_of(e - n + n // 2) for e, n in zip(line.end, line.taken, strict=True)]
    cost = [0] * line.parts
    for p, n in zip(part, line.taken, strict=True):
        cost[p] += n
    if max(cost) > line.share + START_COST + 2 * PARTIAL_COST:
        return None
    return _Layout(part, part, lambda seq, p: 0 if p == part[seq] else line.pages[seq])


def _on_a_line(line: _Line) -> _Layout:
    """Each part has its share of the line, wherever that begins, but for few pages of a sequence.

    The worst part costs its share of the line, `reach` pages at either end, a start that is not on the line,
    where it goes on with a sequence, and two partial results. No part is idle: a share t of START_COST + 1
    places or less is enough for `_a_split_a_part`, as
    sum(ceil(n / t)) <= (line + b * (t - 1 - START_COST)) / t <= line / t, so here every part has at least
    START_COST + 1 places, one of them a page.
    """
    first_part, last_part = [], []
    for seq, (page_0, end) in enumerate(zip(line.page_0, line.end, strict=True)):
        first, last = line.part_of(page_0), line.part_of(end - 1)
        first_part.append(first + (first < last and line.page_at(seq, first + 1) == 0))
        last_part.append(last - (first < last and line.page_at(seq, last) == line.pages[seq]))
    return _Layout(first_part, last_part, line.page_at)


def _in_chunks(pages: Sequence[int], parts: int, level: int) -> _Layout:
    """The batch-invariant mode: whole chunks, each part filled with them up to a budget.

    Where both pieces of a sequence on two parts fit into the budget together, its sum is handed over, and
    nothing is left to merge: a part works on its last sequence first and on its first one last, going on with
    the sum of the part before. It may have to wait for that, but is done within the budget.
    """
    cost = [max(1, n) + CHUNK_COST * num_chunks(n, level) for n in pages]
    budget, begins = _filled(pages, cost, parts, level)
    return _Layout(
        [min(of_seq) for of_seq in begins],
        [max(of_seq) for of_seq in begins],
        lambda seq, part: begins[seq].get(part, pages[seq]),
        frozenset(
            seq
            for seq, of_seq in enumerate(begins)
            if len(of_seq) == 2 and 2 * START_COST + cost[seq] <= budget
        ),
    )


def _filled(
    pages: Sequence[int], cost: Sequence[int], parts: int, level: int
) -> tuple[int, list[dict[int, int]]]:
    """The budget, and what `_fill` makes of it.

    A chunk costs its pages and CHUNK_COST, what a part does of a sequence START_COST beside. Of
    NUM_BUDGETS between the fair share and one that is always enough, the least that is enough is taken.
    """
    dearest = max(min(max(1, n), chunk_pages(n, level)) + CHUNK_COST for n in pages)
    least = max(ceil_div(sum(cost) + START_COST * len(pages), parts), START_COST + dearest)
    for i in range(NUM_BUDGETS):
        budget = least + (2 * START_COST + dearest) * i // (NUM_BUDGETS - 1)
        begins = _fill(pages, cost, budget, level)
        if max(begins[-1]) < parts:
            break
    return budget, begins


def _fill(pages: Sequence[int], cost: Sequence[int], budget: int, level: int) -> list[dict[int, int]]:
    """For each sequence, the page that each part on it begins at."""
    begins, part, room = [], 0, budget
    for n, left in zip(pages, cost, strict=True):
        chunk, page = chunk_pages(n, level), 0
        begins.append({})
        while START_COST + left > room:
            fitting = max(0, room - START_COST) // (chunk + CHUNK_COST)
            if fitting:
                begins[-1][part] = page
            page, left = page + fitting * chunk, left - fitting * (chunk + CHUNK_COST)
            part, room = part + 1, budget
        begins[-1][part] = page
        room -= START_COST + left
    return begins


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
        layout = _in_chunks(pages, parts, chunk_level)
    else:
        line = _Line(pages, parts)
        layout = (
            _a_split_a_part(pages, parts, line.share, rows_per_kv_head)
            or _whole_sequences(line)
            or _on_a_line(line)
        )

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
