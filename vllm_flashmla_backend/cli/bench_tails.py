"""`vllm-flashmla bench --tails`: what prefix-cached tails cost through decode and through prefill."""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path

from rich.console import Console

from ..bench import report, serve, tails_report
from ..bench.tails import CACHED, DECODE, LENGTHS, PREFILL, TailsJob
from ..words import count
from .options import numbers, require, require_cpu_cache, require_heads, require_model, require_out
from .results import describe_run, failed, gpu_monitor, require_rows, results_in, show_tables, unused_path

ON_A_CPU = "--tails --layers 1 --heads 16 --cached 128 --lengths 1,8 --repeat 2"


OPTIONS = {"tails", "cached", "lengths", "markdown", "heads", "layers", "model", "repeat"}
"""What `--tails` heeds, by the names of the parsed arguments, besides what all benchmarks do."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("prefix-cached tails")
    group.add_argument(
        "--tails",
        action="store_true",
        help="time the attention of prompts' last tokens, the others being in the prefix cache, through "
        "decode and through prefill; --heads, --layers (4 are enough), --model, --repeat, --out, --plot and "
        "--commit mean the same",
    )
    group.add_argument(
        "--cached",
        type=int,
        default=CACHED,
        metavar="N",
        help=f"tokens of each prompt that are in the prefix cache, whole pages of 64 (default: {CACHED:,})",
    )
    group.add_argument(
        "--lengths",
        type=numbers,
        default=LENGTHS,
        metavar="N,N,…",
        help=f"tokens after them, the tails (default: {','.join(map(str, LENGTHS))})",
    )
    group.add_argument(
        "--markdown", action="store_true", help="print the table, alone, in Markdown, as the docs have it"
    )


def run(args: argparse.Namespace) -> int:
    """Measure and show; 0 if every row was measured."""
    if args.cached < 64 or args.cached % 64:
        raise SystemExit(f"--cached is {args.cached}, expected whole pages of 64 tokens")
    require(("--layers", args.layers, 1), ("--repeat", args.repeat, 2))
    require_heads(*args.heads)
    if args.plot:
        return show(args.plot, args.markdown)
    require_model(args.model, serve.SHAPE_KEYS)
    require_out(args.out)
    jobs = jobs_of(args)
    require_cpu_cache(jobs[0], f"--cached {args.cached:,}, --lengths up to {max(args.lengths)}", ON_A_CPU)
    return show(measure_all(args, jobs), args.markdown)


def jobs_of(args: argparse.Namespace) -> list[TailsJob]:
    """A job for each number of heads."""
    return [
        TailsJob(str(args.model), args.layers, heads, args.cached, args.lengths, args.repeat)
        for heads in args.heads
    ]


def measure_all(args: argparse.Namespace, jobs: list[TailsJob]) -> Path:
    """Run an engine for each number of heads; the results file, written anew after each row."""
    shape = serve.model_shape(args.model, args.layers)
    results = describe_run(args, gpu_monitor(), "repeat")
    results |= {"tails_model": shape, "rows": [], "failures": []}
    path = unused_path(args.out, results["gpu"] or "cpu", results["date"], "-tails")
    console = Console(stderr=True)
    for job in jobs:
        for reported in serve.measure(job):
            ((kind, entry),) = reported.items()
            console.print(tell(job.heads, kind, entry), soft_wrap=True, highlight=False, markup=False)
            if kind == "rows":
                results["rows"].append(entry)
            elif kind == "failure":
                results["failures"].append(entry | {"h": job.heads})
            report.save(results, path)
    require_rows(results, (f"h={each['h']} {each['error']}" for each in results["failures"]))
    return path


def tell(heads: int, kind: str, entry: dict) -> str:
    """A line for what an engine reported."""
    if kind == "failure":
        return f"h={heads} {failed(entry)}"
    if kind == "engine":
        return f"h={heads}: started and {entry['seconds']} s later ready"
    tails, decodes = count(entry["tails"], "tail"), count(entry["decodes"], "decode")
    where = f"h={heads} {tails} of {entry['length']} beside {decodes}"
    return f"{where}: decode {entry[DECODE]:.1f} µs, prefill {entry[PREFILL]:.1f} µs"


def show(path: Path, as_markdown: bool) -> int:
    """Print a results file's table; 1 if an engine failed."""
    read = partial(report.read, head="tails_model")
    if as_markdown:
        results, table = results_in(path, read, tails_report.markdown)
        print(table, end="")
        print(f"results: {path}", file=sys.stderr)
    else:
        results, _ = show_tables(path, read, tails_report.summary)
    return 1 if results["failures"] else 0
