"""A results file: reading and writing it, what its figures come to, and the tables that show it."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, fields
from functools import partial
from math import exp, log
from pathlib import Path

from rich.console import Group
from rich.table import Table
from rich.text import Text

from ..words import count
from .cases import ALSO, GEOMEAN_GOAL, GEOMEAN_MUST, GOAL_US, REGIMES, TABLE, Case, Regime
from .fitting import Fitting, dense

OURS, INVARIANT = "ours", "invariant"
INVARIANT_MUST, INVARIANT_FROM_BATCH = 0.90, 16
"""Speed asked of the batch-invariant mode, as the default mode's time ÷ its own, and from which batch on."""

KINDS = {"ceilings": "", "model": "--serve", "tails_model": "--tails"}
"""A key at the head of each kind of results file, and the option by which `bench` makes and shows it."""

SHARES = ("of product", "of reading")  # columns of the table of cases that stand beside what they are of
BEST = "best peer"  # the column that stands for all peers where there is no room for each


@dataclass(frozen=True)
class Comparison:
    """One case: our row and the fastest peer's whose result is right; either may be lacking."""

    case: Case
    regime: str
    rows: dict[str, dict]  # by peer

    @property
    def ours(self) -> dict | None:
        row = self.rows.get(OURS)
        return row if row and row["right"] else None

    @property
    def best(self) -> dict | None:
        """The row of the fastest peer that is right."""
        right = [row for peer, row in self.rows.items() if peer not in (OURS, INVARIANT) and row["right"]]
        return min(right, key=lambda row: row["us"], default=None)

    @property
    def ratio(self) -> float | None:
        """The best peer's time ÷ ours: above 1 where we are faster."""
        return self.best["us"] / self.ours["us"] if self.ours and self.best else None

    @property
    def invariant_ratio(self) -> float | None:
        """The default mode's time ÷ the batch-invariant one's."""
        row = self.rows.get(INVARIANT)
        return self.ours["us"] / row["us"] if self.ours and row and row["right"] else None

    @property
    def targets(self) -> Regime:
        return REGIMES[self.regime]

    @property
    def must_reached(self) -> bool:
        """Whether ours is right and fast enough; with no peer to compare with it is not."""
        return self.ratio is not None and self.ratio >= self.targets.must

    @property
    def goal_reached(self) -> bool:
        """The ratio, and the throughput or time where the goal names one."""
        return self.ratio is not None and self.ratio >= self.targets.goal and self.lacking is None

    @property
    def lacking(self) -> tuple[str, str] | None:
        """What the goal asks besides the ratio, if ours does not reach it: its column, and in words."""
        goals = (("tflops", self.targets.goal_tflops, "TFLOP/s"), ("gbps", self.targets.goal_gbps, "GB/s"))
        for name, goal, unit in goals:
            if goal and self.ours[name] < goal:
                return unit, f"goal {goal:g} {unit}, ours {self.ours[name]:.0f}"
        if self.ours["us"] > GOAL_US.get(self.case, float("inf")):
            return OURS, f"goal {GOAL_US[self.case]:g} µs"
        return None


def compare(results: dict) -> list[Comparison]:
    """The cases of a results file, in the file's order."""
    names = [field.name for field in fields(Case)]
    cases: dict[Case, dict[str, dict]] = {}
    regimes = {}
    for row in results["rows"]:
        case = Case(**{name: row[name] for name in names})
        cases.setdefault(case, {})[row["peer"]] = row
        regimes[case] = row["regime"]
    return [Comparison(case, regimes[case], rows) for case, rows in cases.items()]


def geometric_mean(comparisons: list[Comparison]) -> float | None:
    """Of the ratios, over the cases that have one."""
    ratios = [comparison.ratio for comparison in comparisons if comparison.ratio]
    return exp(sum(map(log, ratios)) / len(ratios)) if ratios else None


def save(results: dict, path: Path) -> None:
    """Write the file whole or not at all, so that a run cut off leaves what it had: its rows, if any."""
    if not results["rows"]:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_text(json.dumps(results, indent=1) + "\n")
    unfinished.replace(path)


def read(path: Path, head: str = "ceilings") -> dict:
    """The results in `path`; ValueError where it is no results file of the kind with the key `head`."""
    try:
        results = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "no JSON"  # its words hold the path, too
        raise ValueError(f"{path}: {reason}; expected a results file of vllm-flashmla bench") from error
    rows = results.get("rows") if isinstance(results, dict) else None
    has_rows = isinstance(rows, list) and all(isinstance(row, dict) for row in rows)
    kinds = [kind for kind in KINDS if has_rows and kind in results]
    if not kinds:
        raise ValueError(f"{path}: expected a results file of vllm-flashmla bench")
    if head not in kinds:
        right, asked = KINDS[kinds[0]], KINDS[head]
        remedies = [f"add {right}"] * bool(right) + [f"leave out {asked}"] * bool(asked)
        command = f"bench {right}".strip()
        raise ValueError(f"{path}: a file of `{command}`; {' and '.join(remedies)}")
    if not rows:
        raise ValueError(f"{path}: got no rows, expected at least one measured case")
    return results


