"""Decode in PyTorch, twice: over the plan, as the GPU kernels do it, and naively, to compare with.

`decode` walks the plan split by split and merges the splits, so that a machine without a GPU
exercises the planner, the page mapping and the merge for real. `naive_attention` knows nothing of
plans, splits or parts.
"""

from __future__ import annotations

import torch

from . import chunks
from .layout import ceil_div
from .schedule import PAGE_SIZE, Split, num_pages, splits_of


def decode(
    *,
    q_nope: torch.Tensor,  # (b, s_q, h_q, 512), or ragged (1, tokens, h_q, 512)
    q_pe: torch.Tensor,  # (b, s_q, h_q, 64), likewise
    k_cache: torch.Tensor,  # (pages, 64, h_kv, 576)
    block_table: torch.Tensor,  # (b, max_pages) int32
    cache_seqlens: torch.Tensor,  # (b,) int32
    cu_seqlens_q: torch.Tensor | None,  # (b + 1,) int32 if ragged
    max_query_len: int,  # s_q, or the largest of a ragged batch; not needed here
    tile_scheduler_metadata: torch.Tensor,  # (parts, 8) int32
    out: torch.Tensor,  # (b, s_q, h_q, 512) or (1, tokens, h_q, 512), written
    lse: torch.Tensor,  # (b, h_q, s_q) or (1, h_q, tokens) float32, written
    softmax_scale: float,
    causal: bool,
    chunk_level: int = 0,
) -> None:
    """Decode by the plan in float32: a partial result for each split, merged when a sequence has all.

    In the batch-invariant mode (`chunk_level` above 0, see `chunks`) it has one for each chunk instead.

    The values of the lengths and of the plan are read on the host, so on a GPU this waits for it.
    """
    lengths, num_kv_heads = cache_seqlens.tolist(), k_cache.shape[2]
    query_begin = cu_seqlens_q.tolist() if cu_seqlens_q is not None else None
    q = torch.cat([q_nope, q_pe], dim=-1).float() * softmax_scale  # (b, s_q, h_q, 576)
    partials = {}  # seq: a list of out (h_kv, s_q * group, 512) and lse (h_kv, s_q * group)

    for split in splits_of(tile_scheduler_metadata, lengths):
        if query_begin is None:
            entry, tokens = split.seq, slice(None)
        else:
            entry, tokens = 0, slice(query_begin[split.seq], query_begin[split.seq + 1])
        s_q = q[entry, tokens].shape[0]
        if s_q == 0:
            continue
        q_rows = _rows_by_kv_head(q[entry, tokens], num_kv_heads)  # (h_kv, s_q * group, 576)
        length, done = lengths[split.seq], partials.setdefault(split.seq, [])
        pieces, count = _pieces(split, num_pages(length), chunk_level)
        for begin, end in pieces:
            kv = _gather(k_cache, block_table[split.seq], begin, end, length)  # (h_kv, tokens, 576)
            hidden = None
            if causal and s_q > 1:
                hidden = _keys_after_query(
                    begin * PAGE_SIZE, kv.shape[1], length, s_q, q_rows.shape[1], q.device
                )
            done.append(_attend(q_rows, kv, hidden))
        if len(done) < count:
            continue
        rows = done[0]
        if count > 1:
            rows = combine(*(torch.stack(part) for part in zip(*done, strict=True)))
        out[entry, tokens] = _query_major(rows[0], s_q)
        lse[entry, :, tokens] = _query_major(rows[1].masked_fill(rows[1] == -torch.inf, torch.inf), s_q).T


def _pieces(split: Split, pages: int, chunk_level: int) -> tuple[list[tuple[int, int]], int]:
    """What is attended to at once: pages [begin, end) of the split, and how many such its sequence has."""
    if chunk_level == 0:
        return [(split.page_begin, split.page_end)], split.splits
    return (
        chunks.cut(split.page_begin, split.page_end, pages, chunk_level),
        chunks.num_chunks(pages, chunk_level),
    )


def _gather(
    k_cache: torch.Tensor,  # (pages, 64, h_kv, 576)
    table: torch.Tensor,  # (max_pages,) int32
    page_begin: int,
    page_end: int,
    length: int,
) -> torch.Tensor:  # (h_kv, tokens, 576) float32
    """A sequence's keys in pages [page_begin, page_end). Nothing past its length is touched."""
    kv = k_cache.index_select(0, table[page_begin:page_end]).flatten(0, 1)  # (tokens, h_kv, 576)
    return kv[: max(0, length - page_begin * PAGE_SIZE)].transpose(0, 1).float()


