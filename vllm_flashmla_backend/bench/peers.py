"""Ours and the peers, each behind the same two methods; one that cannot be imported says why.

A peer makes its plan, where it has one, in `prepare`, and is timed without it. Where a peer has a
setting that its users choose by the case, `prepare` returns a step for each, and the fastest counts.
"""

from __future__ import annotations

import importlib
import math
import subprocess
import sys
from collections.abc import Callable, Iterable
from types import ModuleType
from typing import Protocol

import torch

from ..flash_mla import flash_mla_decode, get_mla_metadata
from ..flash_mla.schedule import PAGE_SIZE
from ..processes import stop_group
from .cases import Case
from .inputs import SCALE, Inputs

Step = Callable[[], torch.Tensor]
"""One whole call, fit for CUDA graph capture; returns out (b, s_q, h_q, 512), allocated by the call."""

BUILD_SECONDS = 240
"""How long a peer that compiles itself when first used may take to."""


class Missing(Exception):
    """A peer that cannot run here; the message says why."""


class Peer(Protocol):
    """Kernels for MLA decode over a paged cache."""

    name: str

    def takes(self, case: Case) -> bool:
        """Whether it supports the case at all."""

    def prepare(self, inputs: Inputs) -> dict[str, Step]:
        """Plan, and return the step to time for each setting; of one setting, under the name ''."""


class Ours:
    name = "ours"
    batch_invariant = False

    def __init__(self, device: torch.device) -> None:
        pass

    def takes(self, case: Case) -> bool:
        return True

    def prepare(self, inputs: Inputs) -> dict[str, Step]:
        mode = {"batch_invariant": self.batch_invariant}
        s_q, h_q = inputs.case.s_q, inputs.case.h_q
        plan = get_mla_metadata(inputs.cache_seqlens, s_q * h_q, 1, h_q, **mode)
        queries = (inputs.q_nope, inputs.q_pe)
        cache = (inputs.k_cache, inputs.block_table, inputs.cache_seqlens)
        return {"": lambda: flash_mla_decode(*queries, *cache, *plan, SCALE, True, **mode)[0]}


class OursBatchInvariant(Ours):
    """Measured beside our default mode, and compared with it alone."""

    name = "invariant"
    batch_invariant = True


class FlashMLA:
    """DeepSeek's package where installed, else the copy in vLLM; plans at the first call, then reuses."""

    name = "flashmla"

    def __init__(self, device: torch.device) -> None:
        self._module = _import("flash_mla", "vllm.third_party.flashmla.flash_mla_interface")

    def takes(self, case: Case) -> bool:
        return True

    def prepare(self, inputs: Inputs) -> dict[str, Step]:
        plan = self._module.get_mla_metadata(inputs.cache_seqlens, inputs.case.s_q * inputs.case.h_q, 1)
        tensors = (inputs.q, inputs.k_cache, inputs.block_table, inputs.cache_seqlens)
        decode = self._module.flash_mla_with_kvcache
        return {"": lambda: decode(*tensors, 512, *plan, softmax_scale=SCALE, causal=True)[0]}


class FlashAttention3:
    """vLLM's copy, called as FLASH_ATTN_MLA calls it: rope parts as q and k, the latent as q_v and v."""

    name = "fa3"

    def __init__(self, device: torch.device) -> None:
        self._module = _import("vllm.vllm_flash_attn")
        if reason := self._module.fa_version_unsupported_reason(3):
            raise Missing(reason)

    def takes(self, case: Case) -> bool:
        return True

    def prepare(self, inputs: Inputs) -> dict[str, Step]:
        # 0 leaves the splits to its heuristic; 32 is what vLLM sets where it captures CUDA graphs.
        return {f"num_splits={n}": self._step(inputs, n) for n in (0, 32)}

    def _step(self, inputs: Inputs, num_splits: int) -> Step:
        case = inputs.case
        first_query = torch.arange(case.b + 1, dtype=torch.int32, device=inputs.q.device) * case.s_q
        metadata = self._module.get_scheduler_metadata(
            batch_size=case.b,
            max_seqlen_q=case.s_q,
            max_seqlen_k=inputs.max_len,
            num_heads_q=case.h_q,
            num_heads_kv=1,
            headdim=64,
            cache_seqlens=inputs.cache_seqlens,
            qkv_dtype=inputs.q.dtype,
            headdim_v=512,
            page_size=PAGE_SIZE,
            cu_seqlens_q=first_query,
            causal=True,
            num_splits=num_splits,
        )
        arguments = {
            "q": inputs.q_pe.flatten(0, 1),
            "k": inputs.k_cache[..., 512:],
            "v": inputs.k_cache[..., :512],
            "q_v": inputs.q_nope.flatten(0, 1),
            "max_seqlen_q": case.s_q,
            "cu_seqlens_q": first_query,
            "max_seqlen_k": inputs.max_len,
            "seqused_k": inputs.cache_seqlens,
            "block_table": inputs.block_table,
            "softmax_scale": SCALE,
            "causal": True,
            "fa_version": 3,
            "scheduler_metadata": metadata,
            "num_splits": num_splits,
        }
        return lambda: self._module.flash_attn_varlen_func(**arguments).unflatten(0, (case.b, case.s_q))


