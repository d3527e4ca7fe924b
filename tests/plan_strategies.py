"""Batches to plan for, and numbers of parts, as hypothesis draws them."""

from __future__ import annotations

from hypothesis import strategies as st
from mla_cases import PLAIN_ROWS

from vllm_flashmla_backend.flash_mla.layout import FEW_ROWS, TILE_ROWS

LENGTHS = st.lists(
    st.one_of(st.integers(0, 300), st.integers(0, 20_000), st.sampled_from([0, 1, 63, 64, 65, 4_000_000])),
    min_size=1,
    max_size=70,
)
PARTS = st.integers(1, 140)

ONE_TILE = 40  # rows, that are not few and leave the tile not full
TWO_TILES = 2 * TILE_ROWS
ROWS = st.sampled_from([FEW_ROWS, PLAIN_ROWS, TILE_ROWS, TWO_TILES])
