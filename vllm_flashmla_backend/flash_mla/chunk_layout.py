"""Where the plan of the batch-invariant mode lays sequences on parts.

`csrc/schedule/plan_chunks.cu` does the same on the GPU.
"""

from __future__ import annotations

from collections.abc import Sequence

from .chunks import chunk_pages, num_chunks
from .layout import START_COST, Layout, ceil_div, idle_before

NUM_BUDGETS = 32
"""How many budgets the batch-invariant mode tries: a lane of a warp each."""


def lay_out_chunks(pages: Sequence[int], parts: int, level: int, rows_per_kv_head: int) -> Layout:
    """Whole chunks, each part filled with them up to a budget.

    Where both pieces of a sequence on two parts fit into the budget together, its sum is handed over, and
    nothing is left to merge: a part works on its last sequence first and on its first one last, going on with
    the sum of the part before. It may have to wait for that, but is done within the budget.
    """
    budget, begins = fill_parts(pages, parts, level)
    begins = _spread(begins, parts, rows_per_kv_head)
    return Layout(
        [min(of_seq) for of_seq in begins],
        [max(of_seq) for of_seq in begins],
        lambda seq, part: begins[seq].get(part, pages[seq]),
        frozenset(
            seq
            for seq, of_seq in enumerate(begins)
            if len(of_seq) == 2 and 2 * START_COST + cost_of(pages[seq], level) <= budget
        ),
    )


def chunk_cost(level: int) -> int:
    """What ending a chunk costs beside, in pages: next to nothing at level 1, where few rows are added up in
    registers, else about a page, for sums that lie in the L2."""
    return 0 if level == 1 else 1


def cost_of(pages: int, level: int) -> int:
    """What all of a sequence costs, in pages: its chunks their pages and `chunk_cost` each."""
    return max(1, pages) + chunk_cost(level) * num_chunks(pages, level)


def fill_parts(pages: Sequence[int], parts: int, level: int) -> tuple[int, list[dict[int, int]]]:
    """The budget, and what `_fill` makes of it.

    What a part does of a sequence costs START_COST beside. Of NUM_BUDGETS between the fair share and one that
    is always enough, the least that is enough is taken.
    """
    dearest = max(min(max(1, n), chunk_pages(n, level)) for n in pages) + chunk_cost(level)
    cost = [cost_of(n, level) for n in pages]  # once, not for each budget
    least = max(ceil_div(sum(cost) + START_COST * len(pages), parts), START_COST + dearest)
    for i in range(NUM_BUDGETS):
        budget = least + (2 * START_COST + dearest) * i // (NUM_BUDGETS - 1)
        begins = _fill(pages, cost, budget, level)
        if max(begins[-1]) < parts:
            break
    return budget, begins


def _spread(begins: list[dict[int, int]], parts: int, rows: int) -> list[dict[int, int]]:
    """Idle parts between the others, where a sequence begins with a part that no other is on."""
    busy, idle, last = max(begins[-1]) + 1, 0, -1
    spread = []
    for of_seq in begins:
        if min(of_seq) > last:
            idle = idle_before(min(of_seq), busy, parts, rows)
        last = max(of_seq)
        spread.append({part + idle: page for part, page in of_seq.items()})
    return spread


def _fill(pages: Sequence[int], cost: Sequence[int], budget: int, level: int) -> list[dict[int, int]]:
    """For each sequence, the page that each part on it begins at."""
    begins, part, room = [], 0, budget
    for n, left in zip(pages, cost, strict=True):
        chunk, page = chunk_pages(n, level), 0
        chunk_and_end = chunk + chunk_cost(level)
        begins.append({})
        while START_COST + left > room:
            fitting = max(0, room - START_COST) // chunk_and_end
            if fitting:
                begins[-1][part] = page
            page, left = page + fitting * chunk, left - fitting * chunk_and_end
            part, room = part + 1, budget
        begins[-1][part] = page
        room -= START_COST + left
    return begins
