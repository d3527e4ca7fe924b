"""The command line: `vllm-flashmla doctor | demo | bench | soak | plan`. One file per command."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Callable

from ..processes import ended_by_signals
from . import bench, demo, doctor, plan, soak
from .environment import installed_version

COMMANDS = {"doctor": doctor, "demo": demo, "bench": bench, "soak": soak, "plan": plan}
"""Name of each command and its module: `HELP`, `add_arguments(parser)`, `run(args) -> exit status`."""

WITH_VLLM = ("vllm", "torch", "psutil", "openai")
"""Modules that commands need and that come with vLLM, which is not installed with this package."""


def main(argv: list[str] | None = None) -> int:
    """Run one command; its exit status, 0 where all is well."""
    parser = argparse.ArgumentParser(prog="vllm-flashmla", description="Look at, and try, FLASHMLA.")
    version = installed_version("vllm-flashmla-backend") or "vllm-flashmla-backend, not installed"
    parser.add_argument("--version", action="version", version=version)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, module in COMMANDS.items():
        command = commands.add_parser(name, help=module.HELP, description=module.HELP)
        command.register("type", int, _read_as(int, "a whole number"))
        command.register("type", float, _read_as(float, "a number"))
        module.add_arguments(command)
    args, unknown = parser.parse_known_args(argv)
    if unknown:  # said with the command's usage, not with that of all
        commands.choices[args.command].error(f"unrecognized arguments: {' '.join(unknown)}")
    try:
        with ended_by_signals():
            return COMMANDS[args.command].run(args)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 128 + signal.SIGINT
    except ModuleNotFoundError as error:
        if error.name not in WITH_VLLM:
            raise
        raise SystemExit(f"{error}; `vllm-flashmla doctor` says what is missing, and what to do") from error


def _read_as(kind: type, words: str) -> Callable[[str], float]:
    """What reads an option's number; argparse's own word on a wrong one is not what is expected instead."""

    def read(text: str) -> float:
        try:
            return kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r}, expected {words}") from None

    return read