def summary(results: dict) -> Group:
    """All tables of a run: cases, regimes, ceilings and plan; then what was missing or failed."""
    comparisons = compare(results)
    regimes = _regime_table(comparisons)
    return Group(
        Fitting(_case_tables(comparisons, results["ceilings"])),
        Fitting([regimes, dense(regimes)]),
        *_lines(results, comparisons),
    )


def _case_tables(comparisons: list[Comparison], ceilings: dict) -> Iterator[Table]:
    """The table of all cases, and ones with less and less in them for narrower terminals."""
    peers = list(dict.fromkeys(peer for comparison in comparisons for peer in comparison.rows))
    made = partial(_case_table, comparisons, ceilings)
    verdict, figures = ["ratio", "must", "goal"], ["TFLOP/s", "of product", "GB/s", "of reading"]
    for details in (["error", "MHz", "workspace"], ["error", "MHz"], ["error"], []):
        yield made(["case", *peers, *verdict, *figures, *details])
    columns = ["case", *peers, *verdict, "TFLOP/s", "GB/s"]
    yield made(columns)
    yield dense(made(columns))
    for columns in ([*verdict, "TFLOP/s", "GB/s"], [*verdict, "TFLOP/s"], verdict, verdict[:2]):
        table = made(["case", OURS, BEST, *columns])
        yield table
        yield dense(table)
    yield dense(made(["case", OURS, BEST, *verdict[:2]], folding="case"))


def _case_table(comparisons: list[Comparison], ceilings: dict, shown: list[str], folding: str = "") -> Table:
    """The table of all cases with the columns `shown`; of which `folding` may take several lines."""
    shares = "; shares of the product's and the reading ceiling" if SHARES[0] in shown else ""
    table = Table(title=f"µs a call; best peer ÷ ours{shares}")
    for name in shown:
        heading = "" if name in SHARES else name
        table.add_column(heading, justify="left" if name == "case" else "right", no_wrap=name != folding)
    last = None
    for comparison in comparisons:
        if comparison.regime != last:
            table.add_section()
            table.add_row(Text(comparison.regime, style="bold"))
            last = comparison.regime
        cells = _cells(comparison, ceilings)
        table.add_row(*(cells.get(name, "") for name in shown))
    return table


def _cells(comparison: Comparison, ceilings: dict) -> dict[str, Text | str]:
    """What stands in the case's row, by column."""
    cells = {"case": str(comparison.case)} | {peer: _time(comparison, peer) for peer in comparison.rows}
    if comparison.best:
        cells[BEST] = f"{comparison.best['peer']} {comparison.best['us']:.1f}"
    cells |= _verdict(comparison) | _figures(comparison, ceilings)
    if comparison.ratio and comparison.lacking:
        column, _ = comparison.lacking
        cells[column] = Text(f"{cells[column]}✗", style="red")  # with a space, 120 columns would not do
    return cells


def _time(comparison: Comparison, peer: str) -> Text:
    row = comparison.rows[peer]
    if not row["right"]:
        return Text(f"{row['us']:.1f} WRONG", style="red")
    is_best = comparison.best is row
    return Text(f"{row['us']:.1f}", style="bold" if is_best else "")


def _verdict(comparison: Comparison) -> dict[str, Text]:
    if comparison.ratio is None:
        return dict.fromkeys(("ratio", "must", "goal"), Text("–"))
    targets = comparison.targets
    return {
        "ratio": Text(f"{comparison.ratio:.3f}", style="bold"),
        "must": _reached(comparison.must_reached, f"{targets.must:.2f}"),
        "goal": _reached(comparison.goal_reached, f"{targets.goal:.2f}"),
    }


def _reached(reached: bool, target: str) -> Text:
    return Text(f"{target} {'✓' if reached else '✗'}", style="green" if reached else "red")


def _figures(comparison: Comparison, ceilings: dict) -> dict[str, str]:
    row = comparison.rows.get(OURS)
    if row is None:
        return {}
    theirs = comparison.rows.get("flashmla")
    workspace = f"{row['workspace_bytes'] / 1e6:.1f}"
    if theirs:
        workspace += f" / {theirs['workspace_bytes'] / 1e6:.1f} MB"
    return {
        "TFLOP/s": f"{row['tflops']:.0f}",
        "of product": f"{row['tflops'] / ceilings['product_tflops']:.0%}",
        "GB/s": f"{row['gbps']:.0f}",
        "of reading": f"{row['gbps'] / ceilings['read_gbps']:.0%}",
        "error": "NaN" if row["rel_err"] is None else f"{row['rel_err']:.1e}",
        "MHz": "" if row["sm_mhz"] is None else f"{row['sm_mhz']:.0f}",
        "workspace": workspace,
    }


