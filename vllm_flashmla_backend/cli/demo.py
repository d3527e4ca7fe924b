"""`vllm-flashmla demo`: real prompts through vLLM and FLASHMLA, and how many answers were right."""

from __future__ import annotations

import argparse
import os
import sys
import time
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from rich.table import Table

from .. import BACKEND
from ..recall import ANSWER_TOKENS, RecallPrompt, is_right, make_prompts
from ..words import count
from .environment import VLLM, describe, device, installed_version
from .options import require
from .results import console_for_tables

if TYPE_CHECKING:
    from vllm import LLM

HELP = "answer prompts of 500 to 4,000 tokens through FLASHMLA and count the right answers"

RECALL = Path(__file__).parents[2] / "configs" / "recall"
SEED = 20
MIN_TOKENS, MAX_TOKENS = 500, 4000
CACHE_BYTES = 1 << 30  # 466,000 tokens of the recall model; by default vLLM takes nearly all memory
FREE_SHARE = 0.05  # of a GPU's memory, without which vLLM does not start; by default 0.92
MOST_PROMPTS = 10_000  # hours on a CPU
LEAST_RIGHT = 0.99
"""The model answers this share of such prompts where attention is right; less is a failure."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--prompts", type=int, default=64, metavar="N", help="how many prompts (default: 64)")
    parser.add_argument(
        "--model", type=Path, default=RECALL, help="the recall model (default: configs/recall)"
    )


def run(args: argparse.Namespace) -> int:
    """Answer the prompts and print the table; 0 if at least 99 % were right."""
    require(("--prompts", args.prompts, 1, MOST_PROMPTS))
    if not (args.model / "config.json").is_file():
        raise SystemExit(
            f"--model is {args.model}, which has no config.json; expected the repository's configs/recall"
        )
    if not any(args.model.glob("tokenizer*")):
        raise SystemExit(
            f"--model is {args.model}, which has no tokenizer; the demo asks the recall task, and needs a "
            "model trained for it with its tokenizer, as the repository's configs/recall"
        )
    prompts = make_prompts(SEED, args.prompts, MIN_TOKENS, MAX_TOKENS)
    llm = start_engine(args.model)
    require_flashmla(llm)
    completions, seconds = answer(llm, prompts)
    right = sum(is_right(prompt, text) for prompt, text in zip(prompts, completions, strict=True))
    console_for_tables().print(summary(llm, prompts, right, seconds))
    return 0 if right / len(prompts) >= LEAST_RIGHT else 1


def start_engine(model: Path) -> LLM:
    """Start vLLM on the model, in this process, where the summary can ask the layers what ran."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    # A thread that vLLM pins to a busy core waits there, and every other thread waits for it.
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    require_kernels()
    if os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR") == "ERROR":  # the table is what counts
        print("starting vLLM; with VLLM_LOGGING_LEVEL=INFO it says how", file=sys.stderr)
        warnings.simplefilter("ignore")  # of what vLLM calls in torch, and nobody here can mend
    from vllm import LLM
    from vllm.platforms import current_platform

    return LLM(
        model=str(model),
        attention_backend="FLASHMLA",
        kv_cache_memory_bytes=CACHE_BYTES,
        gpu_memory_utilization=FREE_SHARE,
        enforce_eager=current_platform.is_cpu(),  # compiling takes a CPU longer than answering
    )


def require_kernels() -> None:
    """SystemExit where the chosen kernels cannot run: vLLM says so, too, at the end of a long traceback."""
    from ..flash_mla.providers import provider_for

    try:
        provider_for(device())
    except ValueError as error:
        raise SystemExit(str(error)) from error


def require_flashmla(llm: LLM) -> None:
    """SystemExit where vLLM went past what was asked for: it does where it has not found this plugin."""
    from ..bench.serve_engine import attention_class

    if (backend := attention_class(llm.llm_engine.vllm_config)) != BACKEND:
        raise SystemExit(
            f"vLLM serves the model with {backend}, expected {BACKEND}; `vllm-flashmla doctor` says why"
        )


def answer(llm: LLM, prompts: list[RecallPrompt]) -> tuple[list[str], float]:
    """The model's completion of each prompt, and the seconds that all of them took."""
    from vllm import SamplingParams

    greedy = SamplingParams(temperature=0, max_tokens=ANSWER_TOKENS)
    start = time.perf_counter()
    outputs = llm.generate([prompt.text for prompt in prompts], greedy)
    seconds = time.perf_counter() - start
    return [output.outputs[0].text for output in outputs], seconds


def span(lengths: list[int]) -> str:
    """`500 to 4,000`, or the one number where all are the same."""
    least, most = min(lengths), max(lengths)
    return f"{least:,} to {most:,}" if least < most else f"{most:,}"


def summary(llm: LLM, prompts: list[RecallPrompt], right: int, seconds: float) -> Table:
    """The table that the demo ends with."""
    from ..bench.serve_engine import attention_class
    from ..flash_mla.layout import ceil_div
    from ..flash_mla.providers import provider_for
    from ..flash_mla.schedule import PAGE_SIZE

    config = llm.llm_engine.vllm_config
    lengths = [prompt.num_tokens for prompt in prompts]
    pages = sum(ceil_div(length + ANSWER_TOKENS, PAGE_SIZE) for length in lengths)
    table = Table(title="FLASHMLA demo", show_header=False)
    share = f"{right / len(prompts):.1%}"
    table.add_row("answered right", f"{right} of {count(len(prompts), 'prompt')} ({share})")
    table.add_row("prompt lengths", f"{span(lengths)} tokens")
    table.add_row(
        "tokens per second", f"{sum(lengths) / seconds:,.0f} of the prompts, {seconds:.1f} s in all"
    )
    table.add_row("pages used", f"{pages:,}, of {PAGE_SIZE} tokens each")
    table.add_row("vLLM", installed_version(*VLLM))
    table.add_row("device", describe(config.device_config.device))
    table.add_row("backend", attention_class(config))
    table.add_row("kernels", provider_for(config.device_config.device).name)
    return table
