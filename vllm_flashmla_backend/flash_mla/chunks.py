"""The batch-invariant mode: a sequence is worked on in chunks that only its own length decides.

By default the plan cuts sequences wherever the parts are then busy for the same time, so where a sequence
is cut, and with that the last bits of its result, depend on its neighbours. In the batch-invariant
mode it is cut between chunks alone: runs of pages counted from token 0. Each chunk is attended to from
scratch, whichever part does it, and the chunks are merged one after another.

A chunk is about the root of the sequence's pages long: short sequences have few chunks, so that little is
left to merge, and long ones have many, so that many parts can share them.
"""

from __future__ import annotations

FEW_HEADS = 32
"""Up to so many heads that share a KV head, storing and merging a chunk is cheap, so chunks are shorter."""


def chunk_level(heads_per_kv_head: int) -> int:
    """What the kernels are told: 0 is the default mode, 1 and 2 are shorter and longer chunks.

    It depends on the model alone, never on the number of query tokens or on the batch.
    """
    return 1 if heads_per_kv_head <= FEW_HEADS else 2


def chunk_pages(pages: int, level: int) -> int:
    """Pages of a chunk of a sequence of so many, a power of two; 1 in the default mode: cuts anywhere."""
    if level == 0:
        return 1
    bits = max(0, pages - 1).bit_length()
    return 1 << ((bits + 1) // 2 + level - 1)


def num_chunks(pages: int, level: int) -> int:
    """Chunks of a sequence; one without pages has one, for its result is written, too."""
    return max(1, -(-pages // chunk_pages(pages, level)))


def most_chunks(max_pages: int, level: int) -> int:
    """The most chunks that a sequence of up to `max_pages` can have."""
    bits = max(0, max_pages - 1).bit_length()
    half_as_long = 4 ** max(0, (bits + 1) // 2 - 1)  # pages of the longest sequence whose chunks are
    return max(num_chunks(max_pages, level), num_chunks(min(max_pages, half_as_long), level))


def cut(page_begin: int, page_end: int, pages: int, level: int) -> list[tuple[int, int]]:
    """A part's pages [page_begin, page_end) of a sequence of so many, chunk by chunk.

    A sequence without pages has an empty one.
    """
    chunk = chunk_pages(pages, level)
    if pages == 0:
        return [(0, 0)]
    return [(begin, min(begin + chunk, page_end)) for begin in range(page_begin, page_end, chunk)]
