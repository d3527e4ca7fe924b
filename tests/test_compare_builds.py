"""tools/compare_builds.py: two builds of the kernels, timed in turns."""

from __future__ import annotations

import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from vllm_flashmla_backend.bench.cases import QUICK
from vllm_flashmla_backend.flash_mla import ops

TOOL = Path(__file__).parents[1] / "tools" / "compare_builds.py"


def run(*options: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, TOOL, *options], capture_output=True, text=True)


def test_a_build_that_is_not_there_is_named():
    done = run(str(TOOL), "nowhere.so")
    assert done.returncode == 1
    assert done.stderr.strip() == "builds: nowhere.so: there is no such file"


def test_a_line_names_what_is_slower_wrong_or_failed():
    tool = runpy.run_path(str(TOOL))
    builds = [tool["Build"](Path(name)) for name in ("a.so", "b.so", "c.so")]
    rows = [{"peer": "a.so", "us": 10.0, "right": True}, {"peer": "b.so", "us": 8.0, "right": False}]
    assert tool["line"](QUICK[0], builds, rows).split("  ")[-3:] == ["10.0", "8.0 (1.250) WRONG", "failed"]


def test_the_installed_build_is_back_after_another_was_used(tmp_path):
    tool, own = runpy.run_path(str(TOOL)), ops.LIBRARY
    with tool["library"](tmp_path / "other.so"):
        assert ops.load_error() == f"the GPU kernels were not built: there is no {tmp_path}/other.so"
    assert own == ops.LIBRARY


@pytest.mark.gpu
def test_a_build_against_itself_is_neither_faster_nor_wrong():
    done = run(str(ops.LIBRARY), str(ops.LIBRARY), "--rows", "quick", "--repeat", "5")
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 1 + len(QUICK)
    assert "WRONG" not in done.stdout and "failed" not in done.stdout
