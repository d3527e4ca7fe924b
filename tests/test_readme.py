"""What README.md shows runs as it stands there."""

from __future__ import annotations

import re
from pathlib import Path

import torch

README = (Path(__file__).parents[1] / "README.md").read_text()


def test_api_example_runs_and_prints_what_it_says(capsys):
    (example,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    names: dict = {}
    exec(example, names)
    assert names["out"].shape == (2, 1, 16, 512)
    assert names["lse"].shape == (2, 16, 1)
    assert torch.isfinite(names["out"]).all()
    shape, error = capsys.readouterr().out.splitlines()
    assert f"print(out.shape)  # {shape}\n" in example
    assert float(re.search(r"\d[\d.e-]*", error).group()) < 2e-3


def test_make_targets_are_those_of_the_makefile():
    makefile = (Path(__file__).parents[1] / "Makefile").read_text()
    shown = set(re.findall(r"`make ([a-z-]+)", README)) | set(
        re.findall(r"^    make ([a-z-]+)", README, re.M)
    )
    assert shown <= set(re.findall(r"^([a-z-]+):.* ## ", makefile, re.M))
