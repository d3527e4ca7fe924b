"""What the rows of `vllm-flashmla bench --serve` come to, and the tables that show it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from rich.console import Group
from rich.table import Table
from rich.text import Text

from ..words import count
from .fitting import Fitting, dense
from .report import BEST, OURS, geometric_mean

MUST, GOAL = 1.00, 1.15
"""Best peer's time ÷ ours: in every row, and in the geometric mean of the attention-bound rows."""

ATTENTION_BOUND = 2.0
"""A row is attention-bound where the best peer's step takes so many times as long as at the shortest
context at which a peer was measured with the same heads and batch: the rest of the step is the same."""

LEFT_OUT = "left out"


@dataclass(frozen=True)
class StepComparison:
    """Decode steps of one shape: ours, and the fastest of vLLM's own backends; any may be lacking."""

    h: int
    b: int
    context: int
    rows: dict[str, dict]  # by backend
    shortest: dict[str, dict]  # the rows of the shortest context that a peer was measured at
    left_out: frozenset[str]  # backends that the shape does not fit, or that took too long
    by: str  # the key of a row by which it is compared

    def __str__(self) -> str:
        return f"h={self.h} b={self.b} context={self.context}"

    @property
    def ours(self) -> dict | None:
        return self.rows.get(OURS)

    @property
    def best(self) -> dict | None:
        """The fastest peer's row."""
        return _best(self.rows, self.by)

    @property
    def ratio(self) -> float | None:
        """The best peer's time ÷ ours: above 1 where we are faster."""
        return self.best[self.by] / self.ours[self.by] if self.ours and self.best else None

    @property
    def attention_bound(self) -> bool:
        base = _best(self.shortest, self.by)
        return bool(self.best and base and self.best[self.by] >= ATTENTION_BOUND * base[self.by])


def _best(rows: dict[str, dict], by: str) -> dict | None:
    peers = [row for backend, row in rows.items() if backend != OURS]
    return min(peers, key=lambda row: row[by], default=None)


def deciding(results: dict) -> str:
    """The key by which rows are compared: the GPU's time where it is known of all.

    The rest of a step is the host's, the same code for all backends, and differs more from run to run than
    backends do.
    """
    return "gpu_ms" if all("gpu_ms" in row for row in results["rows"]) else "ms_per_step"


def compare(results: dict, by: str | None = None) -> list[StepComparison]:
    """The shapes of a results file, by heads, batch and context; those left out for all backends, too."""
    by = by or deciding(results)
    rows, left_out = _by_shape(results["rows"]), _by_shape(results["skipped"])
    shortest = {}
    for shape in sorted(rows):
        if _best(rows[shape], by):
            shortest.setdefault(shape[:2], rows[shape])
    return [
        StepComparison(
            *shape, rows.get(shape, {}), shortest.get(shape[:2], {}), frozenset(left_out.get(shape, ())), by
        )
        for shape in sorted(rows.keys() | left_out.keys())
    ]


def _by_shape(rows: list[dict]) -> dict[tuple[int, int, int], dict[str, dict]]:
    """The rows of each shape, by backend."""
    shapes: dict[tuple[int, int, int], dict[str, dict]] = {}
    for row in rows:
        shapes.setdefault((row["h"], row["b"], row["context"]), {})[row["backend"]] = row
    return shapes


def summary(results: dict) -> Group:
    """The table of all rows, then what they come to, and what was left out."""
    comparisons = compare(results)
    return Group(Fitting(_tables(results, comparisons)), *_lines(results, comparisons))


def backends_of(results: dict) -> list[str]:
    """Ours first, then the peers, in the file's order."""
    found = dict.fromkeys(row["backend"] for row in results["rows"] + results["skipped"])
    return sorted(found, key=lambda backend: backend != OURS)


def fastest_rounds(results: dict) -> bool:
    """Whether the rows have their fastest round's time; in older files it is the median of all stretches."""
    return all("rounds_ms" in row for row in results["rows"])


def timing(results: dict) -> str:
    """What the time of a row is."""
    if deciding(results) == "gpu_ms":
        return "GPU's time, median of all steps"
    return "fastest of its rounds' medians" if fastest_rounds(results) else "median of all its stretches"


