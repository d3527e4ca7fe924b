"""The batch-invariant mode: a sequence is worked on in chunks that only its own length decides.

By default the plan cuts sequences wherever the parts are then busy for the same time, so where a sequence
is cut, and with that the last bits of its result, depend on its neighbours. In the batch-invariant
mode it is cut between chunks alone: runs of pages counted from token 0. Each chunk is attended to from
scratch, whichever part does it, and the chunks are merged one after another.

Short sequences have few chunks, so that little is left to merge, and long ones have many, so that many parts
can share them.
"""

from __future__ import annotations


def chunk_pages(pages: int, level: int) -> int:
    """Pages of a chunk of a sequence of so many, a power of two; 1 in the default mode: cuts anywhere.

    At level 1 it is about the root of the sequence's pages up to 16, then 8 up to 128, then 16; at level 2
    twice as much. `schedule.chunk_level` says which level.
    """
    if level == 0:
        return 1
    root = (max(0, pages - 1).bit_length() + 1) // 2
    return 1 << (min(root, 3 if pages <= 128 else 4) + level - 1)


def num_chunks(pages: int, level: int) -> int:
    """Chunks of a sequence; one without pages has one, for its result is written, too."""
    return max(1, -(-pages // chunk_pages(pages, level)))


def most_chunks(max_pages: int, level: int) -> int:
    """The most chunks that a sequence of up to `max_pages` can have."""
    return max(num_chunks(min(max_pages, longest), level) for longest in (16, 128, max_pages))


def cut(page_begin: int, page_end: int, pages: int, level: int) -> list[tuple[int, int]]:
    """A part's pages [page_begin, page_end) of a sequence of so many, chunk by chunk.

    A sequence without pages has an empty one.
    """
    chunk = chunk_pages(pages, level)
    if pages == 0:
        return [(0, 0)]
    return [(begin, min(begin + chunk, page_end)) for begin in range(page_begin, page_end, chunk)]
