"""`vllm-flashmla plan`: a picture of which part works on which pages of which sequence."""

from __future__ import annotations

import argparse
from collections import defaultdict
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.text import Text

from .. import LONGEST_DECODED
from ..words import count
from .options import require, require_heads

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from ..flash_mla.schedule import Split

HELP = "draw which part of the GPU works on which pages of which sequence, in the terminal or as a PNG"

HOPPER_SMS = 132
LONGEST = 2**31 - 1  # lengths are int32
MOST_PARTS = 65_536  # hundreds of times what a GPU runs at once
MOST_DRAWN = 2048  # as bars: 10 s, and 47,000 pixels high, of 65,535 that matplotlib can write
WIDEST, NARROWEST = 60, 10  # columns of the longest part's bar
LEGEND = "sequence[first:end) is that sequence's pages from first to before end; both count from 0"
SHADES, COLOURS = "█▓▒░", ("cyan", "yellow", "magenta", "green", "blue", "red")  # sequences take turns


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--lens", required=True, metavar="N,N,…", help="tokens in the cache of each sequence, as in 100,2000"
    )
    parser.add_argument("--heads", type=int, default=128, help="query heads, 1 to 128 (default: 128)")
    parser.add_argument(
        "--query-len",
        type=int,
        default=1,
        help=f"query tokens of each sequence, a token and its drafts, up to {LONGEST_DECODED} (default: 1)",
    )
    parser.add_argument(
        "--parts",
        type=int,
        metavar="N",
        help=f"parts to plan for, up to {MOST_PARTS:,}, with --out {MOST_DRAWN:,} (default: as many as this "
        f"GPU runs at once, or one of {HOPPER_SMS} SMs where there is none)",
    )
    parser.add_argument(
        "--batch-invariant", action="store_true", help="the plan that vLLM's VLLM_BATCH_INVARIANT=1 gets"
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FILE.png",
        help="draw in this file, of any kind that matplotlib writes (default: in the terminal)",
    )


def run(args: argparse.Namespace) -> int:
    """Plan on the host, as `schedule.plan` specifies it, and draw; always 0."""
    from ..flash_mla import schedule
    from ..flash_mla.row_tiling import row_tiling

    lengths = parse_lengths(args.lens)
    require_heads(args.heads)
    require(("--query-len", args.query_len, 1, LONGEST_DECODED))
    most_parts = MOST_DRAWN if args.out else MOST_PARTS
    if args.parts is not None and not 1 <= args.parts <= most_parts:
        raise SystemExit(
            f"--parts is {args.parts}, expected 1 to {most_parts:,}" + " with --out" * bool(args.out)
        )
    rows = args.heads * args.query_len
    sms = None if args.parts else num_sms()
    tiling = row_tiling(args.query_len, args.heads, 1)
    num_parts = args.parts or schedule.num_parts(sms, tiling.num_row_tiles)
    level = schedule.chunk_level(rows, args.batch_invariant)
    metadata, _ = schedule.plan(lengths, num_parts, level, rows)
    work = by_part(schedule.splits_of(metadata, lengths), num_parts)
    if args.batch_invariant:  # a part begins with its last sequence
        work = [splits[::-1] for splits in work]
    if args.out:
        save(draw(work, lengths), args.out)
        print(f"plot: {args.out}")
    else:
        console = Console()
        for line in lines(work, bar_width(work, console.width) if console.is_terminal else WIDEST):
            console.print(line, soft_wrap=True)
        print(LEGEND)
    if sms:
        tiles = count(tiling.num_row_tiles, "tile")
        print(
            f"{count(num_parts, 'part')}: as many as {sms} SMs run at once, with {tiles} of query rows each"
        )
    print(summary(work, lengths))
    if level:
        print(chunks(lengths, level))
        handed_over = int((metadata[:, schedule.Field.FIRST_SPLITS] < 0).sum())
        print(f"{count(handed_over, 'sequence')} handed over: a part goes on with the sum of the one before")
    return 0


def parse_lengths(text: str) -> list[int]:
    """`100,2000` as numbers."""
    words = [word.strip() for word in text.split(",")]
    if not all(word.isdecimal() and len(word) < 20 and int(word) <= LONGEST for word in words):
        raise SystemExit(f"--lens is {text!r}, expected lengths of 0 to {LONGEST:,} with commas between them")
    return [int(word) for word in words]


def save(picture: Figure, path: Path) -> None:
    """Write the picture, or exit with the reason."""
    if not path.suffix:  # matplotlib would add one
        raise SystemExit(f"--out is {path}, expected a name that ends in .png")
    try:
        picture.savefig(path, dpi=120)
    except OSError as error:
        raise SystemExit(f"--out is {path}: {error.strerror}") from error
    except (ValueError, RuntimeError) as error:  # no kind that matplotlib knows, or lacks the program for
        raise SystemExit(f"--out is {path}: {error}") from error


def num_sms() -> int:
    """Of this machine's GPU, or of an H100 or H200 where there is none."""
    import torch

    if not torch.cuda.is_available():
        return HOPPER_SMS
    return torch.cuda.get_device_properties(0).multi_processor_count


def by_part(splits: list[Split], num_parts: int) -> list[list[Split]]:
    """Each part's splits; idle parts have none."""
    work: list[list[Split]] = [[] for _ in range(num_parts)]
    for split in splits:
        work[split.part].append(split)
    return work


