"""`vllm-flashmla doctor`: can FLASHMLA run here, and if not, what is to be done about it."""

from __future__ import annotations

import argparse
import os

from rich.console import Console
from rich.table import Table

from . import report
from .checks import Check, examine
from .results import console_for_tables

HELP = "say what is installed, whether FLASHMLA can run here, and what to do where it cannot"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--report", action="store_true", help="print all of it as one block of text to paste into an issue"
    )


def run(args: argparse.Namespace) -> int:
    """Look at everything and print it; 0 only if FLASHMLA can run."""
    environment = dict(os.environ)  # as it was given
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")  # what was asked for is the table, or the report
    with Console(stderr=True).status("importing torch and vLLM, and trying the kernels …"):
        checks = examine()
    if args.report:
        print(report.write(checks, environment))
    else:
        show(checks)
    return 1 if any(check.remedy for check in checks) else 0


def show(checks: list[Check]) -> None:
    """Print every check, then what to do about each that failed."""
    wrong = [check for check in checks if check.remedy]
    table = Table(title="FLASHMLA on this machine", show_header=False)
    table.add_column()
    table.add_column()
    table.add_column(overflow="fold")  # a class's dotted name is of use only whole
    for check in checks:
        table.add_row("[red]wrong[/]" if check.remedy else "[green]ok[/]", check.name, check.found)
    console = console_for_tables()
    console.print(table)
    for check in wrong:
        console.print(f"{check.name}: {check.remedy}", markup=False, highlight=False, soft_wrap=True)
    console.print("FLASHMLA cannot run here." if wrong else "FLASHMLA can run here.")
