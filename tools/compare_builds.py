"""Times builds of the kernels against each other: same tensors, one process, in turns.

    python tools/compare_builds.py OLD/_kernels.so NEW/_kernels.so [--rows 24] [--heads 16,32] [--repeat 11]

A build is a copy of `vllm_flashmla_backend/flash_mla/_kernels.so`, made by `make env` of this tree or of
another checkout whose functions take the same arguments: before 12e267b partial results have one number a
row beside them, not two, and such builds refuse these. Times of two runs differ by more than most changes do;
compare within one only.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from vllm_flashmla_backend.bench.cases import ROWS, Case
from vllm_flashmla_backend.bench.clock import GpuMonitor
from vllm_flashmla_backend.bench.inputs import Inputs
from vllm_flashmla_backend.bench.measure import Timer, measure_case
from vllm_flashmla_backend.bench.peers import Ours, Step
from vllm_flashmla_backend.cli.bench import why_not_here
from vllm_flashmla_backend.cli.options import numbers, require
from vllm_flashmla_backend.flash_mla import ops


@contextmanager
def library(path: Path) -> Iterator[None]:
    """Have calls within go to the build at `path`."""
    own, ops.LIBRARY = ops.LIBRARY, path
    ops._library.cache_clear()
    try:
        yield
    finally:
        ops.LIBRARY = own
        ops._library.cache_clear()


class Build(Ours):
    """One build; plan and call are both its own."""

    def __init__(self, path: Path) -> None:
        self.path, self.name = path, str(path)

    def prepare(self, inputs: Inputs) -> dict[str, Step]:
        with library(self.path):
            decode = super().prepare(inputs)[""]

        def step() -> torch.Tensor:  # called once and then captured, so what is timed switches nothing
            with library(self.path):
                return decode()

        return {"": step}


def line(case: Case, builds: list[Build], rows: list[dict]) -> str:
    """Each build's microseconds, and the first one's over them."""
    of_build = {row["peer"]: row for row in rows}
    first = of_build.get(builds[0].name)
    words = []
    for build in builds:
        row = of_build.get(build.name)
        if row is None:
            words.append("failed")
            continue
        ratio = f" ({first['us'] / row['us']:.3f})" if first and build is not builds[0] else ""
        words.append(f"{row['us']:.1f}{ratio}" + " WRONG" * (not row["right"]))
    return f"{str(case):34} " + "  ".join(words)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "builds",
        nargs="+",
        type=Path,
        metavar="FILE.so",
        help="the builds; the first is what others are compared with",
    )
    parser.add_argument("--rows", choices=ROWS, default="24", help="which cases (default: 24)")
    parser.add_argument("--heads", type=numbers, metavar="N,N,…", help="only cases of so many heads")
    parser.add_argument("--repeat", type=int, default=11, metavar="N", help="times of each (default: 11)")
    args = parser.parse_args()
    require(("--repeat", args.repeat, 1))
    if missing := [str(path) for path in args.builds if not path.is_file()]:
        raise SystemExit(f"builds: {', '.join(missing)}: there is no such file")
    if reason := why_not_here():
        raise SystemExit(f"builds are compared on a Hopper GPU: {reason}")
    device = torch.device("cuda", torch.cuda.current_device())
    builds = [Build(path.resolve()) for path in args.builds]
    timer = Timer(device, GpuMonitor(device), args.repeat)
    print("µs of", ", ".join(build.name for build in builds), "(in brackets: the first one's ÷ its own)")
    for case in ROWS[args.rows]:
        if args.heads and case.h_q not in args.heads:
            continue
        rows, failures = measure_case(case, builds, timer, device)
        print(line(case, builds, rows), flush=True)
        for failure in failures:
            print(f"  {failure['peer']}: {failure['error']}", flush=True)


if __name__ == "__main__":
    main()
