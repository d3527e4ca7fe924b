"""`vllm-flashmla doctor`: can FLASHMLA run here, and if not, what is to be done about it."""

from __future__ import annotations

import argparse
import os

from rich.console import Console
from rich.table import Table

from .checks import examine

HELP = "say what is installed, whether FLASHMLA can run here, and what to do where it cannot"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command takes none."""


def run(args: argparse.Namespace) -> int:
    """Print every check, then what to do about each that failed; 0 only if FLASHMLA can run."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")  # the table is what was asked for
    checks = examine()
    wrong = [check for check in checks if check.remedy]
    table = Table(title="FLASHMLA on this machine", show_header=False)
    table.add_column()
    table.add_column()
    table.add_column(overflow="fold")  # a class's dotted name is of use only whole
    for check in checks:
        table.add_row("[red]wrong[/]" if check.remedy else "[green]ok[/]", check.name, check.found)
    console = Console()
    console.print(table)
    for check in wrong:
        console.print(f"{check.name}: {check.remedy}", markup=False, highlight=False)
    console.print("FLASHMLA cannot run here." if wrong else "FLASHMLA can run here.")
    return 1 if wrong else 0
