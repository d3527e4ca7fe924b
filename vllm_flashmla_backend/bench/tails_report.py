"""What the rows of `vllm-flashmla bench --tails` come to, as a table for the terminal and for the docs."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from ..words import count
from .fitting import Fitting, dense
from .tails import DECODE, PREFILL


def columns(results: dict) -> list[tuple[int, int, int]]:
    """Heads, tails and decodes of the file's rows, in the order of their heads."""
    found = dict.fromkeys((row["h"], row["tails"], row["decodes"]) for row in results["rows"])
    return sorted(found, key=lambda column: column[0])


def by_length(results: dict, column: tuple[int, int, int]) -> dict[int, dict]:
    rows = [row for row in results["rows"] if (row["h"], row["tails"], row["decodes"]) == column]
    return {row["length"]: row for row in sorted(rows, key=lambda row: row["length"])}


def worth_decoding(rows: dict[int, dict]) -> int:
    """The longest measured tail up to which decode is never slower than prefill; 0 if there is none."""
    longest = 0
    for length, row in rows.items():
        if row[DECODE] > row[PREFILL]:
            break
        longest = length
    return longest


def name(column: tuple[int, int, int]) -> str:
    heads, tails, decodes = column
    beside = f" beside {count(decodes, 'decode')}" if decodes else ""
    return f"{count(heads, 'head')}, {count(tails, 'tail')}{beside}"


def summary(results: dict) -> Group:
    """The table, up to which length decode is worth it, and what failed."""
    return Group(Fitting(_tables(results)), *_lines(results))


def _tables(results: dict) -> Iterator[RenderableType]:
    """One table; for narrower terminals with folded headings; for still narrower ones by heads."""
    found = columns(results)
    yield _table(results, found)
    yield _table(results, found, folded=True)
    by_heads = [list(group) for _, group in groupby(found, key=lambda column: column[0])]
    tables = [_table(results, each, folded=True) for each in by_heads]
    yield Group(*tables)
    yield Group(*map(dense, tables))


def _table(results: dict, found: list[tuple[int, int, int]], folded: bool = False) -> Table:
    """The table of the columns `found`."""
    table = Table(title=_title(results))
    table.add_column("tail", justify="right")
    for column in found:
        heading = name(column)
        if folded:
            heading = heading.replace(", ", "\n").replace(" beside", "\nbeside")
        table.add_column(heading, justify="right", no_wrap=True)
    for length, cells in _cells(results, found):
        table.add_row(str(length), *cells)
    return table


def markdown(results: dict) -> str:
    """The table in Markdown, up to which length decode is worth it in its last row."""
    found = columns(results)
    lines = [_title(results), "", f"| tail | {' | '.join(map(name, found))} |"]
    lines.append("|---:|" + "---:|" * len(found))
    lines += [f"| {length} | {' | '.join(cells)} |" for length, cells in _cells(results, found)]
    worth = [str(worth_decoding(by_length(results, column))) for column in found]
    return "\n".join([*lines, f"| decode is worth it up to | {' | '.join(worth)} |", ""])


def _title(results: dict) -> str:
    cached, where = results["rows"][0]["cached"], results["gpu"] or "CPU"
    return f"µs of a layer's attention by decode / by prefill, {cached:,} cached tokens, {where}"


def _cells(results: dict, found: list[tuple[int, int, int]]) -> Iterator[tuple[int, list[str]]]:
    by_column = [by_length(results, column) for column in found]
    for length in sorted({length for rows in by_column for length in rows}):
        yield length, [_cell(rows.get(length)) for rows in by_column]


def _cell(row: dict | None) -> str:
    return f"{row[DECODE]:,.0f} / {row[PREFILL]:,.0f}" if row else "–"


def _lines(results: dict) -> Iterator[Text]:
    for column in columns(results):
        longest = worth_decoding(by_length(results, column))
        yield Text(f"{name(column)}: decode is not slower up to a tail of {longest}")
    for failure in results["failures"]:
        yield Text(f"h={failure['h']} failed: {failure['error']}", style="red")
