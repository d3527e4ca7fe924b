"""Batches to plan for, and numbers of parts, as hypothesis draws them."""

from __future__ import annotations

from hypothesis import strategies as st

LENGTHS = st.lists(
    st.one_of(st.integers(0, 300), st.integers(0, 20_000), st.sampled_from([0, 1, 63, 64, 65, 4_000_000])),
    min_size=1,
    max_size=70,
)
PARTS = st.integers(1, 140)
