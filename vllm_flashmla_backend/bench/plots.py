"""Pictures of a results file: a roofline with every case, and the ratios to the best peer as bars.

Where there are many cases, one alone: the ratios over how much is read.
"""

from __future__ import annotations

import re
from math import hypot, inf, log
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.patheffects import withStroke
from matplotlib.ticker import LogLocator, NullFormatter

from ..words import count
from .cases import ALSO, REGIMES
from .report import OURS, Comparison, compare, geometric_mean

COLOURS = dict(zip(REGIMES, ("#333333", "#1d4e89", "#9c6644", "#e07a00", "#7b2d8b", "#7d8597"), strict=True))
ROWS_COLOURS = (("up to 32", 32, "#1d4e89"), ("33 to 64", 64, "#e07a00"), ("more", inf, "#7b2d8b"))
"""By query tokens × heads of a sequence, which choose the kernel: in words, the most, colour. The numbers
are `layout`'s FEW_ROWS and TILE_ROWS, not imported, for it loads torch, which takes longer than drawing."""
PEER_MARKERS = {"flashmla": "s", "fa3": "^", "flashinfer": "o", "triton": "v"}
MOST_BARS = 60  # cases that are still read one by one
NAMED = 5  # of many cases, how many of the slowest are
GOAL, MUST, MISSED = "#1b7f3b", "#9bd08f", "#d1495b"
COLUMN_GAP = 1.1  # neighbours in the roofline whose intensities differ by less are numbered together
LABEL_DISTANCE = 1.085  # least ratio of the heights of two labels in one column of the roofline

Point = tuple[float, float, int, str]  # intensity, height, number, colour


def draw(results: dict, path: Path) -> list[Path]:
    """Draw the pictures of the results in `path` next to it; the paths of the PNG files."""
    if len(compare(results)) > MOST_BARS:
        pictures = {"ratios": ratio_scatter(results)}
    else:
        pictures = {"roofline": roofline(results), "ratios": ratio_bars(results)}
    paths = []
    for name, picture in pictures.items():
        paths.append(path.with_name(f"{path.stem}-{name}.png"))
        picture.savefig(paths[-1], dpi=130)
    return paths


def roofline(results: dict) -> Figure:
    """TFLOP/s over FLOP per byte, both logarithmic: ours filled, the best peer hollow, a line between."""
    comparisons, ceilings = compare(results), results["ceilings"]
    figure = Figure(figsize=(13, 8), layout="constrained")
    axes, key = figure.subplots(1, 2, width_ratios=(2.6, 1))
    points: list[Point] = []  # of ours
    intensities = [comparison.case.flops() / comparison.case.bytes_moved() for comparison in comparisons]
    for number, comparison in enumerate(comparisons, 1):
        row, colour = comparison.rows.get(OURS), COLOURS[comparison.regime]
        intensity = intensities[number - 1]
        if comparison.best:
            heights = [comparison.best["tflops"]] + ([row["tflops"]] if row else [])
            axes.plot([intensity] * len(heights), heights, color=colour, alpha=0.4, linewidth=1.2, zorder=2)
            axes.scatter(intensity, heights[0], s=34, facecolor="white", edgecolor=colour, zorder=3)
        if row:
            marker = "o" if row["right"] else "X"
            axes.scatter(intensity, row["tflops"], s=44, color=colour, marker=marker, zorder=4)
            points.append((intensity, row["tflops"], number, colour))
    for column in _columns(points):
        _number_points(axes, column)
    roofs = _draw_ceilings(axes, ceilings, intensities)
    axes.set(xscale="log", yscale="log", xlabel="FLOP per byte", ylabel="TFLOP/s")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter("{x:g}")
        axis.set_minor_formatter(NullFormatter())
    axes.set_title(_title("roofline", results))
    axes.grid(True, color="#e8e8e8")
    axes.set_axisbelow(True)
    axes.legend(
        handles=[
            *roofs,
            Line2D([], [], color="#444444", marker="o", linestyle="", label="ours"),
            Line2D(
                [], [], color="#444444", marker="o", markerfacecolor="white", linestyle="", label="best peer"
            ),
            *(Patch(color=COLOURS[name], label=name) for name in REGIMES if _has(comparisons, name)),
        ],
        loc="lower right",
        framealpha=0.95,
    )
    _write_key(key, comparisons)
    return figure


def _columns(points: list[Point]) -> list[list[Point]]:
    """The points by intensity, each with those that are close to it."""
    columns: list[list[Point]] = []
    for point in sorted(points):
        if not columns or point[0] > columns[-1][-1][0] * COLUMN_GAP:
            columns.append([])
        columns[-1].append(point)
    return columns


