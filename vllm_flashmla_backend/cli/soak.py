"""`vllm-flashmla soak`: a server under load for minutes; nothing may be lost, wrong, or grow."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import http.client
import json
import os
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from ..processes import task_ended_by_signals
from .demo import RECALL
from .environment import VLLM, commit, describe, device
from .options import require, require_model, require_out
from .results import gpu_monitor, version_of

if TYPE_CHECKING:
    from ..serving import Server
    from ..soak.load import Load, Outcome
    from ..soak.watch import Sample, Watched

HELP = "serve a model and put it under load: bursts, aborts, all lengths; answers checked, memory watched"

NAME = "soak"
SAMPLE_SECONDS, LINE_SECONDS = 1.0, 10.0
HEALTH_SECONDS = 10.0
MOST_AT_ONCE = 10_000  # more clients than one machine has ports for, in a few seconds
QUIET_SECONDS = 30.0  # for the server to notice that the last client has gone
CACHE = "64M"  # 28,000 tokens of the recall model: a burst needs many times as much


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model",
        type=Path,
        default=RECALL,
        metavar="DIR",
        help="the model to serve (default: configs/recall)",
    )
    parser.add_argument(
        "--base-url",
        metavar="URL",
        help="ask a server that runs already, e.g. http://host:8000 (default: start one)",
    )
    parser.add_argument(
        "--name", default=NAME, help=f"the name by which the server knows its model (default: {NAME})"
    )
    for option, kind, default, what in (
        ("--seconds", float, 300, "seconds for which requests are sent"),
        ("--rate", float, 20, "requests a second, on average"),
        ("--burst", int, 200, "requests sent at once, besides, in each burst"),
        ("--burst-every", float, 30, "seconds from burst to burst"),
        ("--max-tokens", int, 8192, "tokens of the longest prompt and its answer together"),
        ("--abort-share", float, 0.1, "share of the clients that hang up before their answer ends"),
        ("--seed", int, 0, "decides what is asked, and when"),
    ):
        words = f"{what} (default: {default:g})"
        parser.add_argument(option, type=kind, default=default, metavar="N", help=words)
    parser.add_argument(
        "--scored",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="the model knows the recall task; without, answers are held against their length alone",
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FILE.json",
        help="write the figures to this file, too (default: show them alone)",
    )
    parser.add_argument(
        "options",
        nargs="*",
        help=f"after --, for `vllm serve`; --kv-cache-memory-bytes {CACHE} goes before them",
    )


def run(args: argparse.Namespace) -> int:
    """Put the server under load and show the figures; 0 if nothing was lost, wrong, or grew."""
    from ..soak.report import figures
    from ..soak.watch import Watched

    check(args)
    console, outcomes, watched = Console(), [], Watched()
    try:
        with server_of(args) as server:
            asyncio.run(drive(args, server, outcomes, watched, console))
    except BaseException:
        if outcomes:
            show(args, figures(outcomes, watched, cut_off=True), console)
        raise
    return show(args, figures(outcomes, watched), console)


def show(args: argparse.Namespace, made: dict, console: Console) -> int:
    """Print the figures of a run and write them to `--out`; 0 if it passed."""
    from ..soak.report import faults, table

    wrong = list(faults(made, args.scored))
    if args.out:
        args.out.write_text(json.dumps(settings(args) | made | {"faults": wrong}, indent=1) + "\n")
    console.print(table(made))
    for fault in wrong:
        console.print(fault, style="red", markup=False)
    for error, times in made["errors"].items():
        console.print(f"{times:,} × {error}", markup=False, soft_wrap=True)
    if args.out:
        console.print(f"figures: {args.out}", soft_wrap=True)
    return 1 if wrong else 0


def check(args: argparse.Namespace) -> None:
    """SystemExit where an option is out of range."""
    require(
        ("--seconds", args.seconds, 1),
        ("--rate", args.rate, 0.01, MOST_AT_ONCE),
        ("--burst", args.burst, 0, MOST_AT_ONCE),
        ("--burst-every", args.burst_every, 1),
        ("--max-tokens", args.max_tokens, 16),
        ("--abort-share", args.abort_share, 0, 1),
    )
    if args.base_url:
        require_no_server_options(args)
    else:
        require_model(args.model)
    if args.out:
        if args.out.is_dir():
            raise SystemExit(f"--out is {args.out}, a directory; expected the name of a file in it")
        if not args.out.parent.is_dir():
            raise SystemExit(f"--out is {args.out}, expected a file in a directory that exists")
        require_out(args.out.parent)


def require_no_server_options(args: argparse.Namespace) -> None:
    """SystemExit where options are given that only a server of our own would heed."""
    given = [*args.options, *(["--model"] if args.model != RECALL else [])]
    if given:
        raise SystemExit(
            f"{' '.join(given)}: for a server that is started here, where --base-url names one that runs; "
            "expected one or the other"
        )


@contextlib.contextmanager
def server_of(args: argparse.Namespace) -> Iterator[Server]:
    """The server to ask: the one that is named, or one of our own."""
    from ..serving import Server, serve

    if args.base_url:
        server = Server(args.base_url.rstrip("/"))
        check_health(server)
        yield server
        return
    options = ["--kv-cache-memory-bytes", CACHE, "--max-model-len", str(args.max_tokens)]
    if device().type == "cpu":
        options += ["--enforce-eager"]  # compiling takes a CPU minutes
        # oneDNN keeps a compiled product for each number of tokens, up to 1,024: it would pass for a leak
        os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "8")
    with contextlib.ExitStack() as stack:
        try:
            server = stack.enter_context(serve(args.model, *options, *args.options, name=args.name))
        except RuntimeError as error:
            raise SystemExit(str(error)) from error
        yield server


def check_health(server: Server) -> None:
    """SystemExit where no server of vLLM answers at the address."""
    try:
        urllib.request.urlopen(f"{server.url}/health", timeout=HEALTH_SECONDS).close()
    except (OSError, ValueError, http.client.HTTPException) as error:
        why = error.reason if type(error) is urllib.error.URLError else error
        raise SystemExit(
            f"--base-url is {server.url}, where /health does not answer: {why}; "
            "expected the address of a running server, e.g. http://host:8000"
        ) from error


async def drive(
    args: argparse.Namespace, server: Server, outcomes: list[Outcome], watched: Watched, console: Console
) -> None:
    """Run the load and watch the server; fills `outcomes` and `watched` as they come."""
    import openai

    from ..soak.asks import arrivals, make_asks
    from ..soak.load import Load

    client = openai.AsyncOpenAI(**server.client_options(), timeout=600)
    load = Load(client, args.name, outcomes)
    times = arrivals(args.seed, args.seconds, args.rate, args.burst, args.burst_every)
    endless = make_asks(args.seed, args.max_tokens, args.abort_share, args.scored)
    asks = list(islice(endless, len(times)))  # all made before, so that the load waits for none
    with task_ended_by_signals():
        watching = asyncio.create_task(watch(server, load, watched, console))
        async with client:
            await load.run(asks, times)
        watching.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await watching
        watched.left_running = await wait_until_quiet(server)


async def watch(server: Server, load: Load, watched: Watched, console: Console) -> None:
    """Take a sample every second, and print a line every ten."""
    from ..soak.watch import sample

    start = last_line = time.monotonic()
    read_gpu = gpu_memory(server)
    while True:
        await asyncio.sleep(SAMPLE_SECONDS)
        try:
            watched.samples.append(await asyncio.to_thread(sample, server, read_gpu))
        except Exception as error:  # of whatever kind: one sample that fails must not end the load
            watched.missed += 1
            if watched.missed == 1:
                console.print(f"a sample of the server is missed: {error}", markup=False, soft_wrap=True)
            continue
        if time.monotonic() - last_line >= LINE_SECONDS:
            last_line = time.monotonic()
            words = line(last_line - start, load, watched.samples[-1])
            console.print(words, soft_wrap=True, highlight=False)


def line(seconds: float, load: Load, sample: Sample) -> str:
    """How the run stands."""
    count = {
        name: load.count(lambda outcome, name=name: outcome.ended == name)
        for name in ("completed", "aborted", "failed")
    }
    wrong = load.count(lambda outcome: outcome.right is False)
    host = f", {sample.host >> 20:,} MiB" if sample.host else ""
    gpu = f", GPU {sample.gpu >> 20:,} MiB" if sample.gpu else ""
    return (
        f"{seconds:4.0f} s: {len(load.outcomes):,} sent, {count['completed']:,} completed, "
        f"{count['aborted']:,} aborted, {count['failed']:,} failed, {wrong:,} wrong; "
        f"{sample.running} running, {sample.waiting} waiting{host}{gpu}"
    )


def gpu_memory(server: Server) -> Callable[[], int | None]:
    """What reads the bytes in use on the server's GPU; gives None where there is none, or none to be seen."""
    is_here = urllib.parse.urlsplit(server.url).hostname in ("127.0.0.1", "localhost", "::1")
    monitor = gpu_monitor() if is_here else None
    return monitor.memory_bytes if monitor else lambda: None


async def wait_until_quiet(server: Server) -> int | None:
    """Requests that the server has left when it was given time to end them; None if it does not say."""
    from ..soak.watch import RUNNING, WAITING

    deadline = time.monotonic() + QUIET_SECONDS
    while True:
        try:
            left = int(sum(await asyncio.to_thread(server.metrics, RUNNING, WAITING)))
        except ConnectionError:
            left = None
        if left == 0 or time.monotonic() > deadline:
            return left
        await asyncio.sleep(0.5)


def settings(args: argparse.Namespace) -> dict:
    """What was run, and on what, as it stands at the head of the figures' file."""
    import torch

    asked = ("seconds", "rate", "burst", "burst_every", "max_tokens", "abort_share", "seed", "scored")
    load = {name: getattr(args, name) for name in asked}
    if args.base_url:  # what it runs on is not known here
        return {"base_url": args.base_url, "model": args.name} | load
    return {
        "device": describe(device()),
        "torch": torch.__version__,
        "vllm": version_of(*VLLM),
        "commit": commit(),
        "model": args.model.name,
        "options": args.options,
    } | load