def combine(
    out_partial: torch.Tensor,  # (splits, h_kv, rows, 512) float32
    lse_partial: torch.Tensor,  # (splits, h_kv, rows) float32, -inf where no key was seen
) -> tuple[torch.Tensor, torch.Tensor]:  # out (h_kv, rows, 512), lse (h_kv, rows)
    """Merge the splits of a sequence, each weighted with its share of the sum of exponentials."""
    lse = lse_partial.logsumexp(0)
    weight = torch.exp(lse_partial - lse.masked_fill(lse == -torch.inf, 0.0))
    return (out_partial * weight.unsqueeze(-1)).sum(0), lse


def _attend(
    q: torch.Tensor,  # (h_kv, rows, 576) float32, scaled
    kv: torch.Tensor,  # (h_kv, tokens, 576) float32
    hidden: torch.Tensor | None,  # (rows, tokens) bool, True where the row must not see the key
) -> tuple[torch.Tensor, torch.Tensor]:  # out (h_kv, rows, 512), lse (h_kv, rows)
    """Attention over one split; a row that sees no key gives out 0 and lse -inf."""
    if kv.shape[1] == 0:
        return q.new_zeros(*q.shape[:2], 512), q.new_full(q.shape[:2], -torch.inf)
    scores = q @ kv.transpose(1, 2)  # (h_kv, rows, tokens)
    if hidden is not None:
        scores.masked_fill_(hidden, -torch.inf)
    top = scores.amax(-1, keepdim=True)
    top.masked_fill_(top == -torch.inf, 0.0)  # a row that sees nothing: exp(-inf - 0) is the 0 it needs
    weight = scores.sub_(top).exp_()
    total = weight.sum(-1, keepdim=True)
    out = (weight @ kv[..., :512]) / total.clamp_min(torch.finfo(torch.float32).tiny)
    return out, (total.log() + top).squeeze(-1)


def _keys_after_query(
    begin: int, keys: int, length: int, s_q: int, rows: int, device: torch.device
) -> torch.Tensor:  # (rows, keys) bool
    """Which of the keys from `begin` on each row must not see: row r is query token r // group."""
    token = torch.arange(rows, device=device) // (rows // s_q)
    last_visible = length - s_q + token
    return torch.arange(begin, begin + keys, device=device) > last_visible.unsqueeze(1)


def _rows_by_kv_head(q: torch.Tensor, num_kv_heads: int) -> torch.Tensor:
    """(s_q, h_q, d) -> (h_kv, s_q * group, d): the rows that share a KV head side by side."""
    return q.unflatten(1, (num_kv_heads, -1)).transpose(0, 1).flatten(1, 2)


def _query_major(rows: torch.Tensor, s_q: int) -> torch.Tensor:
    """(h_kv, s_q * group, ...) -> (s_q, h_q, ...): `_rows_by_kv_head` undone for one sequence."""
    return rows.unflatten(1, (s_q, -1)).transpose(0, 1).flatten(1, 2)


def naive_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    block_table: torch.Tensor,
    cache_seqlens: torch.Tensor,
    softmax_scale: float,
    causal: bool,
    dtype: torch.dtype = torch.float64,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention over a paged latent cache, written as its definition: what results are compared with.

    Parameters
    ----------
    q : (b, s_q, h_q, 576).
    k_cache : (pages, 64, h_kv, 576); V is the first 512 of K.
    block_table : (b, max_pages) int32.
    cache_seqlens : (b,) int32, tokens.
    softmax_scale : factor on the scores.
    causal : query token i sees keys up to `length - s_q + i`.
    dtype : of the computation and of the result.

    Returns
    -------
    out : (b, s_q, h_q, 512), zero where a row sees no key.
    lse : (b, h_q, s_q), natural logarithm, +inf where a row sees no key.
    """
    b, s_q, h_q, _ = q.shape
    num_kv_heads = k_cache.shape[2]
    out = torch.zeros(b, s_q, h_q, 512, dtype=dtype, device=q.device)
    lse = torch.full((b, h_q, s_q), torch.inf, dtype=dtype, device=q.device)
    for i, length in enumerate(cache_seqlens.tolist()):
        position = torch.arange(length, device=q.device)
        # The last key each query token sees; the tokens that see none keep 0 and +inf.
        token = torch.arange(s_q, device=q.device)
        last = length - s_q + token if causal else torch.full_like(token, length - 1)
        sees = last >= 0
        keys = k_cache[block_table[i, : ceil_div(length, PAGE_SIZE)].long()].flatten(0, 1)[:length].to(dtype)
        queries = q[i, sees].to(dtype).unflatten(1, (num_kv_heads, -1))  # (s, h_kv, group, 576)
        scores = torch.einsum("shgd,khd->shgk", queries, keys) * softmax_scale
        scores.masked_fill_((position > last[sees, None])[:, None, None], -torch.inf)
        out[i, sees] = torch.einsum("shgk,khd->shgd", scores.softmax(-1), keys[..., :512]).flatten(1, 2)
        lse[i, :, sees] = scores.logsumexp(-1).flatten(1, 2).T
    return out, lse
