"""What holds of decode on a Hopper GPU alone: graphs, streams, other devices, plans that do not fit."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from mla_cases import (
    MIXED,
    SCALE,
    Case,
    assert_agree,
    captured,
    expected,
    make_inputs,
    nan_results,
    plan_for,
    run,
    run_ragged,
)

from vllm_flashmla_backend.flash_mla import (
    flash_mla_decode,
    flash_mla_decode_varlen,
    flash_mla_with_kvcache,
    get_mla_metadata,
    providers,
)
from vllm_flashmla_backend.flash_mla.planning import plan_into
from vllm_flashmla_backend.flash_mla.providers import CHOICE_VARIABLE

pytestmark = pytest.mark.gpu


def test_calls_on_two_streams_do_not_disturb_each_other():
    """Blocks wait for the splits of their own call."""
    gpu = torch.device("cuda", 0)
    cases = Case((3000,) * 8), Case((20_000,), h_q=128)
    inputs = [make_inputs(case, gpu) for case in cases]
    alone = [run(case, given) for case, given in zip(cases, inputs, strict=True)]
    streams = [torch.cuda.Stream(gpu) for _ in cases]
    torch.cuda.synchronize()
    together = []
    for _ in range(100):
        for i, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                together.append((i, run(cases[i], inputs[i])))
    torch.cuda.synchronize()
    for i, (out, lse) in together:
        assert torch.equal(out, alone[i][0]) and torch.equal(lse, alone[i][1])


@pytest.mark.parametrize("batch_invariant", [False, True])
@pytest.mark.parametrize(("s_q", "h_q"), [(1, 40), (4, 16), (1, 12), (2, 60)])
def test_nan_in_the_scratch_reaches_no_result(s_q, h_q, batch_invariant, monkeypatch):
    """Rows of padding, and of query tokens that a sequence does not have, may be read along with others."""
    case = Case((300, 1100, 700, 9000) * 40, s_q=s_q, h_q=h_q, causal=True)
    inputs = make_inputs(case, torch.device("cuda", 0))
    query_lens = (s_q, 1, 0, 1) * 40
    want = run_ragged(case, inputs, query_lens, batch_invariant)
    empty = providers.empty_partials
    monkeypatch.setattr(
        providers, "empty_partials", lambda args: [partial.fill_(torch.nan) for partial in empty(args)]
    )
    for got, wanted in zip(run_ragged(case, inputs, query_lens, batch_invariant), want, strict=True):
        assert torch.equal(got[0], wanted[0])
        assert torch.equal(got[1], wanted[1])


@pytest.mark.parametrize("kernels", ["reference", "flash_mla"])
def test_other_kernels_agree_on_the_gpu(kernels, monkeypatch):
    if kernels == "flash_mla" and not any(map(importlib.util.find_spec, ("flash_mla", "vllm"))):
        pytest.skip("neither flash_mla nor vLLM is installed")
    monkeypatch.setenv(CHOICE_VARIABLE, kernels)
    case = Case((1, 64, 700, 3000), h_q=16)
    inputs = make_inputs(case, torch.device("cuda", 0))
    # FlashMLA multiplies what lies past the length in the last page by zero: give it numbers there.
    inputs.k_cache.nan_to_num_(0.0)
    inputs.block_table.clamp_(0, inputs.k_cache.shape[0] - 1)
    assert_agree(run(case, inputs), expected(case, inputs))


@pytest.mark.parametrize("plan_in_graph", [True, False])
def test_replayed_graph_follows_new_lengths(plan_in_graph):
    """Known failures 1, 2: one captured graph, other lengths, padded rows, equal to eager bit for bit."""
    gpu = torch.device("cuda", 0)
    largest = Case((3000,) * 8, h_q=16)
    static = make_inputs(largest, gpu)
    plan = get_mla_metadata(static.cache_seqlens, 16, 1)
    out, lse = nan_results(largest, gpu)

    def step() -> None:
        if plan_in_graph:
            plan_into(static.cache_seqlens, *plan, 16)
        q = (static.q_nope, static.q_pe)
        flash_mla_decode(
            *q, static.k_cache, static.block_table, static.cache_seqlens, *plan, SCALE, False, out, lse
        )

    graph = captured(step)
    for seed, lengths in enumerate([(1, 2500, 64, 65, 0, 0, 0, 0), (3000,) * 8, (0,) * 8, (700,) * 7 + (0,)]):
        case = Case(lengths, h_q=16)
        fresh = make_inputs(case, gpu, seed)
        static.q_nope.copy_(fresh.q_nope)
        static.q_pe.copy_(fresh.q_pe)
        static.k_cache.fill_(torch.nan)[: fresh.k_cache.shape[0]] = fresh.k_cache
        static.block_table.fill_(-1)[:, : fresh.block_table.shape[1]] = fresh.block_table
        static.cache_seqlens.copy_(fresh.cache_seqlens)
        out.fill_(torch.nan)
        lse.fill_(torch.nan)
        if not plan_in_graph:
            plan_into(static.cache_seqlens, *plan, 16)
        graph.replay()
        eager = run(case, fresh)
        assert torch.equal(out, eager[0])
        assert torch.equal(lse, eager[1])


@pytest.mark.parametrize(
    "case",
    [
        Case((3000,) * 8),
        Case((5000,) * 130),
        Case((10,) * 3000),  # one query right behind the other
        Case(tuple(1 + i * 7919 % 9000 for i in range(300)), h_q=32),
        Case((20_000,), h_q=128),
        Case((500,) * 30, h_q=128),
        Case((5000,) * 9, s_q=4, h_q=40),
        Case((16_600,), h_q=67),  # as many splits as there are parts
    ],
    ids=str,
)
def test_repeated_calls_are_equal_bit_for_bit(case):
    """A race between warps or copies may show in one call of a hundred, and within the bounds."""
    inputs = make_inputs(case, torch.device("cuda", 0))
    first = run(case, inputs)
    for _ in range(100):
        again = run(case, inputs)
        assert torch.equal(again[0], first[0])
        assert torch.equal(again[1], first[1])


@pytest.mark.parametrize("batch_invariant", [False, True])
@pytest.mark.parametrize(("h_q", "h_kv"), [(16, 1), (32, 1), (64, 1), (128, 1), (32, 2)])
@pytest.mark.parametrize(
    "batches",
    [
        [(length,) * 8 for length in (3000, 40, 3000, 200)],
        [(0, length) * 200 for length in (700, 40, 700)],  # parts begin with a sequence without a page
    ],
    ids=["cut", "many"],
)
def test_pages_that_lay_elsewhere_in_the_launch_before(batches, h_q, h_kv, batch_invariant):
    """Blocks guess that their first page lies where it did; then the same sequences lie in other pages, or in
    so few that what was guessed is past the cache's end. A guess shows in times alone, never in results."""
    gpu = torch.device("cuda", 0)
    cases = [Case(lengths, h_q=h_q, h_kv=h_kv) for lengths in batches]
    inputs = [make_inputs(case, gpu, seed) for seed, case in enumerate(cases)]
    plans = [plan_for(case, given, batch_invariant) for case, given in zip(cases, inputs, strict=True)]
    plan = [part.clone() for part in plans[0]]  # one place for all: by that blocks tell plans apart

    def decode(i: int) -> tuple[torch.Tensor, torch.Tensor]:
        for planned, new in zip(plan, plans[i], strict=True):
            planned.copy_(new)
        given = inputs[i]
        tensors = (given.q_nope, given.q_pe, given.k_cache, given.block_table, given.cache_seqlens)
        return flash_mla_decode(*tensors, *plan, SCALE, False, batch_invariant=batch_invariant)

    first = [decode(i) for i in range(len(cases))]
    for results, case, given in zip(first, cases, inputs, strict=True):
        assert_agree(results, expected(case, given))
    for i in (2, 0, 1, len(cases) - 1, 0):
        out, lse = decode(i)
        assert torch.equal(out, first[i][0]) and torch.equal(lse, first[i][1])


