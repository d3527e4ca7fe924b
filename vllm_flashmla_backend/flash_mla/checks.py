"""What the arguments of a call must satisfy; each failure is a `ValueError` that names the argument.

The checks of shapes, types and strides run for every layer of every decode step, so they take
microseconds and read no values. `check_values` reads the lengths, the table and the plan too: on a
CPU, where looking costs nothing.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import NoReturn

import torch

from .chunks import chunk_pages
from .layout import ceil_div
from .schedule import METADATA_WIDTH, PAGE_SIZE, Field, partial_slots, splits_of

HEAD_DIM_V = 512
HEAD_DIM_ROPE = 64
HEAD_DIM = HEAD_DIM_V + HEAD_DIM_ROPE

MAX_HEADS = 128
"""Query heads of a call, as many as the models have; no kernels are tested with more."""

DTYPES = {
    "cpu": (torch.bfloat16, torch.float16, torch.float32),
    "cuda": (torch.bfloat16, torch.float16),
}


def fail(name: str, came: object, expected: object) -> NoReturn:
    raise ValueError(f"{name}: got {came}, expected {expected}")


def check_rank(name: str, tensor: torch.Tensor, rank: int) -> None:
    if not isinstance(tensor, torch.Tensor):
        fail(name, type(tensor).__name__, f"a tensor of rank {rank}")
    if tensor.dim() != rank:
        fail(name, f"shape {tuple(tensor.shape)}", f"a tensor of rank {rank}")


def check_like(
    name: str, tensor: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> None:
    check_rank(name, tensor, len(shape))
    if tensor.shape != shape:
        fail(name, f"shape {tuple(tensor.shape)}", tuple(shape))
    if tensor.dtype != dtype:
        fail(name, tensor.dtype, dtype)
    check_same_device(name, tensor, device)


def check_same_device(name: str, tensor: torch.Tensor, device: torch.device) -> None:
    if tensor.device != device:
        fail(name, f"a tensor on {tensor.device}", f"one on {device}")


def check_device(name: str, tensor: torch.Tensor) -> None:
    if tensor.device.type not in DTYPES:
        fail(name, f"a tensor on {tensor.device}", f"one on {' or '.join(DTYPES)}")


def check_lengths(cache_seqlens: torch.Tensor) -> None:
    """(b,) int32, b of at least 1, contiguous."""
    check_rank("cache_seqlens", cache_seqlens, 1)
    if cache_seqlens.shape[0] == 0:
        fail("cache_seqlens", "no sequences", "at least one")
    if cache_seqlens.dtype != torch.int32:
        fail("cache_seqlens", cache_seqlens.dtype, torch.int32)
    check_device("cache_seqlens", cache_seqlens)
    check_contiguous("cache_seqlens", cache_seqlens)


def check_contiguous(name: str, tensor: torch.Tensor) -> None:
    if not tensor.is_contiguous():
        fail(name, f"strides {tensor.stride()}", "a contiguous tensor")


def check_last_dimension(name: str, tensor: torch.Tensor) -> None:
    """Contiguous; the other dimensions may have any stride."""
    if tensor.stride(-1) != 1 and tensor.shape[-1] > 1:
        fail(name, f"stride {tensor.stride(-1)} in the last dimension", "1 (the others may have any)")


def check_strides(name: str, tensor: torch.Tensor) -> None:
    """The last dimension contiguous; on a GPU also addresses of rows that are multiples of 16 bytes."""
    check_last_dimension(name, tensor)
    if not tensor.is_cuda:
        return
    if tensor.data_ptr() % 16:
        fail(name, f"data at address {tensor.data_ptr():#x}", "a multiple of 16 bytes")
    for stride, size in zip(tensor.stride()[:-1], tensor.shape[:-1], strict=True):
        if stride % 8 and size > 1:
            fail(name, f"strides {tensor.stride()}", "multiples of 8 elements: data moves 16 bytes at a time")


def check_not_expanded(name: str, tensor: torch.Tensor) -> None:
    """A place of its own for every value that is written, which an expanded tensor does not have."""
    strides = tensor.stride()
    if 0 in strides and any(n > 1 for stride, n in zip(strides, tensor.shape, strict=True) if stride == 0):
        fail(name, f"strides {tensor.stride()}", "none of 0, for each value needs a place of its own")


def check_heads(name: str, heads: int) -> None:
    if not 1 <= heads <= MAX_HEADS:
        fail(name, f"{heads} query heads", f"1 to {MAX_HEADS}")


def check_query(name: str, q: torch.Tensor, dimensions: str, head_dim: int) -> None:
    """Of these dimensions and the last, of a type that the device's kernels take, with fit strides."""
    check_rank(name, q, len(dimensions.split()) + 1)
    if q.shape[-1] != head_dim or 0 in q.shape:
        expected = ", ".join([*dimensions.split(), str(head_dim)])
        fail(name, f"shape {tuple(q.shape)}", f"({expected}), none of them 0")
    check_heads(name, q.shape[-2])
    check_device(name, q)
    dtypes = DTYPES[q.device.type]
    if q.dtype not in dtypes:
        fail(name, q.dtype, f"one of {', '.join(map(str, dtypes))} on {q.device.type}")
    check_strides(name, q)


