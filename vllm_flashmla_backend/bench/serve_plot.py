"""The picture of a serve results file: how vLLM's decode step with each peer compares with ours."""

from __future__ import annotations

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from ..words import count
from .plots import GOAL, MISSED, origin
from .report import OURS
from .serve_report import LEFT_OUT, MUST, StepComparison, backends_of, compare, timing

PEER_COLOURS = ("#1d4e89", "#e07a00", "#7d8597", "#7b2d8b")
NOT_COMPARED = "#777777"
TALLEST = 2.0  # where a bar is cut off: one that is many times slower would flatten the others
GAP = 1.6  # where its gap is, below the bar's number
GAP_EXPLAINED = "\na bar with a gap goes on, to the number in it"


def draw(results: dict, path: Path) -> list[Path]:
    """Draw the decode steps of whole vLLM that are in `path` next to it; the path of the PNG file, alone."""
    picture = path.with_suffix(".png")
    step_bars(results).savefig(picture, dpi=130)
    return [picture]


def step_bars(results: dict) -> Figure:
    """Each peer's time of a decode step ÷ ours: a panel for each number of heads, a group for each shape."""
    comparisons = compare(results)
    peers = [backend for backend in backends_of(results) if backend != OURS]
    heads = sorted({comparison.h for comparison in comparisons})
    figure = Figure(figsize=(13, 0.8 + 3.6 * len(heads)), layout="constrained")
    panels = figure.subplots(len(heads), 1, squeeze=False)[:, 0]
    for axes, h in zip(panels, heads, strict=True):
        _draw_steps(axes, [comparison for comparison in comparisons if comparison.h == h], peers)
        axes.set_ylabel(f"{h} heads: time ÷ ours")
    layers = results["model"]["layers"]
    is_cut = any(_ratio(each, peer) > TALLEST for each in comparisons if each.ours for peer in each.rows)
    figure.suptitle(
        f"decode step of vLLM, {count(layers, 'layer')}, the {timing(results)}: {origin(results)}\n"
        "above 1: ours is faster; below each group ours in ms, and best peer ÷ ours; * attention-bound"
        f"{GAP_EXPLAINED if is_cut else ''}"
    )
    figure.legend(
        handles=[Patch(color=PEER_COLOURS[i], label=peer) for i, peer in enumerate(peers)],
        loc="outside lower center",
        ncols=4,
        frameon=False,
    )
    return figure


def _draw_steps(axes: Axes, comparisons: list[StepComparison], peers: list[str]) -> None:
    width = 0.8 / max(len(peers), 1)
    for index, peer in enumerate(peers):
        for x, comparison in enumerate(comparisons):
            place = x + (index - (len(peers) - 1) / 2) * width
            words = {"ha": "center", "fontsize": 7.5, "rotation": 90, "zorder": 4}
            if peer in comparison.left_out:
                axes.text(place, 0.03, LEFT_OUT, va="bottom", color=NOT_COMPARED, **words)
            if not (comparison.ours and peer in comparison.rows):
                continue
            ratio = _ratio(comparison, peer)
            axes.bar(place, min(ratio, TALLEST), width * 0.94, color=PEER_COLOURS[index], zorder=2)
            if ratio > TALLEST:
                gap = {"color": "white", "linewidth": 3, "zorder": 3}
                axes.plot([place - width / 2, place + width / 2], [GAP, GAP + 0.04], **gap)
            if ratio > 0.9 * TALLEST:  # no room above the bar
                top = min(ratio, TALLEST) - 0.03
                axes.text(place, top, f"{ratio:.2f}", va="top", color="white", **words)
            else:
                clear = {"facecolor": "white", "edgecolor": "none", "pad": 0.8}  # of the line at 1
                axes.text(place, ratio + 0.02, f"{ratio:.2f}", va="bottom", bbox=clear, **words)
    axes.axhline(1, color="black", linewidth=1.2, zorder=3)
    axes.set_xticks(range(len(comparisons)), [_name_steps(each) for each in comparisons], fontsize=8)
    for tick, comparison in zip(axes.get_xticklabels(), comparisons, strict=True):
        tick.set_color(_colour(comparison))
    axes.set(ylim=(0, TALLEST * 1.02), xlim=(-0.6, len(comparisons) - 0.4))
    axes.grid(True, axis="y", color="#e8e8e8")
    axes.set_axisbelow(True)


def _ratio(comparison: StepComparison, peer: str) -> float:
    return comparison.rows[peer][comparison.by] / comparison.ours[comparison.by]


def _colour(comparison: StepComparison) -> str:
    """Of a group's name: whether ours is fast enough there, if that is known."""
    if comparison.ratio is None:
        return NOT_COMPARED
    return GOAL if comparison.ratio >= MUST else MISSED


def _name_steps(comparison: StepComparison) -> str:
    """Batch and context; ours in ms; the ratio to the best peer, starred where attention-bound."""
    context = comparison.context
    shape = f"{comparison.b} × {context // 1024}k" if context % 1024 == 0 else f"{comparison.b} × {context}"
    lacking = LEFT_OUT if OURS in comparison.left_out else "not measured"
    ours = f"{comparison.ours[comparison.by]:.2f} ms" if comparison.ours else lacking
    star = "*" if comparison.attention_bound else ""
    return f"{shape}\n{ours}\n{comparison.ratio:.2f}{star}" if comparison.ratio else f"{shape}\n{ours}"
