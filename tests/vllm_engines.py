"""Engines for the tests that go through vLLM, and what they are compared by."""

from __future__ import annotations

import os
import signal
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch
import vllm.envs
from vllm import LLM, RequestOutput, SamplingParams

from vllm_flashmla_backend import recall
from vllm_flashmla_backend.cli.demo import FREE_SHARE  # so that several engines share a GPU

MODEL = os.environ.get("FLASHMLA_TEST_MODEL", str(Path(__file__).parent.parent / "configs" / "recall"))
ON_GPU = torch.cuda.is_available()
PEER = "TRITON_MLA" if ON_GPU else "CPU_MLA"  # vLLM's own MLA backend that FLASHMLA is compared with

ASKED = dict(  # what vLLM asks a backend about, of a layer that FLASHMLA serves
    head_size=576,
    dtype=torch.bfloat16,
    kv_cache_dtype="auto",
    block_size=64,
    use_mla=True,
    has_sink=False,
    use_sparse=False,
    use_mm_prefix=False,
)

ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # pinned threads wait for others on their core
}

# Sums over symmetric memory need NVLink multicast; without it, in virtual machines, vLLM may hang at start.
NO_MULTICAST = {"VLLM_ALLREDUCE_USE_SYMM_MEM": "0"}


@contextmanager
def engine(backend: str, environment: dict[str, str] | None = None, **options) -> Iterator[LLM]:
    """Run vLLM in this process, so that a test can count what is called, and take it down after.

    On a GPU, decode steps are CUDA graphs and nothing is compiled, which takes longer than most tests
    do; `compilation_config=None` gives what vLLM does by default.
    """
    from vllm.compilation.monitor import set_cudagraph_capturing_enabled
    from vllm.distributed import cleanup_dist_env_and_memory

    defaults = dict(max_model_len=2048, max_num_seqs=32, seed=0)
    defaults |= dict(kv_cache_memory_bytes=1 << 30, gpu_memory_utilization=FREE_SHARE)
    if ON_GPU:
        defaults |= dict(compilation_config={"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"})
    else:
        # vllm-cpu 0.32.0 rotates wrongly in eager mode; FLASHMLA's platform mends it, CPU_MLA needs it said
        defaults |= dict(enforce_eager=True, compilation_config={"custom_ops": ["all", "-rotary_embedding"]})
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (ENVIRONMENT | (environment or {})).items():
            patch.setenv(name, value)
        vllm.envs.disable_envs_cache()  # an engine before this one may have fixed what vLLM sees of them
        # An engine leaves it off, and the one of vLLM's next model runner does not turn it on.
        set_cudagraph_capturing_enabled(True)
        llm = LLM(**dict(model=MODEL, attention_backend=backend) | defaults | options)
        try:
            yield llm
        finally:
            llm.llm_engine.engine_core.shutdown()
            del llm
            cleanup_dist_env_and_memory()


def in_a_process(function: Callable, *args, timeout: float = 400):
    """Call a module's function in a process of its own, which inherits the environment as it is now.

    Some engines change vLLM or torch for good, and one that follows an engine of several processes may hang.
    Whatever the process started ends with it, after `timeout` seconds at the latest.
    """
    context = get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_call, args=(theirs, function, args))
    process.start()
    theirs.close()
    try:
        if not ours.poll(timeout):
            raise TimeoutError(f"{function.__name__} has not ended after {timeout:g} s")
        result, error = ours.recv()
    except EOFError:
        raise RuntimeError(f"the process of {function.__name__} died") from None
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.kill()
        process.join()
    if error:
        raise RuntimeError(error)
    return result


def _call(connection: Connection, function: Callable, args: tuple) -> None:
    """Send what the function returns, or else its traceback; the processes that it starts join its group."""
    os.setsid()
    try:
        connection.send((function(*args), None))
    except BaseException:
        connection.send((None, traceback.format_exc()))


def random_prompts(llm: LLM, lengths: list[int]) -> list[dict[str, list[int]]]:
    """Prompts of random words, the same for every engine of one model."""
    generator = torch.Generator().manual_seed(0)
    vocab_size = llm.llm_engine.model_config.get_vocab_size()
    return [
        {"prompt_token_ids": torch.randint(4, vocab_size, (n,), generator=generator).tolist()}
        for n in lengths
    ]


def generate(llm: LLM, prompts: list, max_tokens: int = 6) -> list[RequestOutput]:
    """Decode greedily, with the five best logprobs of each step."""
    params = SamplingParams(temperature=0, max_tokens=max_tokens, logprobs=5, ignore_eos=True)
    return llm.generate(prompts, params, use_tqdm=False)


def count_right(llm: LLM, prompts: list[recall.RecallPrompt]) -> int:
    """How many of the recall task's prompts are answered right, greedily."""
    greedy = SamplingParams(temperature=0, max_tokens=recall.ANSWER_TOKENS)
    outputs = llm.generate([prompt.text for prompt in prompts], greedy, use_tqdm=False)
    return sum(
        recall.is_right(prompt, output.outputs[0].text)
        for prompt, output in zip(prompts, outputs, strict=True)
    )


def largest_difference(ours: list[RequestOutput], theirs: list[RequestOutput]) -> float:
    """Return the largest difference of a logprob over the steps at which both had the same text before.

    Raises AssertionError where the first tokens have no candidate in common.
    """
    worst = 0.0
    for a, b in zip(ours, theirs, strict=True):
        a, b = a.outputs[0], b.outputs[0]
        for step, (p, q) in enumerate(zip(a.logprobs, b.logprobs, strict=True)):
            common = p.keys() & q.keys()
            assert common, f"step {step}: candidates {list(p)} and {list(q)}"
            worst = max([worst, *(abs(p[t].logprob - q[t].logprob) for t in common)])
            if a.token_ids[step] != b.token_ids[step]:
                break
    return worst