def check_query_lengths(
    cu_seqlens_q: torch.Tensor, max_query_len: int, cache_seqlens: torch.Tensor, q_nope: torch.Tensor
) -> None:
    """Where each sequence's query tokens begin; their values only on a CPU."""
    check_lengths(cache_seqlens)
    if not isinstance(max_query_len, int) or max_query_len < 1:
        fail("max_query_len", repr(max_query_len), "an int of at least 1")
    check_rank("cu_seqlens_q", cu_seqlens_q, 1)
    check_like("cu_seqlens_q", cu_seqlens_q, (cache_seqlens.shape[0] + 1,), torch.int32, q_nope.device)
    check_contiguous("cu_seqlens_q", cu_seqlens_q)
    if q_nope.device.type != "cpu":
        return
    begins = cu_seqlens_q.tolist()
    lengths = [end - begin for begin, end in pairwise(begins)]
    if begins[0] != 0 or begins[-1] != q_nope.shape[0] or min(lengths) < 0:
        fail("cu_seqlens_q", begins, f"numbers that rise from 0 to q's {q_nope.shape[0]} tokens")
    if max(lengths) > max_query_len:
        fail("max_query_len", max_query_len, f"at least {max(lengths)}, which cu_seqlens_q has")


def check_cache(
    b: int,
    q: torch.Tensor,  # (b, s_q, h_q, d), or ragged (1, tokens, h_q, d)
    k_cache: torch.Tensor,
    block_table: torch.Tensor,
    cache_seqlens: torch.Tensor,
) -> None:
    """The paged cache and its table, of b sequences, against a q that is right."""
    h_q = q.shape[2]
    check_rank("k_cache", k_cache, 4)
    _, page_size, h_kv, head_dim = k_cache.shape
    if page_size != PAGE_SIZE or head_dim != HEAD_DIM or h_kv == 0:
        fail("k_cache", f"shape {tuple(k_cache.shape)}", f"(pages, {PAGE_SIZE}, h_kv, {HEAD_DIM})")
    if h_q % h_kv:
        fail("k_cache", f"{h_kv} KV heads", f"a divisor of q's {h_q} heads")
    if k_cache.dtype != q.dtype:
        fail("k_cache", k_cache.dtype, f"{q.dtype}, as q has")
    check_same_device("k_cache", k_cache, q.device)
    check_strides("k_cache", k_cache)

    check_rank("block_table", block_table, 2)
    check_like("block_table", block_table, (b, block_table.shape[1]), torch.int32, q.device)
    check_last_dimension("block_table", block_table)
    check_like("cache_seqlens", cache_seqlens, (b,), torch.int32, q.device)
    check_contiguous("cache_seqlens", cache_seqlens)


def check_plan_buffers(
    tile_scheduler_metadata: torch.Tensor,
    num_splits: torch.Tensor,
    parts: Sequence[int],  # how many there may be
    b: int,
    device: torch.device,
) -> None:
    """(parts, 8) and (b + 1,) int32, contiguous: a plan for another batch differs there, and on a GPU one for
    heads that have another number of parts."""
    check_rank("tile_scheduler_metadata", tile_scheduler_metadata, 2)
    rows = tile_scheduler_metadata.shape[0]
    rows = rows if rows in parts else parts[0]
    for name, tensor, shape in (
        ("tile_scheduler_metadata", tile_scheduler_metadata, (rows, METADATA_WIDTH)),
        ("num_splits", num_splits, (b + 1,)),
    ):
        check_like(name, tensor, shape, torch.int32, device)
        check_contiguous(name, tensor)
    if tile_scheduler_metadata.data_ptr() % (4 * METADATA_WIDTH):
        fail(
            "tile_scheduler_metadata",
            f"data at address {tile_scheduler_metadata.data_ptr():#x}",
            f"a multiple of {4 * METADATA_WIDTH} bytes: its rows are read whole",
        )