def num_pages(splits: list[Split]) -> int:
    return sum(split.page_end - split.page_begin for split in splits)


def bar_width(work: list[list[Split]], columns: int) -> int:
    """Of the longest part's bar, so that a line fits into `columns`, if it can."""
    words = max(len(bar(part, splits, 1, 0).plain) for part, splits in enumerate(work))
    return max(NARROWEST, min(WIDEST, columns - words))


def lines(work: list[list[Split]], width: int = WIDEST) -> list[Text]:
    """A line for each part with work, and one for each run of idle parts."""
    longest = max(1, *(num_pages(splits) for splits in work))
    found = []
    for busy, run in groupby(enumerate(work), key=lambda item: bool(item[1])):
        parts = list(run)
        if busy:
            found += [bar(part, splits, longest, width) for part, splits in parts]
        else:
            first, last = parts[0][0], parts[-1][0]
            found.append(Text(f"part {first:>3} idle" if first == last else f"parts {first} to {last} idle"))
    return found


def bar(part: int, splits: list[Split], longest: int, width: int) -> Text:
    """The part's pages, shaded and coloured by sequence, and its splits in words."""
    line, done, drawn = Text(f"part {part:>3} "), 0, 0
    for split in splits:
        done += split.page_end - split.page_begin
        upto = round(done / longest * width)
        line.append(SHADES[split.seq % 4] * (upto - drawn), style=COLOURS[split.seq % len(COLOURS)])
        drawn = upto
    line.append(" " * (width - drawn))
    line.append(f" {done:>5} {'page ' if done == 1 else 'pages'}  " + "  ".join(map(name, splits)))
    return line


def name(split: Split) -> str:
    """`3[64:96)`: pages 64 to 95 of sequence 3."""
    return f"{split.seq}[{split.page_begin}:{split.page_end})"


def summary(work: list[list[Split]], lengths: list[int]) -> str:
    """How even the plan is: an idle part, or one with more pages than the others, costs time."""
    pages = [num_pages(splits) for splits in work]
    splits_of_seq: dict[int, int] = defaultdict(int)
    for splits in work:
        for split in splits:
            splits_of_seq[split.seq] += 1
    most = max(splits_of_seq.values())
    cut = sum(number > 1 for number in splits_of_seq.values())
    cuts = f"{count(cut, 'sequence')} cut, at most into {most}" if cut else "none cut"
    busy = sum(bool(splits) for splits in work)
    return (
        f"{count(len(lengths), 'sequence')}, {count(sum(pages), 'page')}; {busy} of "
        f"{count(len(work), 'part')} busy, {count(max(pages), 'page')} at most, "
        f"{sum(pages) / max(1, busy):.1f} on average; {count(sum(splits_of_seq.values()), 'split')}; {cuts}"
    )


def chunks(lengths: list[int], level: int) -> str:
    """What the batch-invariant mode works on one by one, wherever a sequence is decoded."""
    from ..flash_mla import schedule
    from ..flash_mla.chunks import chunk_pages, num_chunks

    pages = [schedule.num_pages(length) for length in lengths]
    sizes = [chunk_pages(n, level) for n in pages]
    least, most = min(sizes), max(sizes)
    each = f"{least} to {most} pages" if least < most else count(most, "page")
    total = sum(num_chunks(n, level) for n in pages)
    return f"{count(total, 'chunk')} of {each}, by their sequence's length; all cuts lie between chunks"


def draw(work: list[list[Split]], lengths: list[int]) -> Figure:
    """A bar a part, its length the pages, its pieces coloured and named by sequence."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch
    from matplotlib.ticker import MaxNLocator

    colours = colormaps["tab20"].colors
    longest = max(1, *(num_pages(splits) for splits in work))
    end = 1 + max((part for part, splits in enumerate(work) if splits), default=0)  # of the parts with work
    idle = f", {count(len(work) - end, 'idle one')} behind these" if end < len(work) else ""
    rows = min(max(end, 8), len(work))
    figure = Figure(figsize=(13, 1.6 + 0.19 * max(rows, 8)), layout="constrained")
    axes = figure.subplots()
    for part, splits in enumerate(work[:end]):
        left = 0
        for split in splits:
            width = split.page_end - split.page_begin
            colour = colours[split.seq % len(colours)]
            axes.barh(part, width, 0.86, left, color=colour, edgecolor="white", linewidth=0.6)
            if width / longest > 0.012 * len(name(split)):  # what fits in the piece
                middle = left + width / 2
                axes.text(middle, part, name(split), fontsize=6.5, ha="center", va="center")
            left += width
    axes.set(xlim=(0, longest * 1.01), ylim=(rows - 0.4, -0.6))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set(xlabel="pages, in the order of a part's work", ylabel=f"part{idle}")
    axes.set_title(
        "which part works on which pages: sequence[first:end)\n" + summary(work, lengths), fontsize=9
    )
    if len(lengths) <= len(colours):
        handles = [Patch(color=colours[seq], label=f"{seq}: {n:,}") for seq, n in enumerate(lengths)]
        figure.legend(handles=handles, title="sequence: tokens", loc="outside right upper", fontsize=8)
    return figure
