"""The results files in `benchmarks/results`, older ones among them, can be shown and drawn."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from vllm_flashmla_backend.cli import main

ROOT = Path(__file__).parents[1]
RESULTS = [path for path in sorted(ROOT.glob("benchmarks/results/*.json")) if "-soak-" not in path.name]

SHOWN = {
    "serve": (["--serve"], r"at or ahead of the best peer in \d+ of \d\d rows", 1),
    "tails": (["--tails"], r"1 tail: decode is not slower up to a tail of \d+", 0),
}
"""By the end of a file's name: the option, what is said of it, how many pictures are drawn."""


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_committed_results_are_shown_and_drawn(path, tmp_path, capsys):
    kernels = ([], r"geometric mean over 24 cases: 1\.\d+", 2)
    options, said, pictures = SHOWN.get(path.stem.rpartition("-")[2], kernels)
    copied = tmp_path / path.name
    copied.write_bytes(path.read_bytes())
    assert main(["bench", *options, "--plot", str(copied)]) == 0
    assert re.search(said, capsys.readouterr().out)
    assert len(list(tmp_path.glob("*.png"))) == pictures
