"""The results files in `benchmarks/results`, older ones among them, can be shown and drawn."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from vllm_flashmla_backend.cli import main

ROOT = Path(__file__).parents[1]
RESULTS = [path for path in sorted(ROOT.glob("benchmarks/results/*.json")) if "-soak-" not in path.name]

SHOWN = {
    "random": ([], r"also +│ +200 ", 1),
    "serve": (["--serve"], r"at or ahead of the best peer in \d+ of \d\d rows", 1),
    "tails": (["--tails"], r"1 tail: decode is not slower up to a tail of \d+", 0),
}
"""By a word in the file's name: the option, what is said of it, how many pictures are drawn."""


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_committed_results_are_shown_and_drawn(path, tmp_path, capsys):
    kernels = ([], r"geometric mean over 24 cases: 1\.\d+", 2)
    options, said, pictures = next((SHOWN[kind] for kind in SHOWN if f"-{kind}" in path.stem), kernels)
    copied = tmp_path / path.name
    copied.write_bytes(path.read_bytes())
    assert main(["bench", *options, "--plot", str(copied)]) == 0
    assert re.search(said, capsys.readouterr().out)
    assert len(list(tmp_path.glob("*.png"))) == pictures


@pytest.mark.parametrize(
    "command",
    [
        ["bench", "--serve", "--out", "{}"],
        ["bench", "--tails", "--out", "{}"],
    ],
    ids=["serve", "tails"],
)
def test_out_that_cannot_be_written_to_is_named_before_anything_runs(command, tmp_path):
    (tmp_path / "file").touch()
    place = tmp_path / "file" / "below"
    with pytest.raises(SystemExit, match=f"--out: {place} cannot be written to: Not a directory"):
        main([word.format(place) for word in command])