class FlashInfer:
    """Its fa3 kernel, which it compiles when first used for a type: that is done under a time limit."""

    name = "flashinfer"
    workspace_bytes = 128 << 20  # what its documentation recommends

    def __init__(self, device: torch.device, build_seconds: float = BUILD_SECONDS) -> None:
        self._wrapper = _import("flashinfer.mla").BatchMLAPagedAttentionWrapper
        self._build_seconds = build_seconds
        self._built: dict[torch.dtype, str | None] = {}  # of each type tried, why it failed
        self._build(torch.bfloat16)

    def takes(self, case: Case) -> bool:
        return True

    def prepare(self, inputs: Inputs) -> dict[str, Step]:
        self._build(inputs.q.dtype)
        case, device = inputs.case, inputs.q.device
        workspace = torch.empty(self.workspace_bytes, dtype=torch.uint8, device=device)
        wrapper = self._wrapper(workspace, backend="fa3")
        first_query = torch.arange(case.b + 1, dtype=torch.int32, device=device) * case.s_q
        types = (inputs.q.dtype, inputs.k_cache.dtype)
        pages = (inputs.pages_before, inputs.pages, inputs.cache_seqlens)
        causal = case.s_q > 1  # one query token sees every key, and needs no mask
        wrapper.plan(first_query, *pages, case.h_q, 512, 64, PAGE_SIZE, causal, SCALE, *types)
        cache = inputs.k_cache.squeeze(2)  # (pages, 64, 576)
        tensors = (inputs.q_nope.flatten(0, 1), inputs.q_pe.flatten(0, 1), cache[..., :512], cache[..., 512:])
        return {"": lambda: wrapper.run(*tensors, return_lse=True)[0].unflatten(0, (case.b, case.s_q))}

    def _build(self, dtype: torch.dtype) -> None:
        """Have another process plan a call, which compiles the kernel into FlashInfer's cache."""
        if dtype not in self._built:
            print(f"flashinfer: compiling for {dtype}, {self._build_seconds:g} s at most", file=sys.stderr)
            self._built[dtype] = _run_limited(_FLASHINFER_BUILD.format(dtype=dtype), self._build_seconds)
        if reason := self._built[dtype]:
            raise Missing(f"building its kernel for {dtype} {reason}")


_FLASHINFER_BUILD = """
import torch
from flashinfer.mla import BatchMLAPagedAttentionWrapper
wrapper = BatchMLAPagedAttentionWrapper(torch.empty(1 << 27, dtype=torch.uint8, device="cuda"), backend="fa3")
one = torch.tensor([0, 1], dtype=torch.int32, device="cuda")
wrapper.plan(one, one, one[:1], one[1:], 16, 512, 64, 64, True, 1.0, {dtype}, {dtype})
"""


class Triton:
    """vLLM's Triton kernel, called as TRITON_MLA calls it; one query token only."""

    name = "triton"

    def __init__(self, device: torch.device) -> None:
        module = _import("vllm.v1.attention.ops.triton_decode_attention")
        self._decode = module.decode_attention_fwd
        self._num_sms = torch.cuda.get_device_properties(device).multi_processor_count

    def takes(self, case: Case) -> bool:
        return case.s_q == 1

    def prepare(self, inputs: Inputs) -> dict[str, Step]:
        b, h_q = inputs.case.b, inputs.case.h_q
        # TRITON_MLA's rule: a split for each 512 tokens, rounded up to a power of two, within two per SM.
        wanted = max(1, inputs.max_len // 512)
        splits = min(1 << (wanted - 1).bit_length(), 2 * self._num_sms)
        shape = (b, h_q, splits, 513)  # of the partials: out and lse side by side
        if (values := math.prod(shape)) >= 1 << 31:  # it would read and write anywhere, and end the process
            raise Missing(f"its 32-bit offsets do not reach the {values:,} values of its {splits} splits")
        one = torch.ones((), device=inputs.q.device)  # scales; left out, a copy from the host would make them

        def step() -> torch.Tensor:
            out = inputs.q.new_empty(b, h_q, 512)
            lse = inputs.q.new_empty(b, h_q)
            partials = torch.empty(shape, dtype=torch.float32, device=inputs.q.device)
            self._decode(
                inputs.q.squeeze(1),
                inputs.k_cache,
                inputs.k_cache[..., :512],
                out,
                lse,
                inputs.block_table,
                inputs.cache_seqlens,
                partials,
                splits,
                SCALE,
                PAGE_SIZE,
                k_scale=one,
                v_scale=one,
                is_mla=True,
            )
            return out.unsqueeze(1)

        return {"": step}


PEERS: dict[str, Callable[..., Peer]] = {
    peer.name: peer for peer in (Ours, OursBatchInvariant, FlashMLA, FlashAttention3, FlashInfer, Triton)
}


def load(
    names: Iterable[str], device: torch.device, build_seconds: float = BUILD_SECONDS
) -> tuple[list[Peer], dict[str, str]]:
    """The peers that can run on `device`, and of each other one the reason why it cannot."""
    peers, missing = [], {}
    for name in names:
        options = {"build_seconds": build_seconds} if PEERS[name] is FlashInfer else {}
        try:
            peers.append(PEERS[name](device, **options))
        except Missing as error:
            missing[name] = str(error)
    return peers, missing


def _import(*names: str) -> ModuleType:
    """The first of the modules that can be imported."""
    reasons = []
    for name in names:
        try:
            return importlib.import_module(name)
        except Exception as error:  # a broken installation raises all kinds, and is only one peer less
            reasons.append(f"{name}: {type(error).__name__}: {error}".splitlines()[0])
    raise Missing("; ".join(reasons))


def _run_limited(program: str, seconds: float) -> str | None:
    """Run a Python program with all that it starts; why it failed, or None."""
    process = subprocess.Popen(
        [sys.executable, "-c", program],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        said, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        stop_group(process, patience=5)  # compilers that it started, too
        process.communicate()
        return f"took longer than {seconds:g} s"
    return f"failed: {' / '.join(said.strip().splitlines()[-3:])[:600]}" if process.returncode else None
