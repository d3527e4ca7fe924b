"""How the query rows of a sequence are cut into the tiles that thread blocks work on.

This is the specification: `csrc/row_tiling.h` computes the same. Here it says how many thread blocks a part
of the plan takes, and how much room a chunk's partial result.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

from .layout import TILE_ROWS, ceil_div


class RowTiling(NamedTuple):
    """How the query rows of a sequence are cut into tiles, of some heads of some query tokens each."""

    heads_per_tile: int  # the last tile of the same tokens has what is left
    tokens_per_tile: int
    tiles_per_token: int  # that the heads of a tile's tokens take
    num_row_tiles: int  # of all KV heads


@cache
def row_tiling(query_len: int, num_heads: int, num_kv_heads: int) -> RowTiling:
    """As few tiles as can be, for each has to read the cache; of these with the most heads, then the most
    tokens."""
    group = num_heads // num_kv_heads

    def of(tokens: int) -> RowTiling:
        of_token = ceil_div(group, TILE_ROWS // tokens)
        num_row_tiles = num_kv_heads * of_token * ceil_div(query_len, tokens)
        return RowTiling(ceil_div(group, of_token), tokens, of_token, num_row_tiles)

    tilings = map(of, range(1, min(TILE_ROWS, query_len) + 1))
    return min(tilings, key=lambda it: (it.num_row_tiles, -it.heads_per_tile, -it.tokens_per_tile))
