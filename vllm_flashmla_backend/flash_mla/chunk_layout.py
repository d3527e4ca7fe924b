"""Where the plan of the batch-invariant mode lays sequences on parts.

`csrc/schedule/plan_chunks.cu` does the same on the GPU.
"""

from __future__ import annotations

from collections.abc import Sequence

from .chunks import chunk_pages, num_chunks
from .layout import START_COST, Layout, ceil_div

CHUNK_COST = 1
"""What ending a chunk of the batch-invariant mode costs beside, in pages: storing and merging its result."""

NUM_BUDGETS = 32
"""How many budgets the batch-invariant mode tries: a lane of a warp each."""


def lay_out_chunks(pages: Sequence[int], parts: int, level: int) -> Layout:
    """Whole chunks, each part filled with them up to a budget.

    Where both pieces of a sequence on two parts fit into the budget together, its sum is handed over, and
    nothing is left to merge: a part works on its last sequence first and on its first one last, going on with
    the sum of the part before. It may have to wait for that, but is done within the budget.
    """
    budget, begins = fill_parts(pages, parts, level)
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


def cost_of(pages: int, level: int) -> int:
    """What all of a sequence costs, in pages: its chunks their pages and CHUNK_COST each."""
    return max(1, pages) + CHUNK_COST * num_chunks(pages, level)


def fill_parts(pages: Sequence[int], parts: int, level: int) -> tuple[int, list[dict[int, int]]]:
    """The budget, and what `_fill` makes of it.

    What a part does of a sequence costs START_COST beside. Of NUM_BUDGETS between the fair share and one that
    is always enough, the least that is enough is taken.
    """
    dearest = max(min(max(1, n), chunk_pages(n, level)) + CHUNK_COST for n in pages)
    cost = [cost_of(n, level) for n in pages]  # once, not for each budget
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