@pytest.mark.parametrize("told", [{}, {"num_heads_q": 37}], ids=["rows", "heads"])
def test_a_plan_need_not_know_the_heads(told):
    """FlashMLA's callers give rows alone: 185 of them are 3 tiles, but 5 tokens of 37 heads are 4. Where the
    plan was made for 3, the last tile, which has fewer heads, is launched after the others."""
    case = Case((3000, 45, 700), s_q=5, h_q=37, causal=True)
    inputs = make_inputs(case, torch.device("cuda", 0))
    plan = get_mla_metadata(inputs.cache_seqlens, 5 * 37, 1, **told)
    sms = torch.cuda.get_device_properties(0).multi_processor_count
    assert plan[0].shape[0] == sms // (4 if told else 3)
    tensors = (inputs.q, inputs.k_cache, inputs.block_table, inputs.cache_seqlens)
    assert_agree(flash_mla_with_kvcache(*tensors, 512, *plan, causal=True), expected(case, inputs))


@pytest.mark.parametrize("batch_invariant", [False, True])
@pytest.mark.parametrize("lengths", [(200, 130), (130, 0)], ids=str)
def test_plan_of_another_batch_stays_within_the_call(lengths, batch_invariant):
    """Nothing is read back from a GPU, so a foreign plan is not seen; it must touch no foreign memory."""
    gpu = torch.device("cuda", 0)
    case = Case(lengths)
    inputs = make_inputs(case, gpu)
    # More sequences than parts, so that parts go on.
    foreign, _ = get_mla_metadata(torch.full((200,), 5000, dtype=torch.int32, device=gpu), 16, 1)
    _, num_splits = get_mla_metadata(inputs.cache_seqlens, 16, 1)
    around = torch.full((6, 1, 16, 512), torch.nan, dtype=case.dtype, device=gpu)
    tensors = (inputs.q_nope, inputs.q_pe, inputs.k_cache, inputs.block_table, inputs.cache_seqlens)
    mode = {"batch_invariant": batch_invariant}
    flash_mla_decode(*tensors, foreign, num_splits, SCALE, False, around[2:4], **mode)
    torch.cuda.synchronize()
    assert around[:2].isnan().all() and around[4:].isnan().all()


