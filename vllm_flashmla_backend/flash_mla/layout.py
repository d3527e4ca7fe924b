"""Where the plan lays sequences on parts: `csrc/schedule/layout.cuh` does the same on the GPU.

In one of three ways: `_a_split_a_part` where that costs no more, or `_whole_sequences`, else `_on_a_line`.
The batch-invariant mode has a layout of its own: `chunk_layout`.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate

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

CUT_COST = 8
"""What cuts anywhere cost the worst part beside its share, in pages: a start that is not on the line, and
partial results at both ends; a page less, by measurement."""

FEW_SEQUENCES = 32
"""Up to so many are a warp's in the GPU's planner; only then parts left over are given out."""

SPLITS_A_SPARE = 5
"""A sequence takes a part left over for so many splits that it has. Where none has as many, those parts at
work slow the others by more than is gained."""

LONG_SPLITS = 8
"""Pages of a split from which on parts left over are given out: shorter ones all end too soon."""

LONG_SPLITS_OF_TILES = 5
"""The same with several tiles of rows, whose partial results keep the L2 busy for longer."""


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def is_few(rows_per_kv_head: int) -> bool:
    """Whether so many query rows that share a KV head, `s_q * h_q // h_kv`, are planned for as few."""
    return rows_per_kv_head <= FEW_ROWS


def is_one_tile(rows_per_kv_head: int) -> bool:
    """Whether one tile has so many query rows that share a KV head."""
    return rows_per_kv_head <= TILE_ROWS


def is_full(rows_per_kv_head: int) -> bool:
    """Whether tiles are full where so many query rows that share a KV head are cut into equal ones.

    Heads may not allow that: 3 tokens of 32 heads are tiles of 64 and 32 rows, which count as 48 each.
    """
    return ceil_div(rows_per_kv_head, ceil_div(rows_per_kv_head, TILE_ROWS)) > FULL_TILE


@dataclass(frozen=True)
class Layout:
    """Which parts each sequence is on, and where it is cut between them."""

    first_part: list[int]
    last_part: list[int]  # inclusive
    page_at: Callable[[int, int], int]  # (seq, part) -> page of `seq` that `part` begins at
    handed_over: frozenset[int] = frozenset()  # sequences whose first part hands its sum over to the second


def lay_out(pages: Sequence[int], parts: int, rows_per_kv_head: int) -> Layout:
    """The default mode's, of sequences of so many pages."""
    line = _Line(pages, parts)
    return (
        _a_split_a_part(pages, parts, line.share, rows_per_kv_head)
        or _whole_sequences(line, rows_per_kv_head)
        or _on_a_line(line)
    )


