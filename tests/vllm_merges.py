"""vLLM's merges of the results of decode context parallelism, without the ranks that they run on."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

try:  # vLLM 0.26 has them apart, later releases together
    from vllm.v1.attention.ops import dcp as all_to_all
    from vllm.v1.attention.ops import dcp as gather
except ImportError:
    from vllm.v1.attention.ops import common as gather
    from vllm.v1.attention.ops import dcp_alltoall as all_to_all

# (ranks, tokens, h_q, 512) of out and (ranks, tokens, h_q) of lse -> (tokens, h_q, 512)
Merge = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def on(device: torch.device) -> Iterator[tuple[str, Merge]]:
    """vLLM's definition in PyTorch, and on a GPU the kernels of both `--dcp-comm-backend`s."""
    yield "reference", all_to_all._lse_weighted_combine
    if device.type == "cuda":
        yield "ag_rs", gather_and_scatter
        yield "a2a", exchange


def gather_and_scatter(out: torch.Tensor, lse: torch.Tensor) -> torch.Tensor:
    """Each rank corrects its output by the LSE of all; the sum is what is scattered by heads."""
    corrected = [gather.correct_attn_out(out[rank], lse, rank, None)[0] for rank in range(len(out))]
    return torch.stack(corrected).sum(0)


def exchange(out: torch.Tensor, lse: torch.Tensor) -> torch.Tensor:
    """Each rank sends every other one its heads' outputs and LSE, packed; each merges what arrives."""
    ranks, tokens, heads, dim = out.shape
    extra = all_to_all._dcp_a2a_lse_pack_dim(out.dtype)  # elements that hold one LSE
    sent = out.new_empty(ranks, ranks, tokens, heads // ranks, dim + extra)  # from, to, ...
    for rank in range(ranks):
        all_to_all._dcp_a2a_pack_send(out[rank], lse[rank], sent[rank], ranks, heads // ranks, dim, extra)
    arrived = sent.transpose(0, 1).contiguous()  # to, from, ...
    merged = [all_to_all._dcp_a2a_unpack_combine(each, dim, extra, False, True) for each in arrived]
    return torch.cat(merged, dim=1)  # by heads
