"""What the rows of `vllm-flashmla bench --tails` come to, as a table for the terminal and for the docs."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import Group
from rich.table import Table
from rich.text import Text

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
    beside = f" beside {decodes} decodes" if decodes else ""
    return f"{heads} heads, {tails} tail{'s' if tails > 1 else ''}{beside}"


def summary(results: dict) -> Group:
    """The table, up to which length decode is worth it, and what failed."""
    table = Table(title=_title(results))
    table.add_column("tail", justify="right")
    for column in columns(results):
        table.add_column(name(column), justify="right")
    for length, cells in _cells(results):
        table.add_row(str(length), *cells)
    return Group(table, *_lines(results))


def markdown(results: dict) -> str:
    """The table for the docs."""
    found = columns(results)
    lines = [_title(results), "", f"| tail | {' | '.join(map(name, found))} |"]
    lines.append("|---:|" + "---:|" * len(found))
    lines += [f"| {length} | {' | '.join(cells)} |" for length, cells in _cells(results)]
    worth = [str(worth_decoding(by_length(results, column))) for column in found]
    return "\n".join([*lines, f"| decode is worth it up to | {' | '.join(worth)} |", ""])


def _title(results: dict) -> str:
    cached, where = results["rows"][0]["cached"], results["gpu"] or "CPU"
    return f"µs of a layer's attention by decode / by prefill, {cached:,} cached tokens, {where}"


def _cells(results: dict) -> Iterator[tuple[int, list[str]]]:
    found = [by_length(results, column) for column in columns(results)]
    for length in sorted({length for rows in found for length in rows}):
        yield length, [_cell(rows.get(length)) for rows in found]


def _cell(row: dict | None) -> str:
    return f"{row[DECODE]:,.0f} / {row[PREFILL]:,.0f}" if row else "–"


def _lines(results: dict) -> Iterator[Text]:
    for column in columns(results):
        longest = worth_decoding(by_length(results, column))
        yield Text(f"{name(column)}: decode is not slower up to a tail of {longest}")
    for failure in results["failures"]:
        yield Text(f"h={failure['h']} failed: {failure['error']}", style="red")