def _share(total: int, ways: int, number: int) -> int:
    """Where a share begins when `total` is cut into even ones: the first total % ways have one more."""
    return number * (total // ways) + min(number, total % ways)


def _num_splits(pages: int, length: int) -> int:
    """Splits of at most `length` pages; of so few that a partial result would cost what it saves, one."""
    return 1 if pages <= PARTIAL_COST + 1 else ceil_div(pages, length)


def _a_split_a_part(pages: Sequence[int], parts: int, share: int, rows: int) -> Layout | None:
    """Sequences cut evenly into splits of at most `length` pages, handed out a split a part.

    The length is the least with which the parts are enough, of those from share - START_COST to
    share + PARTIAL_COST, `share` being the line's: the worst part costs its pages, a start and a partial
    result, where one of a line may have to go on with a sequence and to leave another to go on with. None if
    that is not enough. With more sequences than parts no length will do, with fewer none below these is
    better. Some lengths are too little: with few rows FEW_PAGES, WHOLE_PAGES; with full tiles
    TWO_PAGE_SPLITS. Parts may be left over, which `_give_out` gives to sequences with many long splits.
    """
    least = _least_of_few_rows(pages, parts) if is_few(rows) else 1

    def cut(length: int) -> list[int]:
        return [_num_splits(n, max(least, length)) for n in pages]

    lengths = range(share - START_COST, share + PARTIAL_COST + 1)
    enough = bisect_left(lengths, True, key=lambda length: sum(cut(length)) <= parts)
    if enough == len(lengths):
        return None
    length = max(least, lengths[enough])
    splits = cut(length)
    halves = TWO_PAGE_SPLITS < max(pages) <= 2 * TWO_PAGE_SPLITS
    is_busy = 100 * sum(splits) > BUSY_PERCENT * parts
    if length == 1 and halves and is_busy and is_full(rows):
        splits = cut(2)
    long = LONG_SPLITS if is_one_tile(rows) else LONG_SPLITS_OF_TILES
    if length >= long and len(pages) <= FEW_SEQUENCES and not is_few(rows):
        splits = _give_out(parts - sum(splits), splits)
    return _in_turn(pages, splits, parts, rows)


def _give_out(spare: int, splits: list[int]) -> list[int]:
    """More splits where `spare` parts are left over.

    Shorter ones end sooner, and store and merge their partial results before the L2 is asked for all others'.
    From the last sequence on, for with the first ones less is gained.
    """
    given = list(splits)
    for seq in reversed(range(len(splits))):
        more = min(spare, splits[seq] // SPLITS_A_SPARE)
        given[seq] += more
        spare -= more
    return given


def _in_turn(pages: Sequence[int], splits: list[int], parts: int, rows: int) -> Layout:
    """Each sequence cut evenly into so many splits, each split on a part of its own; what is left over lies
    between sequences (`idle_before`)."""
    busy = list(accumulate(splits))
    first = [n - k + idle_before(n - k, busy[-1], parts, rows) for n, k in zip(busy, splits, strict=True)]
    last = [part + k - 1 for part, k in zip(first, splits, strict=True)]
    return Layout(first, last, lambda seq, part: _share(pages[seq], splits[seq], part - first[seq]))


def first_of_last_half(parts: int) -> int:
    """The first part of the last half; the only part, if there is one. As in csrc/params.h."""
    return min(parts - 1, ceil_div(parts, 2))


def idle_before(begin: int, busy: int, parts: int, rows: int) -> int:
    """How many of the idle parts lie before a sequence that begins with the busy part of number `begin`.

    With one tile of rows a TPC's two SMs have a part each, and either gets more bandwidth while the other is
    idle: idle parts lie between sequences, all along. With few rows the kernel gives the parts of the first
    half a TPC each, and those of the last half the other SMs: idle ones lie among these. With several tiles
    both SMs have the same part, and idle ones are the last. (So it is with several KV heads, too, which the
    plan does not know of.)
    """
    if not is_one_tile(rows):
        return 0
    dense = first_of_last_half(parts) if is_few(rows) else 0
    return (parts - busy) * (begin - dense) // (busy - dense) if begin > dense else 0


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


def _whole_sequences(line: _Line, rows: int) -> Layout | None:
    """Nothing cut: each sequence on a part of its own, or with more sequences than parts on the part whose
    share of the line has its middle. Then a part whose share lies within a sequence may be idle.

    None where a part would cost too much beside the worst one of `_on_a_line`.
    """
    if len(line.pages) <= line.parts:
        layout = _in_turn(line.pages, [1] * len(line.pages), line.parts, rows)
    else:
        middle = [line.part_of(e - n + n // 2) for e, n in zip(line.end, line.taken, strict=True)]
        layout = Layout(middle, middle, lambda seq, p: 0 if p == middle[seq] else line.pages[seq])
    cost = [0] * line.parts
    for part, n in zip(layout.first_part, line.taken, strict=True):
        cost[part] += n
    return layout if max(cost) <= _most_whole(line, rows) else None


def _most_whole(line: _Line, rows: int) -> int:
    """What a part may cost where sequences stay whole, in places of the line: a share, what is `more`, and
    CUT_COST.

    One tile of rows is through with a page before memory gives as many to all parts: if some are idle, or
    become so soon, the others are faster, and with few rows most so.
    """
    divisor = 8 if len(line.pages) > line.parts else 2 if is_few(rows) else 4
    more = line.share // divisor if is_one_tile(rows) else 0
    return line.share + more + CUT_COST


def _on_a_line(line: _Line) -> Layout:
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
    return Layout(first_part, last_part, line.page_at)
