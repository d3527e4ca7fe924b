"""Decode against the naive attention, on the CPU and on a Hopper GPU, all unused memory poisoned.

Under pytest: the sweep. As a script, `python tests/test_flash_mla.py [--quick]`: FlashMLA's benchmark
cases, each checked and then timed.
"""

from __future__ import annotations

import argparse
import itertools
import math
import sys
import time
from collections.abc import Callable

import pytest
import torch
from mla_cases import (
    CUT,
    MIXED,
    PLAIN_ROWS,
    SCALE,
    Case,
    add_growing_scores,
    assert_agree,
    captured,
    expected,
    make_inputs,
    nan_results,
    run,
    run_ragged,
)

from vllm_flashmla_backend.flash_mla import (
    flash_mla_decode,
    flash_mla_with_kvcache,
    get_mla_metadata,
    schedule,
)
from vllm_flashmla_backend.flash_mla.layout import (
    FEW_PAGES,
    PARTIAL_COST,
    TWO_PAGE_SPLITS,
    WHOLE_PAGES,
    is_few,
    is_full,
)
from vllm_flashmla_backend.flash_mla.planning import num_parts
from vllm_flashmla_backend.flash_mla.providers import DecodeArguments, empty_partials, provider_for
from vllm_flashmla_backend.flash_mla.reference import naive_attention
from vllm_flashmla_backend.flash_mla.schedule import PAGE_SIZE

SHORT = (0, 1, 2, 5, 64, 67, 200)

HEADS = [Case(MIXED, h_q=h_q) for h_q in (1, 3, 6, 8, 9, 12, 16, 20, 32, 40, 63, 64, 67, 96, 126, 128)]
QUERY_LENGTHS = [Case(SHORT, s_q=s_q, causal=causal) for s_q in range(1, 9) for causal in (False, True)]
KV_HEADS = [
    Case(SHORT, s_q=s_q, h_q=h_q, h_kv=h_kv, causal=True)
    for s_q in (1, 3)
    for h_q, h_kv in ((16, 2), (6, 3), (9, 3), (126, 3), (8, 8), (128, 8))
]
HEADS_OF_SEVERAL_TOKENS = [  # in a tile; where they do not divide, the last tile has fewer
    Case((*SHORT, 3000), s_q=s_q, h_q=h_q, h_kv=h_kv, causal=True)
    for s_q, h_q, h_kv in ((2, 80, 1), (3, 85, 1), (3, 96, 1), (4, 40, 1), (4, 80, 2), (5, 24, 1))
]
LAYOUTS = [
    Case(SHORT, s_q=s_q, h_q=12, h_kv=h_kv, causal=True, strided=True) for s_q in (1, 4) for h_kv in (1, 3)
]
FLOAT16 = [Case(MIXED, h_q=16, dtype=torch.float16), Case(SHORT, s_q=2, causal=True, dtype=torch.float16)]
EXTREMES = [
    Case((0, 0, 0)),  # nothing to see at all
    Case((20_000,), h_q=16),  # one sequence, cut into as many splits as there are parts
    Case((700, 701), s_q=8, h_q=128, causal=True),  # 1,024 rows that share a KV head
    Case((70,) * 150, h_q=4),  # many more sequences than parts
    Case((5000,) + (1,) * 40, h_q=20),  # one that outlasts the rest of its batch
    Case((700, 300), s_q=4, h_q=48, causal=True),  # a token fills no tile
    Case((700, 64), s_q=7, h_q=73, causal=True),  # a tile of one head of each token
    Case((9000,), s_q=4, h_q=20, causal=True),  # tiles of 60 rows and of 20, cut into many splits
    Case((9000, 40), s_q=3, h_q=21, h_kv=3, causal=True),  # 21 rows for each KV head
    Case((300, 7), s_q=128, h_q=4, causal=True),  # more query tokens than keys
    Case((300,), s_q=300, h_q=128, causal=True),  # more tiles than a GPU has SMs
]
ALL = HEADS + QUERY_LENGTHS + KV_HEADS + HEADS_OF_SEVERAL_TOKENS + LAYOUTS + FLOAT16 + EXTREMES


