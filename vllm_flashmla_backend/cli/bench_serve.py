"""`vllm-flashmla bench --serve`: decode steps of whole vLLM, with this plugin and with vLLM's own."""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.progress import Progress

from ..bench import report, serve, serve_report
from ..bench.serve import BATCHES, CONTEXTS, HEADS, MODEL, PEERS
from ..words import count
from .environment import device
from .options import names, numbers, require, require_cpu_cache, require_heads, require_model, require_out
from .results import describe_run, failed, gpu_monitor, require_rows, show_pictures, show_tables, unused_path

ON_A_CPU = "--serve --layers 1 --heads 16 --batches 1,4 --contexts 1024 --rounds 2"


_SHAPE = {"backends", "heads", "batches", "contexts", "layers", "model"}
OPTIONS = _SHAPE | {"serve", "rounds", "steps", "row_seconds", "plots"}
"""What `--serve` heeds, by the names of the parsed arguments, besides what all benchmarks do."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("whole vLLM")
    group.add_argument(
        "--serve",
        action="store_true",
        help="time decode steps of vLLM: a model with DeepSeek-V3's attention and random weights, under this "
        "plugin and each of vLLM's own MLA backends; --out, --plots, --plot and --commit mean the same, "
        "and rows join those of earlier runs of the same code on the same kind of machine",
    )
    group.add_argument(
        "--backends",
        metavar="NAME,NAME,…",
        help="some of ours and vLLM's own (default: all for this device)",
    )
    for option, default, what in (
        ("--heads", HEADS, "query heads of the model, up to 128, an engine for each"),
        ("--batches", BATCHES, "sequences that decode together"),
        ("--contexts", CONTEXTS, "cached tokens of each sequence"),
    ):
        words = f"{what} (default: {','.join(map(str, default))})"
        group.add_argument(option, type=numbers, default=default, metavar="N,N,…", help=words)
    for option, default, what in (
        ("--layers", 16, "layers of the model"),
        ("--rounds", 8, "how often a row's requests are added anew and timed; the fastest counts"),
        ("--steps", 12, "decode steps timed in each round, at least 8"),
    ):
        words = f"{what} (default: {default})"
        group.add_argument(option, type=int, default=default, metavar="N", help=words)
    group.add_argument(
        "--row-seconds",
        type=float,
        default=15,
        metavar="SECONDS",
        help="a row's steps, of all rounds together, end after so long (default: 15)",
    )
    group.add_argument(
        "--model",
        type=Path,
        default=MODEL,
        metavar="DIR",
        help=f"a model's directory, of which config.json alone is read (default: configs/{MODEL.name})",
    )


def run(args: argparse.Namespace) -> int:
    """Measure and show; 0 if every row of ours was measured or left out, whatever its speed."""
    require(
        ("--layers", args.layers, 1),
        ("--rounds", args.rounds, 1),
        ("--steps", args.steps, 8),
        ("--row-seconds", args.row_seconds, 1),
    )
    require_heads(*args.heads)
    if args.plot:
        return show(args.plot, args.plots)
    require_model(args.model, serve.SHAPE_KEYS)
    require_out(args.out)
    jobs = jobs_of(args)
    require_cpu_cache(jobs[0], f"--contexts up to {max(args.contexts):,}", ON_A_CPU)
    return show(measure_all(args, jobs), args.plots)


def chosen_backends(words: str | None) -> list[str]:
    possible = (report.OURS, *PEERS[device().type])
    chosen = names(words) if words else list(possible)
    if unknown := set(chosen) - set(possible):
        raise SystemExit(
            f"--backends has {', '.join(sorted(unknown))}, expected some of {', '.join(possible)}"
        )
    if not chosen:
        raise SystemExit(f"--backends names none, expected some of {', '.join(possible)}")
    return chosen


def jobs_of(args: argparse.Namespace) -> list[serve.Job]:
    """A job for each backend."""
    return [
        serve.Job(
            backend=backend,
            model=str(args.model),
            layers=args.layers,
            heads=args.heads,
            batches=args.batches,
            contexts=args.contexts,
            rounds=args.rounds,
            steps=args.steps,
            row_seconds=args.row_seconds,
        )
        for backend in chosen_backends(args.backends)
    ]


def measure_all(args: argparse.Namespace, jobs: list[serve.Job]) -> Path:
    """Run an engine for each backend and number of heads; the results file, written anew after each row."""
    results, path = begin(args, jobs)
    with Progress(console=Console(stderr=True)) as progress:
        bar = progress.add_task(count(len(jobs), "backend"), total=sum(job.num_rows for job in jobs))
        for job in jobs:
            for reported in serve.measure(job):
                ((kind, entry),) = reported.items()
                line = tell(job.backend, kind, entry)
                progress.console.print(line, soft_wrap=True, highlight=False, markup=False)
                if kind == "engine":
                    continue
                if kind == "failure":
                    results["failures"].append(entry | {"heads": job.heads})
                else:
                    serve.add(results, kind, entry)
                    progress.advance(bar)
                report.save(results, path)
    failures = [f"{each['backend']} {each['error']}" for each in results["failures"]]
    left_out = [f"{serve.name(each)}: {each['reason']}" for each in results["skipped"]]
    require_rows(results, failures + left_out)
    return path


def begin(args: argparse.Namespace, jobs: list[serve.Job]) -> tuple[dict, Path]:
    """The results that the run adds to, and their file: an earlier one's where it may join them.

    Failures of what is measured again are left out of it.
    """
    head = describe_run(args, gpu_monitor(), "rounds", "steps", "row_seconds")
    head |= {"model": serve.model_shape(args.model, args.layers)}
    if path := serve.mergeable(args.out, head):
        results = report.read(path, head="model")
        return results | {"failures": serve.other_failures(results, jobs)}, path
    path = unused_path(args.out, head["gpu"] or "cpu", head["date"], "-serve")
    return head | {"rows": [], "skipped": [], "failures": []}, path


def tell(backend: str, kind: str, entry: dict) -> str:
    """A line for what an engine reported."""
    if kind == "failure":
        return f"{backend} {failed(entry)}"
    if kind == "engine":
        return f"{backend} h={entry['h']}: {entry['class']}, started in {entry['seconds']} s"
    said = f"{entry['ms_per_step']:.3f} ms" if kind == "rows" else f"left out, {entry['reason']}"
    return f"{serve.name(entry)}: {said}"


def show(path: Path, with_plots: bool) -> int:
    """Print a results file's table and draw its picture; 0 unless our process failed."""
    results, console = show_tables(path, partial(report.read, head="model"), serve_report.summary)
    if with_plots:
        from ..bench.serve_plot import draw

        show_pictures(console, draw, results, path)
    failed = any(failure["backend"] == report.OURS for failure in results["failures"])
    return 1 if failed else 0