def _regime_table(comparisons: list[Comparison]) -> Table:
    table = Table(title="by regime: how many cases reach must and goal")
    for heading in ("regime", "cases", "least ratio", "mean", "must", "reached", "goal", "reached"):
        table.add_column(heading, justify="left" if heading == "regime" else "right")
    for name, regime in REGIMES.items():
        mine = [comparison for comparison in comparisons if comparison.regime == name]
        ratios = [comparison.ratio for comparison in mine if comparison.ratio]
        if not ratios:
            continue
        table.add_row(
            name,
            f"{len(mine)}",
            f"{min(ratios):.3f}",
            f"{geometric_mean(mine):.3f}",
            f"{regime.must:.2f}",
            f"{sum(comparison.must_reached for comparison in mine)}",
            _goal(regime),
            f"{sum(comparison.goal_reached for comparison in mine)}",
        )
    return table


def _goal(regime: Regime) -> str:
    words = [f"{regime.goal:.2f}"]
    words += [f"{regime.goal_tflops:g} TFLOP/s"] if regime.goal_tflops else []
    words += [f"{regime.goal_gbps:g} GB/s"] if regime.goal_gbps else []
    return ", ".join(words)


def _lines(results: dict, comparisons: list[Comparison]) -> Iterator[Text]:
    yield Text(
        "must and goal: the speed asked of each regime, as the best peer's time ÷ ours; "
        "some goals ask for TFLOP/s, GB/s or µs besides: ✗ marks ours where it misses that"
    )
    table_cases = [comparison for comparison in comparisons if comparison.regime != ALSO]
    mean = geometric_mean(table_cases)
    if mean:
        said = Text(f"geometric mean over {count(len(table_cases), 'case')}: {mean:.3f}")
        if {comparison.case for comparison in table_cases} == set(TABLE):  # of which must and goal are
            said.append("; must ").append_text(_reached(mean >= GEOMEAN_MUST, f"{GEOMEAN_MUST:.2f}"))
            said.append(", goal ").append_text(_reached(mean >= GEOMEAN_GOAL, f"{GEOMEAN_GOAL:.2f}"))
        yield said
    invariant = [c for c in comparisons if c.invariant_ratio and c.case.b >= INVARIANT_FROM_BATCH]
    if invariant:
        least = min(invariant, key=lambda comparison: comparison.invariant_ratio)
        reached = sum(comparison.invariant_ratio >= INVARIANT_MUST for comparison in invariant)
        yield Text(
            f"batch-invariant mode, b >= {INVARIANT_FROM_BATCH}: {INVARIANT_MUST:.2f} of the default mode's "
            f"speed in {reached} of {count(len(invariant), 'case')}, least {least.invariant_ratio:.2f} at "
            f"{least.case}"
        )
    ceilings = results["ceilings"]
    yield Text(
        f"ceilings: reading {ceilings['read_gbps']:.0f} GB/s, copying {ceilings['copy_gbps']:.0f} GB/s, "
        f"bf16 product {ceilings['product_tflops']:.0f} TFLOP/s; "
        f"a kernel of one element takes {ceilings['floor_us']:.1f} µs"
    )
    for plan in results.get("plan", ()):
        reached = _reached(plan["us"] <= plan["must_us"], f"{plan['must_us']:g}")
        yield Text.assemble(f"plan for b={plan['b']}: {plan['us']:.2f} µs, at most ", reached)
    for comparison in comparisons:
        if (row := comparison.rows.get(OURS)) and (theirs := comparison.rows.get("flashmla")):
            excess = row["workspace_bytes"] - theirs["workspace_bytes"]
            if excess > 0:
                words = f"{excess:,} bytes of workspace above flashmla's, which is the most that is asked for"
                yield Text(f"{comparison.case}: {words}", style="red")
    wrong = Counter(row["peer"] for row in results["rows"] if not row["right"])
    for peer, cases in wrong.items():
        yield Text(f"{peer}: wrong in {count(cases, 'case')}, and left out there", style="yellow")
    for peer, reason in results.get("missing", {}).items():
        yield Text(f"{peer} was not measured: {reason}", style="yellow")
    for failure in results.get("failures", ()):
        case = Case(**{field.name: failure[field.name] for field in fields(Case)})
        yield Text(f"{failure['peer']} failed at {case}: {failure['error']}", style="red")