@pytest.mark.parametrize("case", ALL, ids=str)
def test_decode_agrees_with_the_naive_attention(case, device):
    """Known failures 2, 4, 6, 9, 10: empty rows, query lengths, NaN in unused memory, heads, strides."""
    inputs = make_inputs(case, device)
    assert_agree(run(case, inputs), expected(case, inputs))


@pytest.mark.parametrize("case", [Case(MIXED, dtype=torch.float32, h_q=3)], ids=str)
def test_float32_on_the_cpu_is_exact_to_float32(case):
    inputs = make_inputs(case, torch.device("cpu"))
    got, want = run(case, inputs), expected(case, inputs)
    torch.testing.assert_close(got[0].double(), want[0], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(got[1].double(), want[1], rtol=1e-6, atol=1e-6)


def test_length_zero_gives_zero_and_inf(device):
    """Known failures 2, 8: a padded row of a CUDA graph, or a rank's empty share of a context."""
    case = Case((0, 64), s_q=2, h_q=16)
    out, lse = run(case, make_inputs(case, device))
    assert torch.all(out[0] == 0)
    assert torch.all(lse[0] == torch.inf)
    assert torch.all(lse[1].isfinite())


def test_causal_query_before_the_first_key_gives_zero_and_inf(device):
    """Known failure 4: of 4 query tokens over 3 keys the first sees none, the last sees 3."""
    case = Case((3,), s_q=4, h_q=16, causal=True)
    inputs = make_inputs(case, device)
    out, lse = run(case, inputs)
    assert torch.all(out[0, 0] == 0)
    assert torch.all(lse[0, :, 0] == torch.inf)
    assert torch.all(lse[0, :, 1:].isfinite())
    only_key = inputs.k_cache[inputs.block_table[0, 0], 0, 0, :512]
    torch.testing.assert_close(out[0, 1], only_key.expand(16, 512), rtol=0, atol=0)


def test_float32_scores_keep_one_overwhelming_key(device):
    """Scores of hundreds: the softmax must subtract the largest, across splits too."""
    case = Case((3000,), h_q=16)
    inputs = make_inputs(case, device)
    inputs.q_nope.mul_(30)
    assert_agree(run(case, inputs), expected(case, inputs))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("batch_invariant", [False, True])
@pytest.mark.parametrize("parts", [None, 1, 3])
@pytest.mark.parametrize("growth", [1, 6, 20])
@pytest.mark.parametrize("h_q", [16, 32, 128])
def test_scores_that_outgrow_those_of_every_page_before(h_q, growth, parts, batch_invariant, dtype, device):
    """By less than the softmax takes without rescaling (a factor of 2^8), by about that, by much more; in
    short splits, in whole sequences, in long splits."""
    case = Case((9000, 500, 64), h_q=h_q, dtype=dtype)
    inputs = make_inputs(case, device)
    add_growing_scores(inputs, growth)
    assert_agree(run(case, inputs, batch_invariant, parts), expected(case, inputs))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("h_q", [16, 32, 128])
def test_many_keys_far_below_one_that_outweighs_them_keep_their_share(h_q, dtype, device):
    """Of 1.3 %, each 2^18 times less than that one: relative to it a float16 would have 6 bits left."""
    case = Case((4096,), h_q=h_q, dtype=dtype)
    inputs = make_inputs(case, device)
    log2_weights = torch.full((4096,), 7.8, device=device)
    log2_weights[:64], log2_weights[64 + 7] = 0, 26  # outgrown in the second page
    pages = inputs.block_table[0, : 4096 // PAGE_SIZE].long()
    inputs.q_nope.zero_()
    inputs.q_pe.zero_()[..., 0] = 1
    scores = log2_weights * math.log(2) / SCALE
    inputs.k_cache[pages, :, 0, 512] = scores.to(dtype).view(-1, PAGE_SIZE)
    inputs.k_cache[pages, :, 0, :512] = (log2_weights == log2_weights[-1]).to(dtype).view(-1, PAGE_SIZE, 1)
    assert_agree(run(case, inputs, parts=1), expected(case, inputs))


@pytest.mark.parametrize("batch_invariant", [False, True])
@pytest.mark.parametrize("h_q", [16, 20, 128])
def test_nan_in_a_key_that_is_seen_makes_the_result_nan(h_q, batch_invariant, device):
    """Of its own sequence, and however many splits that has: a wrong model is not to look right."""
    case = Case((9000, 700, 130, 64), h_q=h_q)
    inputs = make_inputs(case, device)
    for seq in (0, 1, 3):
        inputs.k_cache[inputs.block_table[seq, 0], 5] = torch.nan
    out, lse = run(case, inputs, batch_invariant)
    for seq in range(4):
        is_hit = seq != 2
        assert torch.all(out[seq].isnan() == is_hit)
        assert torch.all(lse[seq].isnan() == is_hit)


def test_flashmlas_quick_start(device):
    """FlashMLA's own call, q in one tensor, gives what the backend's entry gives."""
    case = Case(MIXED, s_q=2, h_q=16, causal=True)
    inputs = make_inputs(case, device)
    metadata = get_mla_metadata(inputs.cache_seqlens, case.s_q * case.h_q // case.h_kv, case.h_kv)
    got = flash_mla_with_kvcache(
        inputs.q, inputs.k_cache, inputs.block_table, inputs.cache_seqlens, 512, *metadata, causal=True
    )
    want = run(case, inputs)
    assert torch.equal(got[0], want[0])
    assert torch.equal(got[1], want[1])


def test_plan_made_at_the_first_call_serves_the_next(device):
    """FlashMLA's later style: get_mla_metadata() without arguments."""
    case = Case(MIXED, h_q=16)
    inputs = make_inputs(case, device)
    plan, nothing = get_mla_metadata()
    assert nothing is None
    tensors = (inputs.q, inputs.k_cache, inputs.block_table, inputs.cache_seqlens)
    first = flash_mla_with_kvcache(*tensors, 512, plan)
    metadata = plan.tile_scheduler_metadata
    second = flash_mla_with_kvcache(*tensors, 512, plan)
    assert plan.tile_scheduler_metadata is metadata, "planned once"
    assert_agree(first, expected(case, inputs))
    assert torch.equal(first[0], second[0])


def test_on_a_cpu_a_plan_for_other_heads_serves():
    """The README says so: it has the same 16 parts, and takes every page once."""
    case = Case((500, 1, 200), h_q=16)
    inputs = make_inputs(case, torch.device("cpu"))
    plan, splits = get_mla_metadata(inputs.cache_seqlens, 128, 1, 128)
    assert not torch.equal(plan, get_mla_metadata(inputs.cache_seqlens, 16, 1, 16)[0])
    tensors = (inputs.q, inputs.k_cache, inputs.block_table, inputs.cache_seqlens)
    assert_agree(flash_mla_with_kvcache(*tensors, 512, plan, splits), expected(case, inputs))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("h_q", [16, 20, 44, 128])
def test_sequences_with_different_query_lengths_agree_with_one_at_a_time(h_q, causal, device):
    """Known failure 4: drafts of different lengths in one batch, with their own causal limits."""
    query_lens = (1, 8, 0, 3, 1, 2, 8, 5)
    case = Case((700, 3000, 64, 2, 0, 65, 7, 1000), s_q=8, h_q=h_q, causal=causal)
    inputs = make_inputs(case, device)
    for i, (query_len, got) in enumerate(zip(query_lens, run_ragged(case, inputs, query_lens), strict=True)):
        one = slice(i, i + 1)
        want = naive_attention(
            inputs.q[one, :query_len],
            inputs.k_cache,
            inputs.block_table[one],
            inputs.cache_seqlens[one],
            SCALE,
            causal,
        )
        assert_agree(got, want)


@pytest.mark.parametrize("h_q", [12, 72])
def test_different_query_lengths_with_several_kv_heads(h_q, device):
    query_lens = (2, 0, 5)
    case = Case((700, 64, 3), s_q=5, h_q=h_q, h_kv=3, causal=True)
    inputs = make_inputs(case, device)
    for i, (query_len, got) in enumerate(zip(query_lens, run_ragged(case, inputs, query_lens), strict=True)):
        tensors = (inputs.k_cache, inputs.block_table[i : i + 1], inputs.cache_seqlens[i : i + 1])
        assert_agree(got, naive_attention(inputs.q[i : i + 1, :query_len], *tensors, SCALE, True))


@pytest.mark.parametrize("h_q", [5, 16, 20, 44, 128])
@pytest.mark.parametrize("splits", [2, 3, 7, 8, 9, 10, 11, 13, 14, 16, 17, 24, 25, 32, 33, 66])
def test_any_number_of_splits_is_merged(splits, h_q, device):
    """Two, few and many are merged in different ways; the last page and the last 8 rows need not be full."""
    parts = num_parts(device, 1, h_q, 1)
    if splits > parts:
        pytest.skip(f"there are {parts} parts here")
    others = ()
    if is_few(h_q):  # sequences of WHOLE_PAGES would stay whole
        pages_of_each = FEW_PAGES if splits * FEW_PAGES > WHOLE_PAGES else WHOLE_PAGES
    elif is_full(h_q) and TWO_PAGE_SPLITS < splits <= 2 * TWO_PAGE_SPLITS:
        pages_of_each = 2  # of one page each they would take two, and be half as many
        if left := parts % splits:
            others = (left * pages_of_each * PAGE_SIZE,)
    else:  # and those on which a merge would save nothing
        pages_of_each = 1 if splits > PARTIAL_COST + 1 else PARTIAL_COST + 1
    of_so_many = (splits * pages_of_each * PAGE_SIZE - 5,) * (parts // splits)
    case = Case(of_so_many + others, h_q=h_q)
    inputs = make_inputs(case, device)
    _, num_splits = get_mla_metadata(inputs.cache_seqlens, h_q, 1)
    assert num_splits.diff().tolist()[: len(of_so_many)] == [splits] * len(of_so_many)
    assert_agree(run(case, inputs), expected(case, inputs))


@pytest.mark.parametrize("h_q", [16, 32])
def test_splits_of_one_page_are_merged_though_no_plan_for_few_rows_has_so_many(h_q, device):
    """A plan made for many rows is right for few, too: with a page a part one consumer scores none."""
    parts = num_parts(device, 1, h_q, 1)
    case = Case((parts * PAGE_SIZE - 5,), h_q=h_q)
    inputs = make_inputs(case, device)
    assert schedule.plan(case.lengths, parts, 0, PLAIN_ROWS)[1].tolist() == [0, parts]
    assert_agree(run(case, inputs, parts=parts), expected(case, inputs))


@pytest.mark.parametrize("h_q", [5, 16, 20, 32, 64, 128])
@pytest.mark.parametrize("case", CUT, ids=str)
def test_splits_are_merged_whether_or_not_the_last_ones_part_goes_on(case, h_q, device):
    """A part that goes on with another sequence leaves the merge to those that end with it."""
    lengths, parts, count, goes_on = case
    splits = schedule.splits_of(schedule.plan(lengths, parts, 0, PLAIN_ROWS)[0], lengths)
    last_seq = {split.part: split.seq for split in splits}  # of each part
    last = next(one for one in splits if one.splits > 1 and one.split == one.splits - 1)
    assert last.splits == count and (last_seq[last.part] != last.seq) == goes_on
    case = Case(lengths, h_q=h_q)
    inputs = make_inputs(case, device)
    assert_agree(run(case, inputs, parts=parts), expected(case, inputs))


@pytest.mark.parametrize(
    "b, s_q, h_q", [(1, 1, 128), (128, 1, 20), (300, 4, 20), (2, 3, 5), (30, 4, 40), (1, 3, 96)]
)
def test_partial_results_take_no_more_memory_than_flashmlas(b, s_q, h_q):
    """Which has room for as many as there are sequences and parts."""
    parts, nothing = 132, torch.empty(0)
    out, lse = torch.empty(b, s_q, h_q, 512, device="meta"), torch.empty(b, h_q, s_q, device="meta")
    table, plan = torch.empty(b, 70, device="meta"), torch.empty(parts, 8, device="meta")
    k_cache = torch.empty(1, PAGE_SIZE, 1, 576, device="meta")
    args = DecodeArguments(nothing, nothing, k_cache, table, nothing, None, s_q, plan, out, lse, SCALE, False)
    taken = sum(partial.numel() for partial in empty_partials(args))
    assert taken <= (b + parts) * (out[0].numel() + lse[0].numel())


def benchmark_cases(on_gpu: bool, quick: bool) -> list[Case]:
    """FlashMLA's benchmark: fixed lengths, then lengths normal around s_k with half of it as deviation."""
    if not on_gpu:
        b, key_lengths, heads, query_lengths = 4, (512,), (16, 64), (1, 2)
    elif quick:
        b, key_lengths, heads, query_lengths = 128, (4096,), (16, 128), (1,)
    else:
        b, key_lengths, heads, query_lengths = 128, (4096, 8192), (16, 32, 64, 128), (1, 2)
    cases = []
    for s_k, h_q, s_q, varies in itertools.product(key_lengths, heads, query_lengths, (False, True)):
        lengths = torch.full((b,), float(s_k))
        if varies:
            lengths += torch.randn(b, generator=torch.Generator().manual_seed(0)) * s_k / 2
        cases.append(Case(tuple(lengths.int().clamp_min(s_q).tolist()), s_q=s_q, h_q=h_q, causal=True))
    return cases


def milliseconds(step: Callable[[], None], on_gpu: bool, repeats: int) -> float:
    """Mean time of `step`: replays of a CUDA graph on a GPU, calls on a CPU."""
    if not on_gpu:
        step()
        start = time.perf_counter()
        for _ in range(repeats):
            step()
        return (time.perf_counter() - start) * 1e3 / repeats
    graph = captured(step)
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    graph.replay()
    start.record()
    for _ in range(repeats):
        graph.replay()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / repeats


def benchmark_row(case: Case, device: torch.device) -> tuple[float, float, float]:
    """Check one case, then time its decode: milliseconds, TFLOPS, GB/s."""
    inputs, on_gpu = make_inputs(case, device), device.type == "cuda"
    assert_agree(run(case, inputs), expected(case, inputs, torch.float32))
    plan = get_mla_metadata(inputs.cache_seqlens, case.s_q * case.h_q, 1)
    out, lse = nan_results(case, device)

    def step() -> None:
        tensors = (inputs.q_nope, inputs.q_pe, inputs.k_cache, inputs.block_table, inputs.cache_seqlens)
        flash_mla_decode(*tensors, *plan, SCALE, case.causal, out, lse)

    ms = milliseconds(step, on_gpu, repeats=50 if on_gpu else 5)
    tokens, rows = sum(case.lengths), len(case.lengths) * case.s_q * case.h_q
    flops = 2 * case.h_q * case.s_q * tokens * (576 + 512)
    moved = tokens * 576 * 2 + rows * (576 + 512) * 2
    return ms, flops / ms / 1e9, moved / ms / 1e6


def main() -> int:
    """Check and time the benchmark cases; the exit status is 1 if any of them is wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a few of the cases")
    quick = parser.parse_args().quick
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    on_gpu = device.type == "cuda"
    where = torch.cuda.get_device_name(device) if on_gpu else "no GPU here: small cases on the CPU"
    print(f"{where}; kernels: {provider_for(device).name}; bfloat16, causal, checked against float32")
    print(
        f"{'b':>4} {'mean s_k':>8} {'lengths':>8} {'s_q':>4} {'h_q':>4} {'ms':>9} {'TFLOPS':>8} {'GB/s':>7}"
    )
    wrong = 0
    for case in benchmark_cases(on_gpu, quick):
        b, kind = len(case.lengths), "fixed" if len(set(case.lengths)) == 1 else "variable"
        row = f"{b:>4} {sum(case.lengths) // b:>8} {kind:>8} {case.s_q:>4} {case.h_q:>4}"
        try:
            ms, tflops, gbs = benchmark_row(case, device)
            print(f"{row} {ms:>9.4f} {tflops:>8.2f} {gbs:>7.1f}", flush=True)
        except AssertionError as error:
            wrong += 1
            print(f"{row} WRONG: {error}", flush=True)
    print(f"{wrong} wrong" if wrong else "all right")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