def _number_points(axes: Axes, column: list[Point]) -> None:
    """Number a column's points on its nearer side, left where both are, and apart where points are close."""
    side_x = {"right": column[0][0] / 1.055, "left": column[-1][0] * 1.06}  # by the words' alignment
    lowest = dict.fromkeys(side_x, 0.0)
    for intensity, height, number, colour in sorted(column, key=lambda point: point[1]):
        places = {side: (x, max(height, lowest[side])) for side, x in side_x.items()}
        _, side = min((hypot(log(x / intensity), log(y / height)), side) for side, (x, y) in places.items())
        x, y = places[side]
        lowest[side] = y * LABEL_DISTANCE
        axes.plot([intensity, x], [height, y], color=colour, linewidth=0.6, zorder=1)
        clear = [withStroke(linewidth=2, foreground="white")]  # of the lines and points that it lies on
        words = {"fontsize": 8.5, "color": colour, "ha": side, "va": "center", "zorder": 5}
        axes.text(x, y, str(number), path_effects=clear, **words)


def _draw_ceilings(axes: Axes, ceilings: dict, intensities: list[float]) -> list[Line2D]:
    """What reading and copying allow at each intensity, up to the product's throughput; lines to explain."""
    product, left, right = ceilings["product_tflops"], min(intensities) / 1.6, max(intensities) * 1.6
    lines = []
    for name, style in (("read", "-"), ("copy", ":")):
        gbps = ceilings[f"{name}_gbps"]
        xs = [left, product * 1e3 / gbps, right]  # FLOP per byte; the middle one is the ridge
        ys = [gbps * left / 1e3, product, product]
        label = f"{name}: {gbps:,.0f} GB/s; product: {product:,.0f} TFLOP/s"
        lines += axes.plot(xs, ys, "#333333", linestyle=style, linewidth=1.3, label=label, zorder=1)
    axes.set_xlim(left, right)
    return lines


def _write_key(axes: Axes, comparisons: list[Comparison]) -> None:
    """The case of each number."""
    axes.axis("off")
    step = 1 / max(len(comparisons), 24)
    for index, comparison in enumerate(comparisons):
        text = f"{index + 1:>2}  {comparison.case}"
        colour = COLOURS[comparison.regime]
        axes.text(0, 1 - index * step, text, fontsize=8.5, color=colour, va="top", family="monospace")


def ratio_bars(results: dict) -> Figure:
    """Best peer's time ÷ ours, a bar a case, coloured by what it reaches; must and goal as marks."""
    comparisons = compare(results)
    figure = Figure(figsize=(13, 1.9 + 0.31 * (len(comparisons) + 0.5)), layout="constrained")
    axes = figure.subplots()
    labels, last = [], None
    for y, comparison in enumerate(comparisons):
        ratio = comparison.ratio or 0.0
        axes.barh(y, ratio, height=0.68, color=_colour(comparison), zorder=2)
        targets = comparison.targets
        axes.plot([targets.must] * 2, [y - 0.45, y + 0.45], color="black", linewidth=1.6, zorder=3)
        axes.plot([targets.goal] * 2, [y - 0.45, y + 0.45], "k:", linewidth=1.6, zorder=3)
        end = max(ratio, targets.goal)
        axes.text(end + 0.02, y, _explain(comparison), fontsize=8.5, va="center", zorder=4)
        labels.append(str(comparison.case))
        if comparison.regime != last:  # named right of its first case
            last = comparison.regime
            beside = {"transform": axes.get_yaxis_transform(), "va": "center", "color": COLOURS[last]}
            axes.text(1.01, y, last, fontsize=8.5, **beside)
    axes.axvline(1, color="#888888", linewidth=1, zorder=1)
    axes.set_yticks(range(len(labels)), labels, family="monospace", fontsize=8.5)
    for tick, comparison in zip(axes.get_yticklabels(), comparisons, strict=True):
        tick.set_color(COLOURS[comparison.regime])
    widest = max([comparison.ratio or 0 for comparison in comparisons] + [1.5])
    axes.set(xlim=(0, widest * 1.42), ylim=(len(comparisons) - 0.4, -0.6))
    axes.set_xlabel("time of the best peer ÷ ours (above 1: ours is faster)")
    of_mean = [comparison for comparison in comparisons if comparison.regime != ALSO and comparison.ratio]
    cases = count(len(of_mean), "case")
    suffix = f"; geometric mean {geometric_mean(of_mean):.3f} over {cases}" if of_mean else ""
    axes.set_title(_title("ratio to the best peer", results) + suffix, fontsize=10.5)
    figure.legend(
        handles=[
            Patch(color=GOAL, label="goal reached"),
            Patch(color=MUST, label="must reached"),
            Patch(color=MISSED, label="missed"),
            Line2D([], [], color="black", label="must"),
            Line2D([], [], color="black", linestyle=":", label="goal"),
        ],
        loc="outside lower center",
        ncols=5,
        frameon=False,
    )
    return figure