@pytest.mark.parametrize("batch_invariant", [False, True])
@pytest.mark.parametrize(
    "begins", [(0, 3, 3, 8), (0, 500, -7, 8), (0, 8, -(2**31), 8), (0, 2**31 - 1, 2**31 - 1, 2**31 - 1)]
)
def test_wild_query_lengths_and_a_foreign_plan_stay_within_a_ragged_call(begins, batch_invariant):
    """Neither is read back from a GPU: rows may be wrong, but no foreign memory is touched."""
    gpu, lengths = torch.device("cuda", 0), (200, 130, 700)
    case = Case(lengths, s_q=4, causal=True)
    inputs = make_inputs(case, gpu)
    foreign, _ = get_mla_metadata(make_inputs(Case((5000,) * 40), gpu).cache_seqlens, 4 * 16, 1)
    _, num_splits = get_mla_metadata(inputs.cache_seqlens, 4 * 16, 1)
    around = torch.full((12, 16, 512), torch.nan, dtype=case.dtype, device=gpu)
    flash_mla_decode_varlen(
        inputs.q_nope.flatten(0, 1)[:8],
        inputs.q_pe.flatten(0, 1)[:8],
        *(inputs.k_cache, inputs.block_table, inputs.cache_seqlens),
        torch.tensor(begins, dtype=torch.int32, device=gpu),
        4,
        *(foreign, num_splits),
        SCALE,
        True,
        around[2:10],
        batch_invariant=batch_invariant,
    )
    torch.cuda.synchronize()
    assert around[:2].isnan().all() and around[10:].isnan().all()


def test_second_gpu_of_a_process_decodes_too():
    if torch.cuda.device_count() < 2:
        pytest.skip("there is one GPU")
    case = Case(MIXED, h_q=16)
    for index in (0, 1):
        inputs = make_inputs(case, torch.device("cuda", index))
        assert_agree(run(case, inputs), expected(case, inputs))


def test_pages_past_two_to_the_32_elements():
    """Known failure 11: page 116,509 begins past element 2^32, page 58,255 past 2^31 and byte 2^32."""
    case, gpu = Case((200, 130), h_q=16), torch.device("cuda", 0)
    small = make_inputs(case, gpu)
    first = 116_600
    k_cache = torch.full(
        (first + small.k_cache.shape[0], 64, 1, 576), torch.nan, dtype=case.dtype, device=gpu
    )
    assert first * k_cache.stride(0) > 2**32
    k_cache[first:] = small.k_cache
    k_cache[58_300:58_302] = small.k_cache[small.block_table[0, :2]]
    block_table = small.block_table + first
    block_table[0, :2] = torch.tensor([58_300, 58_301], dtype=torch.int32, device=gpu)
    plan = get_mla_metadata(small.cache_seqlens, 16, 1)
    got = flash_mla_with_kvcache(small.q, k_cache, block_table, small.cache_seqlens, 512, *plan)
    assert_agree(got, expected(case, small))


def test_decode_never_waits_for_the_gpu():
    """No host synchronisation in planning or decoding: torch raises on each one that it makes."""
    case = Case(MIXED, h_q=16)
    inputs = make_inputs(case, torch.device("cuda", 0))
    run(case, inputs)
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(case, inputs)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.slow
@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "synccheck"])
def test_compute_sanitizer_is_clean(tool):
    """Known failure 2: no access outside of a tensor; no race in shared memory; no misuse of barriers."""
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    sanitizer = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path=f"{home}/bin")
    if sanitizer is None:
        pytest.skip("compute-sanitizer is not installed")
    sweep = Path(__file__).with_name("sanitizer_sweep.py")
    command = [sanitizer, "--tool", tool, "--error-exitcode", "99", sys.executable, str(sweep)]
    # Without torch's caching every tensor has its own allocation, and reads past its end are seen.
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=580)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-2000:]
