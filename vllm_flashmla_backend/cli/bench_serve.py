"""`vllm-flashmla bench --serve`: decode steps of whole vLLM, with this plugin and with vLLM's own."""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.progress import Progress

from ..bench import report, serve, serve_report
from ..bench.serve import BATCHES, CONTEXTS, HEADS, MODEL, PEERS
from .environment import device
from .results import describe_run, numbers, show_tables, unused_path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("whole vLLM")
    group.add_argument(
        "--serve",
        action="store_true",
        help="time decode steps of vLLM: a model with DeepSeek-V3's attention and random weights, under this "
        "plugin and each of vLLM's own MLA backends; --out, --plots, --plot and --commit mean the same, "
        "and rows join those of earlier runs of the same code on the same kind of machine",
    )
    group.add_argument("--backends", help="some of ours and vLLM's own (default: all for this device)")
    group.add_argument("--heads", type=numbers, default=HEADS, metavar="N,N,…", help=_default(HEADS))
    group.add_argument("--batches", type=numbers, default=BATCHES, metavar="N,N,…", help=_default(BATCHES))
    group.add_argument("--contexts", type=numbers, default=CONTEXTS, metavar="N,N,…", help=_default(CONTEXTS))
    group.add_argument("--layers", type=int, default=16, help="of the model (16)")
    group.add_argument("--steps", type=int, default=32, help="decode steps timed in a row, at least 8 (32)")
    group.add_argument(
        "--row-seconds", type=float, default=15, metavar="SECONDS", help="a row's steps end then (15)"
    )
    group.add_argument("--model", type=Path, default=MODEL, help="directory of another config.json")


def _default(values: tuple[int, ...]) -> str:
    return f"default: {','.join(map(str, values))}"


def run(args: argparse.Namespace) -> int:
    """Measure and show; 0 if every row of ours was measured or does not fit, whatever its speed."""
    for option, value, least in (("--layers", args.layers, 1), ("--steps", args.steps, 8)):
        if value < least:
            raise SystemExit(f"{option} is {value}, expected at least {least}")
    if args.plot:
        return show(args.plot, args.plots)
    if not (args.model / "config.json").is_file():
        raise SystemExit(f"--model is {args.model}, which has no config.json")
    return show(measure_all(args, chosen_backends(args.backends)), args.plots)


def chosen_backends(words: str | None) -> list[str]:
    possible = (report.OURS, *PEERS[device().type])
    chosen = [name for name in words.split(",") if name] if words else list(possible)
    if unknown := set(chosen) - set(possible):
        names = ", ".join(sorted(unknown))
        raise SystemExit(f"--backends has {names}, expected some of {','.join(possible)}")
    return chosen


def measure_all(args: argparse.Namespace, backends: list[str]) -> Path:
    """Run an engine for each backend and number of heads; the results file, written anew after each row."""
    results, path = begin(args)
    jobs = [
        serve.Job(
            backend=backend,
            model=str(args.model),
            layers=args.layers,
            heads=args.heads,
            batches=args.batches,
            contexts=args.contexts,
            steps=args.steps,
            row_seconds=args.row_seconds,
        )
        for backend in backends
    ]
    with Progress(console=Console(stderr=True)) as progress:
        bar = progress.add_task(f"{len(jobs)} backends", total=sum(job.num_rows for job in jobs))
        for job in jobs:
            for reported in serve.measure(job):
                ((kind, entry),) = reported.items()
                line = tell(job.backend, kind, entry)
                progress.console.print(line, soft_wrap=True, highlight=False, markup=False)
                if kind == "engine":
                    continue
                if kind == "failure":
                    results["failures"].append(entry)
                else:
                    serve.add(results, kind, entry)
                    progress.advance(bar)
                report.save(results, path)
    return path


def begin(args: argparse.Namespace) -> tuple[dict, Path]:
    """The results that the run adds to, and their file: an earlier one's where it may join them."""
    from ..bench.clock import GpuMonitor

    monitor = GpuMonitor(device()) if device().type == "cuda" else None
    head = describe_run(args, monitor) | {"model": serve.model_shape(args.model, args.layers)}
    if path := serve.mergeable(args.out, head):
        return report.read(path, head="model") | {"failures": []}, path
    path = unused_path(args.out, head["gpu"] or "cpu", head["date"], "-serve")
    return head | {"rows": [], "skipped": [], "failures": []}, path


def tell(backend: str, kind: str, entry: dict) -> str:
    """A line for what an engine reported."""
    if kind == "failure":
        return f"{backend} failed: {entry['error']}; the end of its log:\n{entry['log'][-1500:]}"
    if kind == "engine":
        return f"{backend} h={entry['h']}: {entry['class']}, started in {entry['seconds']} s"
    said = f"{entry['ms_per_step']:.3f} ms" if kind == "rows" else f"left out, {entry['reason']}"
    return f"{backend} h={entry['h']} b={entry['b']} context={entry['context']}: {said}"


def show(path: Path, with_plots: bool) -> int:
    """Print a results file's table and draw its picture; 0 unless a row of ours is lacking."""
    results, console = show_tables(path, partial(report.read, head="model"), serve_report.summary)
    if with_plots:
        from ..bench.serve_plot import draw

        console.print(f"plot: {draw(results, path)}", soft_wrap=True)
    failed = any(failure["backend"] == report.OURS for failure in results["failures"])
    return 1 if failed else 0