def ratio_scatter(results: dict) -> Figure:
    """Best peer's time ÷ ours over the tokens read, a point a case; the least are named."""
    comparisons = compare(results)
    compared = [comparison for comparison in comparisons if comparison.ratio]
    figure = Figure(figsize=(11, 6.5), layout="constrained")
    axes = figure.subplots()
    for comparison in compared:
        peer, tokens = comparison.best["peer"], comparison.ours["tokens"]
        rows = comparison.case.s_q * comparison.case.h_q
        colour = next(colour for _, most, colour in ROWS_COLOURS if rows <= most)
        style = {"color": colour, "marker": PEER_MARKERS[peer]}
        axes.scatter(tokens, comparison.ratio, s=26, alpha=0.75, linewidth=0, **style)
    axes.axhline(1, color="#333333", linewidth=1.2)
    least = sorted(compared, key=lambda comparison: comparison.ratio)[:NAMED]
    words = [f"{comparison.ratio:.3f}  {comparison.case}" for comparison in least]
    axes.text(0.01, 0.02, "least:\n" + "\n".join(words), transform=axes.transAxes, fontsize=8.5)
    axes.set(xscale="log", xlabel="tokens in the cache, of all sequences")
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.set_ylabel("time of the best peer ÷ ours (above 1: ours is faster)")
    axes.set_ylim(bottom=min([1.0] + [comparison.ratio for comparison in least]) - 0.25)  # room for names
    axes.grid(True, color="#e8e8e8")
    axes.set_axisbelow(True)
    axes.set_title(f"{_title('ratio to the best peer', results)}\n{_ahead(comparisons)}", fontsize=10.5)
    figure.legend(
        handles=[
            *(Patch(color=colour, label=f"{rows} query tokens × heads") for rows, _, colour in ROWS_COLOURS),
            *(
                Line2D([], [], color="#444444", marker=marker, linestyle="", label=f"best peer {peer}")
                for peer, marker in PEER_MARKERS.items()
                if any(comparison.best["peer"] == peer for comparison in compared)
            ),
        ],
        loc="outside lower center",
        ncols=3,
        frameon=False,
    )
    return figure


def _ahead(comparisons: list[Comparison]) -> str:
    """In how many cases; those that ours or all peers got wrong, or did not run, count as behind."""
    ahead = sum((comparison.ratio or 0) >= 1 for comparison in comparisons)
    words = f"at or ahead of it in {ahead} of {count(len(comparisons), 'case')}"
    if (mean := geometric_mean(comparisons)) is None:
        return f"{words}; nothing to compare with"
    without = sum(comparison.ratio is None for comparison in comparisons)
    left_out = f", {count(without, 'case')} without a comparison left out" if without else ""
    return f"{words}; geometric mean {mean:.3f}{left_out}"


def _colour(comparison: Comparison) -> str:
    if comparison.goal_reached:
        return GOAL
    return MUST if comparison.must_reached else MISSED


def _explain(comparison: Comparison) -> str:
    if comparison.ours is None:
        return "ours is wrong" if OURS in comparison.rows else "ours was not measured"
    if comparison.best is None:
        return f"ours {comparison.ours['us']:.1f} µs; no peer to compare with"
    best = comparison.best
    words = f"{comparison.ratio:.3f}   {comparison.ours['us']:.1f} µs, {best['peer']} {best['us']:.1f} µs"
    if comparison.lacking and comparison.ratio >= comparison.targets.goal:
        words += f"; {comparison.lacking[1]}"
    return words


def _has(comparisons: list[Comparison], regime: str) -> bool:
    return any(comparison.regime == regime for comparison in comparisons)


def _title(name: str, results: dict) -> str:
    return f"MLA decode, {name}: {origin(results)}"


def origin(results: dict) -> str:
    """Machine, date and commit, as far as the file has them; of a commit its first 7 digits."""
    commit = re.sub(r"^([0-9a-f]{7})[0-9a-f]+", r"\1", results.get("commit") or "")
    known = [results.get("gpu") or results.get("device"), results.get("date"), commit]
    return ", ".join(filter(None, known))
