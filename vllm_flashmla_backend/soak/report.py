"""What a run came to: its figures, whether it passed, and the table that shows it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from statistics import quantiles

from rich.table import Table

from ..words import count
from .load import Outcome
from .watch import Watched, growth

LEAST_RIGHT = 0.99
MOST_ERRORS = 20  # how many different ones are kept, each with how often it came


def figures(outcomes: Sequence[Outcome], watched: Watched, cut_off: bool = False) -> dict:
    """The figures of a run, as they stand in its JSON file; times in milliseconds, memory in bytes."""
    samples = watched.samples
    ended = [outcome.ended for outcome in outcomes]
    completed = [outcome for outcome in outcomes if outcome.ended == "completed"]
    scored = [outcome.right for outcome in completed if outcome.right is not None]
    first = [(outcome.first - outcome.sent) * 1e3 for outcome in completed]
    # of short answers the first piece may hold all tokens, and there is nothing between
    each = [(o.last - o.first) / (o.tokens - 1) * 1e3 for o in completed if o.tokens > 1]
    errors = Counter(outcome.error for outcome in outcomes if outcome.error)
    grown = {name: growth([(each.at, getattr(each, name)) for each in samples]) for name in ("host", "gpu")}
    return {
        "requests": len(outcomes),
        "completed": len(completed),
        "aborted": ended.count("aborted"),
        "failed": ended.count("failed"),
        "lost": ended.count(None),
        "left_running": watched.left_running,
        "prompt_tokens": sum(outcome.ask.num_tokens for outcome in completed),
        "tokens": sum(outcome.tokens for outcome in completed),
        "answers": len(scored),
        "right": sum(scored),
        "first_token_ms": _percentiles(first),
        "per_token_ms": _percentiles(each),
        "most_running": max((sample.running for sample in samples), default=0),
        "most_waiting": max((sample.waiting for sample in samples), default=0),
        "preemptions": samples[-1].preemptions if samples else 0,
        "samples": len(samples),
        "samples_missed": watched.missed,
        "memory": {name: vars(value) | {"flat": value.flat} for name, value in grown.items() if value},
        "errors": dict(errors.most_common(MOST_ERRORS)),
        "cut_off": cut_off,
    }


def _percentiles(values: Sequence[float]) -> dict | None:
    if len(values) < 2:
        return None
    hundredths = quantiles(values, n=100, method="inclusive")
    return {"p50": round(hundredths[49], 2), "p99": round(hundredths[98], 2)}


def faults(run: dict, scored: bool) -> Iterator[str]:
    """Why the run did not pass; nothing if it did.

    Parameters
    ----------
    run : its figures.
    scored : whether answers were to be held against what is right.
    """
    if run["cut_off"]:
        yield "cut off before its end: what still ran counts as lost"
    for name in ("lost", "failed", "left_running"):
        if run[name]:
            yield f"{count(run[name], 'request')} {name.replace('_', ' ')}"
    if run["left_running"] is None and not run["cut_off"]:
        yield "the server does not say whether requests are left running"
    if run["samples_missed"] > run["samples"]:
        asked = run["samples"] + run["samples_missed"]
        yield f"the server was seen {count(run['samples'], 'time')} of {asked}: its memory is not known"
    if scored and not run["answers"]:
        yield "no answer was scored"
    if scored and run["right"] < LEAST_RIGHT * run["answers"]:
        yield f"{run['right']} of {run['answers']} answers right, expected at least {LEAST_RIGHT:.0%}"
    for name, memory in run["memory"].items():
        if not memory["flat"]:
            yield f"{name} memory grew from {_mib(memory['begin'])} to {_mib(memory['end'])}"


def table(run: dict) -> Table:
    """The table that a run ends with."""
    made = Table(title="FLASHMLA under load", show_header=False)
    for name in ("requests", "completed", "aborted", "failed", "lost", "left_running"):
        made.add_row(name.replace("_", " "), "?" if run[name] is None else f"{run[name]:,}")
    made.add_row("tokens", f"{run['prompt_tokens']:,} of prompts, {run['tokens']:,} of answers")
    share = f" ({run['right'] / run['answers']:.2%})" if run["answers"] else ""
    made.add_row("right answers", f"{run['right']:,} of {run['answers']:,}{share}")
    for name, title in (("first_token_ms", "to the first token"), ("per_token_ms", "for each token after")):
        ms = run[name]
        made.add_row(title, f"p50 {ms['p50']:.1f} ms, p99 {ms['p99']:.1f} ms" if ms else "–")
    made.add_row("at once", f"up to {run['most_running']} running, {run['most_waiting']} waiting")
    made.add_row("preemptions", f"{run['preemptions']:,}")
    for name, title in (("host", "server's memory"), ("gpu", "GPU's memory")):
        memory = run["memory"].get(name)
        span = "not watched, or not for long enough"
        if memory:
            span = f"{_mib(memory['begin'])} after the warm-up, {_mib(memory['end'])} at the end"
        made.add_row(title, span)
    return made


def _mib(count: int) -> str:
    return f"{count / (1 << 20):,.0f} MiB"