def check_bool(name: str, value: object) -> None:
    if not isinstance(value, bool):
        fail(name, repr(value), "True or False")


def check_not_served(is_fp8_kvcache: bool, sparse: str, tokens: object) -> None:
    """FlashMLA's arguments for an FP8 cache and for sparse attention (`sparse` names it) are left unset."""
    instead = "not served here, but by DeepSeek's flash_mla package and, in vLLM, by"
    if is_fp8_kvcache is not False:
        fail("is_fp8_kvcache", repr(is_fp8_kvcache), f"False: an FP8 cache is {instead} its own FLASHMLA")
    if tokens is not None:
        fail(sparse, type(tokens).__name__, f"None: sparse attention is {instead} FLASHMLA_SPARSE")


def check_softmax_scale(softmax_scale: float) -> None:
    """Finite and positive: a row's largest score is taken before scaling."""
    if not (isinstance(softmax_scale, (int, float)) and 0 < softmax_scale < math.inf):
        fail("softmax_scale", repr(softmax_scale), "a finite number above 0")


def check_values(
    k_cache: torch.Tensor,  # (pages, 64, h_kv, 576)
    block_table: torch.Tensor,  # (b, max_pages) int32
    cache_seqlens: torch.Tensor,  # (b,) int32
    tile_scheduler_metadata: torch.Tensor,  # (parts, 8) int32
    num_splits: torch.Tensor,  # (b + 1,) int32
    chunk_level: int = 0,
) -> None:
    """Lengths, the table's entries that they use, and the plan, on a CPU."""
    lengths = cache_seqlens.tolist()
    check_not_negative(lengths)
    pages = [ceil_div(length, PAGE_SIZE) for length in lengths]
    longest = max(pages)
    if longest > block_table.shape[1]:
        fail(
            "block_table",
            f"room for {block_table.shape[1]} pages per sequence",
            f"at least {longest}, since cache_seqlens has a length of {max(lengths)}",
        )
    used = torch.arange(longest) < torch.tensor(pages).unsqueeze(1)  # (b, longest) bool
    bad = used & ((block_table[:, :longest] < 0) | (block_table[:, :longest] >= k_cache.shape[0]))
    if bad.any():
        seq, column = bad.nonzero()[0].tolist()
        fail(
            "block_table",
            f"page {block_table[seq, column].item()} at [{seq}, {column}]",
            f"0 to {k_cache.shape[0] - 1}, the pages of k_cache",
        )
    if not _plan_covers(pages, lengths, tile_scheduler_metadata, num_splits, chunk_level):
        fail(
            "tile_scheduler_metadata, num_splits",
            "a plan for other lengths" + ", the other mode or other query tokens x heads" * (chunk_level > 0),
            f"one for cache_seqlens {lengths}"
            + (", with batch_invariant=True, of the call's query rows" if chunk_level > 0 else "")
            + ": plan anew when they change",
        )


def check_not_negative(lengths: list[int]) -> None:
    if min(lengths) < 0:
        fail("cache_seqlens", f"{min(lengths)} at [{lengths.index(min(lengths))}]", "lengths of 0 or more")


def _plan_covers(
    pages: list[int], lengths: list[int], metadata: torch.Tensor, num_splits: torch.Tensor, chunk_level: int
) -> bool:
    """Whether the plan's splits take every page of every sequence once, in order, each where it belongs."""
    batch, slots = len(pages), partial_slots(len(pages), metadata.shape[0], 0, 0)
    if metadata[:, Field.FIRST_SEQ].min() < 0 or metadata[:, Field.LAST_SEQ].max() >= batch:
        return False
    splits = splits_of(metadata, lengths)
    count = Counter(split.seq for split in splits)
    next_page, done, next_slot = [0] * batch, [0] * batch, 0
    for split in splits:
        begins_where_the_last_ended = split.page_begin == next_page[split.seq] <= split.page_end
        between_chunks = split.page_begin % chunk_pages(pages[split.seq], chunk_level) == 0
        if not between_chunks or (split.page_begin == split.page_end and pages[split.seq]):
            return False
        counted = split.split == done[split.seq] and split.splits == count[split.seq]
        if not begins_where_the_last_ended or not counted:
            return False
        if split.splits > 1:  # slots rise, along a sequence one by one: none is taken twice
            least = next_slot if split.split else max(next_slot, split.slot)
            if split.slot != least or split.slot >= slots:
                return False
            next_slot = split.slot + 1
        next_page[split.seq] = split.page_end
        done[split.seq] += 1
    return next_page == pages and 0 not in done and [0, *accumulate(done)] == num_splits.tolist()