def _tables(results: dict, comparisons: list[StepComparison]) -> Iterator[Table]:
    """The table of all rows, and for narrower terminals ones without edges, and with the best peer alone."""
    for backends in (backends_of(results), [OURS, BEST]):
        table = _table(results, comparisons, backends)
        yield table
        yield dense(table)
    yield dense(_table(results, comparisons, [BEST], with_verdict=False))


def _table(
    results: dict, comparisons: list[StepComparison], backends: list[str], with_verdict: bool = True
) -> Table:
    layers = results["model"]["layers"]
    whole = "; in brackets the fastest round of whole steps" if deciding(results) == "gpu_ms" else ""
    table = Table(
        title=f"ms a decode step of {count(layers, 'layer')}, the {timing(results)}{whole}\n"
        "ratio: best peer ÷ ours; * attention-bound"
    )
    for heading in ("h", "b", "context", *backends, "ratio", *[f"at least {MUST:.2f}"] * with_verdict):
        table.add_column(heading, justify="right", no_wrap=True)
    for index, comparison in enumerate(comparisons):
        if index and comparison.h != comparisons[index - 1].h:
            table.add_section()
        cells = [_time(comparison, backend) for backend in backends]
        context = f"{comparison.context:,}{'*' if comparison.attention_bound else ' '}"
        ratio, reached = _verdict(comparison)
        cells += [ratio, *[reached] * with_verdict]
        table.add_row(f"{comparison.h}", f"{comparison.b}", context, *cells)
    return table


def _time(comparison: StepComparison, backend: str) -> Text:
    row = comparison.best if backend == BEST else comparison.rows.get(backend)
    if row is None:
        left_out = comparison.left_out - {OURS} if backend == BEST else comparison.left_out & {backend}
        return Text(LEFT_OUT, style="yellow") if left_out else Text("–")
    name = f"{row['backend']} " if backend == BEST else ""
    whole = f" ({row['ms_per_step']:.2f})" if comparison.by == "gpu_ms" else ""
    return Text(f"{name}{row[comparison.by]:.3f}{whole}", style="bold" if row is comparison.best else "")


def _verdict(comparison: StepComparison) -> list[Text]:
    if comparison.ratio is None:
        return [Text("–")] * 2
    reached = comparison.ratio >= MUST
    return [
        Text(f"{comparison.ratio:.3f}", style="bold"),
        Text("✓" if reached else "✗", style="green" if reached else "red"),
    ]


def _lines(results: dict, comparisons: list[StepComparison]) -> Iterator[Text]:
    compared = [comparison for comparison in comparisons if comparison.ratio]
    ahead = sum(comparison.ratio >= MUST for comparison in compared)
    yield Text(
        f"asked for: the best peer's time ÷ ours of at least {MUST:.2f} in every row, "
        f"and of {GOAL:.2f} (the goal) in the geometric mean of the attention-bound rows"
    )
    yield Text(f"at or ahead of the best peer in {ahead} of {count(len(compared), 'row')}")
    bound = [comparison for comparison in compared if comparison.attention_bound]
    for name, rows in (("attention-bound row", bound), ("row", compared)):
        if mean := geometric_mean(rows):
            goal = f"; goal {GOAL:.2f} {'✓' if mean >= GOAL else '✗'}" if rows is bound else ""
            yield Text(f"geometric mean over {count(len(rows), name)}: {mean:.3f}{goal}")
    if deciding(results) == "gpu_ms":
        whole = [each for each in compare(results, "ms_per_step") if each.ratio]
        ahead = sum(each.ratio >= MUST for each in whole)
        yield Text(f"by whole steps, host included: at or ahead in {ahead} of {count(len(whole), 'row')}")
    for skipped in results["skipped"]:
        shape = f"h={skipped['h']} b={skipped['b']} context={skipped['context']}"
        yield Text(f"{skipped['backend']} left out at {shape}: {skipped['reason']}", style="yellow")
    for failure in results["failures"]:
        yield Text(f"{failure['backend']} failed: {failure['error']}", style="red")
