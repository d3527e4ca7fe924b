"""Long queries among decodes, cut into runs of tokens that are planned like sequences of their own."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from mla_cases import SCALE, Case, assert_agree, make_inputs

pytest.importorskip("vllm")

from vllm_flashmla_backend.attention.long_queries import cut  # noqa: E402
from vllm_flashmla_backend.flash_mla import flash_mla_decode_varlen, get_mla_metadata  # noqa: E402
from vllm_flashmla_backend.flash_mla.reference import naive_attention  # noqa: E402


@given(st.lists(st.integers(0, 150), min_size=1, max_size=20), st.integers(1, 70))
def test_every_token_is_in_one_run_of_its_own_sequence(query_lens, longest):
    runs = cut(np.array(query_lens), longest)
    assert runs.begin[0] == 0
    assert np.diff(runs.begin).max() <= longest
    first = np.cumsum([0, *query_lens])
    for seq, count in enumerate(query_lens):
        own = np.flatnonzero(runs.sequence == seq)
        assert runs.begin[own[0]] == first[seq] and runs.begin[own[-1] + 1] == first[seq + 1]
        assert len(own) == max(1, -(-count // longest))
        ends = runs.begin[own + 1] - first[seq]
        assert (runs.keys_after[own] == count - ends).all(), "a run sees no key after its last token's"
    assert (np.diff(runs.sequence) >= 0).all()


@pytest.mark.parametrize("heads", [16, 128])
def test_runs_attend_to_what_the_whole_query_does(heads, device):
    """A long query, drafts, single tokens, one without a token, and queries that begin their sequence."""
    query_lens = np.array([70, 1, 3, 0, 100, 65])
    case = Case((300, 500, 64, 40, 100, 66), s_q=int(query_lens.max()), h_q=heads, causal=True)
    inputs = make_inputs(case, device)
    runs = cut(query_lens, max(1, 64 // heads))
    block_table, cache_seqlens, begin = runs.apply(inputs.block_table, inputs.cache_seqlens)
    longest = int(np.diff(runs.begin).max())
    queries = (torch.cat([q[i, :n] for i, n in enumerate(query_lens)]) for q in (inputs.q_nope, inputs.q_pe))
    out, lse = flash_mla_decode_varlen(
        *queries,
        inputs.k_cache,
        block_table,
        cache_seqlens,
        begin,
        longest,
        *get_mla_metadata(cache_seqlens, longest * heads, 1),
        SCALE,
        True,
    )
    for i, (first, count) in enumerate(zip(np.cumsum(query_lens) - query_lens, query_lens, strict=True)):
        if count:
            tensors = (inputs.k_cache, inputs.block_table[i : i + 1], inputs.cache_seqlens[i : i + 1])
            got = out[None, first : first + count], lse[None, :, first : first + count]
            assert_agree(got, naive_attention(inputs.q[i : i + 1, :count], *tensors, SCALE, True))
