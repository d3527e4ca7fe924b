"""`vllm-flashmla bench`: our kernels and the peers' on the same tensors, against targets and ceilings.

`bench --serve` and `bench --tails`, which time whole vLLM instead, are in `bench_serve` and `bench_tails`.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from rich.console import Console
from rich.progress import Progress

from ..bench.cases import ROWS, Case
from ..words import count
from . import bench_serve, bench_tails
from .environment import device
from .options import names, require, require_out
from .results import describe_run, require_rows, show_pictures, show_tables, unused_path

HELP = "time our kernels against FlashMLA, FlashAttention-3, FlashInfer and Triton, and draw the results"

PEERS = ("flashmla", "fa3", "flashinfer", "triton")

OPTIONS = {
    "bench": {"rows", "case", "peers", "repeat", "plots", "build_limit"},
    "bench --serve": bench_serve.OPTIONS,
    "bench --tails": bench_tails.OPTIONS,
}
"""The options of each benchmark, besides those that all have."""
OF_ALL = {"out", "commit", "plot"}
SHOWING = {"plot", "plots", "markdown", "serve", "tails"}
"""Of these, the ones that go with `--plot`, which measures nothing."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--rows", choices=ROWS, default="24", help="which cases (default: 24)")
    which.add_argument(
        "--case",
        type=_case,
        action="append",
        metavar="'b=32 s_k=4096 h=16'",
        help="a case of your own instead, in the table's words: sequences, cached tokens of each, query "
        "heads; `s_q=2` behind b for two query tokens, `normal` or `one long` at the end for lengths that "
        "differ, then `float16`; may be given several times",
    )
    parser.add_argument(
        "--peers",
        default=",".join(PEERS),
        metavar="NAME,NAME,…",
        help=f"some of {','.join(PEERS)}, or '' for none (default: all)",
    )
    parser.add_argument(
        "--repeat",
        type=int,
        default=15,
        metavar="N",
        help="how often each call is timed; the median is taken (default: 15)",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("benchmarks/results"),
        metavar="DIR",
        help="directory for the results file and its pictures (default: benchmarks/results)",
    )
    parser.add_argument(
        "--plots",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="draw PNG files beside the results file (default: yes)",
    )
    parser.add_argument(
        "--plot",
        type=Path,
        metavar="FILE.json",
        help="measure nothing: show these results, anywhere, and draw them beside it (--tails: show alone)",
    )
    parser.add_argument(
        "--commit",
        metavar="HASH",
        help="the commit of this code, for the results file (default: what git says)",
    )
    parser.add_argument(
        "--build-limit",
        type=float,
        default=240,
        metavar="SECONDS",
        help="how long a peer's kernel may compile before it is left out (default: 240)",
    )
    bench_serve.add_arguments(parser)
    bench_tails.add_arguments(parser)


def _case(text: str) -> Case:
    try:
        return Case.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def require_own_options(args: argparse.Namespace) -> None:
    """SystemExit where an option that this benchmark does not have, and would not heed, has a value given."""
    if args.serve and args.tails:
        raise SystemExit("--serve and --tails are two benchmarks: expected one of them")
    command = "bench --serve" if args.serve else "bench --tails" if args.tails else "bench"
    own = OPTIONS[command] | OF_ALL
    if args.plot:
        command, own = f"{command} --plot", own & SHOWING
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    defaults = vars(parser.parse_args([]))
    given = [name for name, default in defaults.items() if getattr(args, name) != default]
    if others := [name for name in given if name not in own]:
        names = ", ".join("--no-plots" if n == "plots" else f"--{n.replace('_', '-')}" for n in others)
        if args.plot:
            pictures = "" if args.tails else f"; pictures go beside {args.plot}"
            raise SystemExit(f"{names}: not for `{command}`, which measures nothing{pictures}")
        its = [f"`{name}`" for name, options in OPTIONS.items() if options.issuperset(others)]
        hint = f", but for {' and '.join(its)}" if its else "; `vllm-flashmla bench --help` says what is"
        raise SystemExit(f"{names}: not for `{command}`{hint}")


def run(args: argparse.Namespace) -> int:
    """Measure and show; 0 if every result of ours was right, whatever its speed."""
    require_own_options(args)
    if args.serve:
        return bench_serve.run(args)
    if args.tails:
        return bench_tails.run(args)
    peers = names(args.peers)
    if unknown := set(peers) - set(PEERS):
        raise SystemExit(f"--peers has {', '.join(sorted(unknown))}, expected some of {', '.join(PEERS)}")
    require(("--repeat", args.repeat, 1), ("--build-limit", args.build_limit, 1))
    if args.plot:
        return show(args.plot, args.plots)
    if reason := why_not_here():
        print(f"vllm-flashmla bench measures on a Hopper GPU: {reason}")
        print("`vllm-flashmla bench --plot FILE.json` shows and draws results anywhere.")
        print("--serve and --tails can be tried on a CPU: benchmarks/README.md says how.")
        return 1
    require_out(args.out)
    return show(measure_all(args, peers), args.plots)


def why_not_here() -> str | None:
    """Why our kernels cannot be measured on this machine, or None if they can."""
    from ..flash_mla.providers import provider_for

    if device().type == "cpu":
        return "torch sees no GPU"
    try:
        kernels = provider_for(device()).name
    except ValueError as error:
        return str(error)
    return None if kernels == "native" else f"VLLM_FLASHMLA_KERNELS chooses {kernels}, expected native"


def measure_all(args: argparse.Namespace, peer_names: list[str]) -> Path:
    """Measure all cases; the results file, written anew after each of them."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")  # peers import vLLM, and the table is what counts
    from ..bench import measure, peers, report
    from ..bench.clock import GpuMonitor

    monitor = GpuMonitor(device())
    timer = measure.Timer(device(), monitor, args.repeat)
    loaded, missing = peers.load([report.OURS, report.INVARIANT, *peer_names], device(), args.build_limit)
    results = describe_run(args, monitor, "peers", "repeat", "build_limit") | {
        "missing": missing,
        "ceilings": measure.ceilings(timer, device()),
        "plan": measure.plan_launches(timer, device()),
        "rows": [],
        "failures": [],
    }
    chosen = args.case or ROWS[args.rows]
    kind = "-random" if chosen is ROWS["random"] else ""
    path = unused_path(args.out, results["gpu"], results["date"], kind)
    with Progress(console=Console(stderr=True)) as progress:
        for case in progress.track(chosen, description=count(len(chosen), "case")):
            rows, failures = measure.measure_case(case, loaded, timer, device())
            results["rows"] += rows
            results["failures"] += failures
            report.save(results, path)
            times = ", ".join(f"{row['peer']} {row['us']:.1f}" for row in rows)
            progress.console.print(f"{case}: {times} µs", highlight=False)
    failed = {each["peer"]: each["error"] for each in results["failures"]}
    require_rows(results, (f"{peer}: {why}" for peer, why in (missing | failed).items()))
    return path


def show(path: Path, with_plots: bool) -> int:
    """Print a results file's tables and draw its pictures; 0 if every result of ours in it is right."""
    from ..bench import report

    results, console = show_tables(path, report.read, report.summary)
    if with_plots:
        from ..bench.plots import draw

        show_pictures(console, draw, results, path)
    failed = any(failure["peer"] == report.OURS for failure in results.get("failures", ()))
    return 0 if not failed and all(comparison.ours for comparison in report.compare(results)) else 1
