"""`vllm-flashmla doctor` tells a machine where FLASHMLA runs from one where it does not, and says why."""

from __future__ import annotations

import os
import subprocess
import sys

from vllm_flashmla_backend.cli import checks


def doctor(**environment: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "vllm_flashmla_backend.cli", "doctor"]
    return subprocess.run(
        command, env=os.environ | {"COLUMNS": "200"} | environment, capture_output=True, text=True
    )


def test_all_is_well_where_these_tests_run():
    said = doctor()
    assert said.returncode == 0, said.stdout + said.stderr
    assert "FLASHMLA can run here." in said.stdout
    assert "wrong" not in said.stdout
    for found in ("vllm-flashmla-backend 0.1.0", "attention.backend.FlashMLABackend", "decoding right"):
        assert found in said.stdout


def test_broken_vllm_is_named_with_its_remedy(tmp_path):
    (tmp_path / "vllm.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')\n")
    said = doctor(PYTHONPATH=os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH")])))
    assert said.returncode == 1
    assert "FLASHMLA cannot run here." in said.stdout
    assert "pip uninstall torchvision torchaudio torchcodec" in said.stdout


def test_plugins_hidden_by_vllm_plugins_are_named(monkeypatch):
    monkeypatch.setenv("VLLM_PLUGINS", "flashmla,another")
    assert checks.plugins().remedy == "add flashmla_cpu to VLLM_PLUGINS"


def test_unregistered_entry_points_are_named(monkeypatch):
    monkeypatch.setattr(checks, "PLUGINS", {"vllm.general_plugins": "not_registered"})
    assert checks.plugins().found == "not_registered not registered"
    assert checks.plugins().remedy


def test_kernels_that_cannot_run_are_named(monkeypatch):
    monkeypatch.setenv("VLLM_FLASHMLA_KERNELS", "fastest")
    assert "VLLM_FLASHMLA_KERNELS: got 'fastest'" in checks.kernels().remedy


def test_wrong_kernels_are_found_out(monkeypatch):
    monkeypatch.setattr(checks, "decodes_a_page", lambda: False)
    assert "WRONG" in checks.kernels().found
    assert checks.kernels().remedy


def test_vllm_out_of_range_is_named(monkeypatch):
    monkeypatch.setattr(checks, "installed_version", lambda *names: "vllm 0.25.1")
    assert "0.26 to 0.33 are supported" in checks.vllm_release().remedy
