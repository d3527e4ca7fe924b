"""Tables on narrow terminals: of several, the widest that fits is shown."""

from __future__ import annotations

from collections.abc import Iterable
from copy import copy

from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.table import Table

UNBOUNDED = 10_000  # columns


class Fitting:
    """Shows the first of `choices` that the terminal is wide enough for; the last where it is for none."""

    def __init__(self, choices: Iterable[RenderableType]) -> None:
        self.choices = list(choices)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        *wider, narrowest = self.choices
        unbounded = options.update(width=UNBOUNDED)
        for choice in wider:
            if console.measure(choice, options=unbounded).maximum <= options.max_width:
                yield choice
                return
        yield narrowest


def dense(table: Table) -> Table:
    """The same table with nothing between its lines and its words."""
    made = copy(table)
    made.padding, made.show_edge = 0, False
    return made
