"""The process of `vllm-flashmla bench --tails`: runs vLLM, reports in lines of JSON on stdout.

Both ways run in one engine, in turns: the threshold is changed between steps. Timed is what vLLM does for
the attention of a layer (projections from and to the latent space, kernels, merges), between two CUDA
events: the rest of a step is the same either way. Nothing is captured or compiled, as vLLM runs the
attention of such steps outside of graphs by default, too.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from itertools import count
from statistics import quantiles
from typing import TYPE_CHECKING, Any

import torch

from .serve_engine import main, say, start_engine
from .tails import DECODE, PREFILL, SHAPES, WARM_STEPS, TailsJob

if TYPE_CHECKING:
    from vllm import LLM

NUMBERS = count()  # of requests


class Worker:
    """Mixed into vLLM's worker: says which queries decode, and times the attention of each layer."""

    def watch_attention(self) -> None:
        self.attention_times: list[tuple[Any, Any, Any]] = []  # a step's metadata, begin, end
        for layer in self.vllm_config.compilation_config.static_forward_context.values():
            layer.forward_impl = timed(layer.forward_impl, self.attention_times)

    def decode_up_to(self, tokens: int) -> None:
        """Set the builders' threshold, and the runner's, by which it sorts a batch."""
        for groups in self.model_runner.attn_groups:
            for group in groups:
                for builder in group.metadata_builders:
                    builder.reorder_batch_threshold = tokens
        self.model_runner.reorder_batch_threshold = tokens

    def take_attention_times(self) -> list[tuple[int, int, float]]:
        """Tokens that were decoded, tokens that were prefilled, microseconds; one for each layer and step."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        taken = [
            (
                step.num_decode_tokens,
                step.num_actual_tokens - step.num_decode_tokens,
                _microseconds(begin, end),
            )
            for step, begin, end in self.attention_times
        ]
        self.attention_times.clear()
        return taken


def timed(forward_impl: Callable, times: list) -> Callable:
    """A layer's attention that notes when it began and ended."""

    def watched(q, kv_c, k_pe, kv_cache, attn_metadata, **kwargs):
        begin = _now()
        out = forward_impl(q, kv_c, k_pe, kv_cache, attn_metadata, **kwargs)
        times.append((attn_metadata, begin, _now()))
        return out

    return watched


def _now() -> torch.cuda.Event | float:
    if not torch.cuda.is_available():
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _microseconds(begin: Any, end: Any) -> float:
    return (end - begin) * 1e6 if isinstance(begin, float) else begin.elapsed_time(end) * 1e3


def run(job: TailsJob) -> None:
    """Measure and report every row of the job."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # requests added together then begin together
    start = time.perf_counter()
    tails, decodes = (max(shape[i] for shape in SHAPES) for i in (0, 1))
    llm = start_engine(
        job.model,
        job.layers,
        job.heads,
        job.backend,
        enable_prefix_caching=True,
        enforce_eager=True,
        async_scheduling=False,
        gpu_memory_utilization=0.7,  # vLLM leaves no room for keys of all heads
        max_model_len=job.max_model_len,
        max_num_seqs=job.num_prompts,
        max_num_batched_tokens=max(2048, tails * max(job.lengths) + decodes),
        worker_extension_cls=f"{__package__}.tails_engine.{Worker.__qualname__}",
    )
    llm.collective_rpc("watch_attention")
    finish(llm, [add(llm, job, i, length=0) for i in range(job.num_prompts)])  # which fills the prefix cache
    say("engine", {"h": job.heads, "seconds": round(time.perf_counter() - start, 1)})
    for tails, decodes, length in job.rows:
        times = measure_row(llm, job, tails, decodes, length)
        row = {"h": job.heads, "tails": tails, "decodes": decodes, "cached": job.cached, "length": length}
        for way, each in times.items():
            low, middle, high = (round(us, 2) for us in quantiles(each, n=4, method="inclusive"))
            row |= {way: middle, way.replace("_us", "_quartiles"): [low, high]}
        say("rows", row)


def measure_row(llm: LLM, job: TailsJob, tails: int, decodes: int, length: int) -> dict[str, list[float]]:
    """Microseconds of a layer's attention in the steps that compute the tails, by each way."""
    others = [add(llm, job, tails + i, length=1, max_tokens=job.num_steps) for i in range(decodes)]
    if others:
        llm.collective_rpc("decode_up_to", args=(1,))
        llm.llm_engine.step()
    # What decodes beside the tails is decoded either way.
    ways = {PREFILL: min(decodes, 1), DECODE: max(job.lengths)}
    times: dict[str, list[float]] = {way: [] for way in ways}
    for step in range(WARM_STEPS + job.repeat):
        for way, threshold in ways.items():
            llm.collective_rpc("decode_up_to", args=(threshold,))
            llm.collective_rpc("take_attention_times")
            finish(llm, [add(llm, job, i, length) for i in range(tails)])
            (taken,) = llm.collective_rpc("take_attention_times")
            of_tails = [us for *tokens, us in taken if tokens == expected(way, tails, decodes, length)]
            if len(of_tails) != job.layers:
                raise RuntimeError(f"{way}, {tails} tails of {length} beside {decodes} decodes: got {taken}")
            times[way] += of_tails if step >= WARM_STEPS else []
    if others:
        llm.llm_engine.abort_request(others)
    return times


def expected(way: str, tails: int, decodes: int, length: int) -> list[int]:
    """Tokens decoded and prefilled in the step that computes the tails."""
    return [decodes + tails * length, 0] if way == DECODE else [decodes, tails * length]


def add(llm: LLM, job: TailsJob, prompt: int, length: int, max_tokens: int = 1) -> str:
    """Add a request, of a prompt and a tail of random words; its name."""
    from vllm import SamplingParams

    number = next(NUMBERS)
    words = torch.Generator().manual_seed(number)
    tail = torch.randint(3, 1000, (length,), generator=words).tolist()
    params = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True, detokenize=False)
    llm.llm_engine.add_request(str(number), {"prompt_token_ids": [prompt + 3] * job.cached + tail}, params)
    return str(number)


def finish(llm: LLM, names: list[str]) -> None:
    """Step until these requests have ended."""
    running = set(names)
    while running:
        running -= {output.request_id for output in llm.llm_engine.step() if output.finished}


if __name__ == "__main__":
    main(run, TailsJob)
