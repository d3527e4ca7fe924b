"""What the kinds of `bench` share: results files, their heads and names, and how they are shown."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Iterable
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console, RenderableType

from .environment import VLLM, commit, describe, device, installed_version

if TYPE_CHECKING:
    from ..bench.clock import GpuMonitor

WIDTH = 220  # columns where the output is no terminal: every table fits whole


def gpu_monitor() -> GpuMonitor | None:
    """Of this machine's GPU; None where there is none."""
    from ..bench.clock import GpuMonitor

    return GpuMonitor(device()) if device().type == "cuda" else None


def describe_run(args: argparse.Namespace, monitor: GpuMonitor | None, *options: str) -> dict:
    """Machine, versions and these options, which decide how a row is timed: the head of a results file.

    There is no monitor without a GPU.
    """
    import torch

    return {
        "gpu": torch.cuda.get_device_name(device()) if monitor else None,
        "device": describe(device()),
        "driver": monitor.driver() if monitor else None,
        "torch": torch.__version__,
        "vllm": version_of(*VLLM),
        "flashinfer": version_of("flashinfer-python"),
        "package": version_of("vllm-flashmla-backend"),
        "commit": args.commit or commit(),
        "date": date.today().isoformat(),
        "options": {name: getattr(args, name) for name in options},
    }


def version_of(*names: str) -> str | None:
    found = installed_version(*names)
    return found.split()[-1] if found else None


def unused_path(directory: Path, gpu: str, day: str, kind: str = "") -> Path:
    """`<gpu>-<date><kind>.json`, numbered from the second run of a day on."""
    name = f"{re.sub(r'[^a-z0-9]+', '-', gpu.lower()).strip('-')}-{day}{kind}"
    path, number = directory / f"{name}.json", 2
    while path.exists():
        path, number = directory / f"{name}-{number}.json", number + 1
    return path


def require_rows(results: dict, failures: Iterable[str]) -> None:
    """SystemExit with the causes where nothing was measured, and so no file was written."""
    if not results["rows"]:
        raise SystemExit("\n".join(["nothing was measured, and no file written:", *failures]))


def failed(failure: dict) -> str:
    """That an engine's process failed, the end of its log, and why: last, where it is seen."""
    return f"failed; the end of its log:\n{failure['log'][-1500:].rstrip()}\n{failure['error']}"


def results_in(
    path: Path, read: Callable[[Path], dict], make: Callable[[dict], RenderableType]
) -> tuple[dict, RenderableType]:
    """What a results file holds and what `make` makes of it, or SystemExit with the reason."""
    try:
        results = read(path)
        return results, make(results)
    except ValueError as error:
        raise SystemExit(str(error)) from error
    except KeyError as lacking:
        raise SystemExit(f"{path}: {lacking} is missing; expected a whole results file") from lacking


def console_for_tables() -> Console:
    """As wide as the terminal; where the output goes elsewhere, wide enough for every table."""
    console = Console()
    return console if console.is_terminal else Console(width=WIDTH)


def show_tables(
    path: Path, read: Callable[[Path], dict], summary: Callable[[dict], RenderableType]
) -> tuple[dict, Console]:
    """Print the tables of a results file, or exit with the reason; what it holds, and where it went."""
    (results, tables), console = results_in(path, read, summary), console_for_tables()
    console.print(tables)
    console.print(f"results: {path}", soft_wrap=True)
    return results, console


def show_pictures(
    console: Console, draw: Callable[[dict, Path], list[Path]], results: dict, path: Path
) -> None:
    """Draw a results file's pictures and say where they are, or exit with the reason."""
    try:
        for picture in draw(results, path):
            console.print(f"plot: {picture}", soft_wrap=True)
    except OSError as error:
        raise SystemExit(f"{error.filename}: the picture cannot be written: {error.strerror}") from error
