"""A small sweep on the GPU for compute-sanitizer, which runs it a hundred times slower."""

from __future__ import annotations

import itertools
from dataclasses import replace

import torch
from mla_cases import (
    CUT,
    SCALE,
    Case,
    add_growing_scores,
    assert_agree,
    expected,
    make_inputs,
    plan_for,
    run,
    run_ragged,
)

from vllm_flashmla_backend.flash_mla import flash_mla_decode, get_mla_metadata

CASES = [
    Case((0, 1, 63, 64, 65), h_q=16),
    Case((0, 3, 700), s_q=4, h_q=20, causal=True),
    Case((3000, 130), h_q=5),  # several splits, of less than 8 rows
    Case((300, 70), s_q=2, h_q=12, h_kv=3, causal=True, strided=True),
    Case((130, 64), h_q=16, dtype=torch.float16),
    Case((4000,), h_q=128),  # one sequence over all parts
    *(Case((576,), h_q=h_q) for h_q in (16, 64)),  # few splits
    Case((1800,), h_q=128),  # 29, whose items two and four warps share
    Case((4000,), h_q=32),
    Case((300, 70), s_q=3, h_q=85, causal=True),  # more tiles than one launch has room for
    Case((300, 70), s_q=4, h_q=40, causal=True),  # a tile of fewer heads
]
BATCH_INVARIANT = [
    Case((0, 1, 64, 1000, 3000), h_q=16),
    Case((3000, 300), s_q=2, h_q=80, causal=True),
    Case((2500, 300), h_q=20),
]
ONE_BY_ONE = (10,) * 8  # tokens: one query right behind the other
IN_ONE_PART = (600, 300, 130)  # several chunks, one sequence right behind the other
HANDED_OVER = (700, 700, 700)  # on two parts: the second goes on with the first one's sum
PLANNED = [(64,) * 40, (768,) * 67, (1000,) * 90, (1000,) * 200]  # by several warps, or 32 at a time
RAGGED = Case((700, 65, 3), s_q=5, h_q=37, causal=True)


def run_with_foreign_plan(case: Case, planned: tuple[int, ...]) -> None:
    """Run `case` by the plan of other lengths: rows may be wrong, but no foreign memory is touched."""
    inputs = make_inputs(case, torch.device("cuda", 0))
    other_lengths = inputs.cache_seqlens.new_tensor(planned)
    plan = plan_for(case, replace(inputs, cache_seqlens=other_lengths), True)
    tensors = (inputs.q_nope, inputs.q_pe, inputs.k_cache, inputs.block_table, inputs.cache_seqlens)
    flash_mla_decode(*tensors, *plan, SCALE, False, batch_invariant=True)
    torch.cuda.synchronize()


def check(case: Case, growth: float = 0, **how) -> None:
    """Run `case` as mla_cases.run does with `how`; with `growth`, as add_growing_scores says."""
    inputs = make_inputs(case, torch.device("cuda", 0))
    if growth:
        add_growing_scores(inputs, growth)
    assert_agree(run(case, inputs, **how), expected(case, inputs))
    print(case, how, flush=True)


if __name__ == "__main__":
    for case in CASES:
        check(case)
    for lengths, batch_invariant in itertools.product(PLANNED, (False, True)):
        cache_seqlens = torch.tensor(lengths, dtype=torch.int32, device="cuda")
        get_mla_metadata(cache_seqlens, 64, 1, batch_invariant=batch_invariant)
    torch.cuda.synchronize()
    for (lengths, parts, *_), h_q in itertools.product(CUT[:4], (16, 64)):  # the last one takes too long
        check(Case(lengths, h_q=h_q), parts=parts)
    for h_q in (16, 64):
        check(Case(ONE_BY_ONE, h_q=h_q), parts=2)
    for case in BATCH_INVARIANT:
        check(case, batch_invariant=True)
    for h_q in (20, 64):
        check(Case(IN_ONE_PART, h_q=h_q), batch_invariant=True, parts=1)
        check(Case(HANDED_OVER, h_q=h_q), batch_invariant=True, parts=2)
    for h_q in (16, 64, 128):  # with 128 blocks share their pages
        check(Case((600, 300), h_q=h_q), growth=6, parts=1)  # each page raises the softmax's maximum
    run_with_foreign_plan(Case((130, 0), h_q=16), (5000, 5000))
    for h_q in (16, 64):
        run_with_foreign_plan(Case((130, 0, 10) * 50, h_q=h_q), (1100, 700, 900) * 50)  # sums handed over
    for batch_invariant in (False, True):
        inputs = make_inputs(RAGGED, torch.device("cuda", 0))
        for out, lse in run_ragged(RAGGED, inputs, (2, 0, 5), batch_invariant):
            assert out.isfinite().all() and not lse.isnan().any()
