"""The planner kernel writes what `schedule.plan` specifies, byte for byte."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mla_cases import PLAIN_ROWS
from plan_strategies import LENGTHS, PARTS

from vllm_flashmla_backend.flash_mla.layout import TILE_ROWS
from vllm_flashmla_backend.flash_mla.planning import plan_into
from vllm_flashmla_backend.flash_mla.schedule import PAGE_SIZE, plan

# query rows, chunk_level
MODES = [(128, 0), (PLAIN_ROWS, 0), (TILE_ROWS, 0), (16, 0), (16, 1), (16, 2), (TILE_ROWS, 2), (128, 2)]


def assert_kernel_plans_the_same(lengths: list[int], parts: int, rows: int, chunk_level: int) -> None:
    metadata = torch.full((parts, 8), -7, dtype=torch.int32, device="cuda")
    num_splits = torch.full((len(lengths) + 1,), -7, dtype=torch.int32, device="cuda")
    plan_into(
        torch.tensor(lengths, dtype=torch.int32, device="cuda"), metadata, num_splits, rows, chunk_level
    )
    want = plan(lengths, parts, chunk_level, rows)
    assert torch.equal(metadata.cpu(), want[0]), (lengths, parts, rows, chunk_level)
    assert torch.equal(num_splits.cpu(), want[1]), (lengths, parts, rows, chunk_level)


@pytest.mark.gpu
@pytest.mark.parametrize("parts", [1, 2, 33, 66, 132, 600])
@pytest.mark.parametrize("batch", [1, 2, 32, 33, 128, 512, 513, 3000])
def test_planner_kernel_gives_the_same_bytes(batch, parts):
    generator = torch.Generator().manual_seed(batch * parts)
    for longest in (1, 65, 300, 8192, 10**6):
        lengths = torch.randint(0, longest + 1, (batch,), generator=generator).tolist()
        for mode in MODES:
            assert_kernel_plans_the_same(lengths, parts, *mode)
            assert_kernel_plans_the_same([longest] * batch, parts, *mode)
            assert_kernel_plans_the_same([*lengths[:-1], 50 * longest], parts, *mode)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "lengths",
    [
        [512] * 461 + list(range(4801, 4865)),
        [64] * 452 + list(range(1921, 1985)),
        [320] * 505 + [2560] * 14 + [320] * 80,
    ],
)
def test_planner_kernel_writes_the_row_of_a_part_that_is_idle_between_its_rounds(lengths):
    """The 512th sequence ends in a part's share and the next one's middle lies behind that share."""
    assert_kernel_plans_the_same(lengths, 132, 128, 0)


@pytest.mark.parametrize(
    "lengths, parts, fires",
    [
        ([1280] * 4 + [0] * 2, 132, True),
        ([0] * 40 + [1280] * 4, 132, True),  # more than a warp of sequences, the long ones in its second
        ([64] * 540 + [1280] * 6 + [0] * 10, 700, True),  # and behind all threads' first
        ([26 * PAGE_SIZE] * 3 + [40 * PAGE_SIZE], 132, False),
        ([0] * 40 + [1280] * 4, 250, True),  # 120 parts were busy
        ([0] * 40 + [1280] * 4, 300, False),
        ([1280] * 3, 150, False),  # 60: not more than two fifths
        ([1280] * 3, 149, True),
    ],
)
def test_planner_kernel_takes_two_pages_where_the_specification_does(lengths, parts, fires, device):
    changes = not torch.equal(plan(lengths, parts)[1], plan(lengths, parts, 0, PLAIN_ROWS)[1])
    assert changes == fires
    if device.type == "cuda":
        assert_kernel_plans_the_same(lengths, parts, TILE_ROWS, 0)


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [16, 64, 128])
@pytest.mark.parametrize("parts", [16, 66, 132])
def test_planner_kernel_keeps_equal_sequences_whole_where_the_specification_does(parts, rows):
    for batch in (parts // 2 + 1, 2 * parts // 3, parts - 2, 3 * parts // 2, 2 * parts - 2):
        for pages in (12, 16, 24, 32, 64):
            assert_kernel_plans_the_same([pages * PAGE_SIZE] * batch, parts, rows, 0)


@pytest.mark.gpu
@settings(deadline=None, max_examples=300)
@given(LENGTHS, PARTS, st.sampled_from(MODES))
def test_planner_kernel_gives_the_same_bytes_for_any_batch(lengths, parts, mode):
    assert_kernel_plans_the_same(lengths, parts, *mode)


@pytest.mark.gpu
@pytest.mark.parametrize("parts, batch", [(16, 512), (132, 128)])
@pytest.mark.parametrize("mode", MODES)
def test_planner_kernel_stays_within_its_buffers_whatever_the_lengths(mode, parts, batch):
    """Pages beyond what it can count: rows may be wrong, but none is written elsewhere."""
    around = torch.full((parts + 32, 8), -7, dtype=torch.int32, device="cuda")
    num_splits = torch.full((batch + 3,), -7, dtype=torch.int32, device="cuda")
    lengths = torch.full((batch,), 2**31 - 1, dtype=torch.int32, device="cuda")
    plan_into(lengths, around[16:-16], num_splits[1:-1], *mode)
    assert (around[:16] == -7).all() and (around[-16:] == -7).all()
    assert num_splits[0] == num_splits[-1] == -7
