"""`vllm-flashmla doctor` tells a machine where FLASHMLA runs from one where it does not, and says why."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.metadata import version

import pytest
import torch

from vllm_flashmla_backend.cli import checks, main, report
from vllm_flashmla_backend.cli.doctor import show
from vllm_flashmla_backend.flash_mla import ops


def doctor(*options: str, **environment: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "vllm_flashmla_backend.cli", "doctor", *options]
    return subprocess.run(
        command, env=os.environ | {"COLUMNS": "200"} | environment, capture_output=True, text=True
    )


def test_version_is_that_of_the_package(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"vllm-flashmla-backend {version('vllm-flashmla-backend')}\n"


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


def test_piped_output_keeps_words_whole(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    name = "a.dotted.name" * 8
    show([checks.Check("FLASHMLA in vLLM", name), checks.Check("kernels", "none", f"take {name} instead")])
    said = capsys.readouterr().out
    assert f" {name} " in said
    assert f"kernels: take {name} instead\n" in said


def test_plugins_hidden_by_vllm_plugins_are_named(monkeypatch):
    monkeypatch.setenv("VLLM_PLUGINS", "flashmla,another")
    monkeypatch.setattr(checks, "device", lambda: torch.device("cpu"))
    assert checks.plugins().remedy == "add flashmla_cpu to VLLM_PLUGINS"


def test_plugin_for_a_cpu_is_not_asked_for_on_a_gpu(monkeypatch):
    monkeypatch.setenv("VLLM_PLUGINS", "flashmla")
    monkeypatch.setattr(checks, "device", lambda: torch.device("cuda"))
    assert checks.plugins().remedy is None


@pytest.mark.parametrize(
    "variable, value, device, remedy",
    [
        ("VLLM_MLA_DISABLE", "1", "cuda", "unset it: without MLA"),
        ("VLLM_BATCH_INVARIANT", "1", "cpu", "unset it: vLLM has no such mode on a CPU"),
        ("VLLM_BATCH_INVARIANT", "yes", "cpu", "VLLM_BATCH_INVARIANT must be 0, 1 or unset"),
        ("VLLM_BATCH_INVARIANT", "1", "cuda", None),
        ("VLLM_MLA_DISABLE", "0", "cpu", None),
    ],
)
def test_variables_under_which_flashmla_refuses_are_named(variable, value, device, remedy, monkeypatch):
    for name in ("VLLM_MLA_DISABLE", "VLLM_BATCH_INVARIANT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(variable, value)
    monkeypatch.setattr(checks, "device", lambda: torch.device(device))
    found = checks.switches().remedy
    assert found is None if remedy is None else remedy in found


def test_empty_choice_of_kernels_is_none(monkeypatch):
    monkeypatch.setenv("VLLM_FLASHMLA_KERNELS", "")
    assert checks.kernels().found.startswith("auto is ")
    assert checks.kernels().remedy is None


def test_unregistered_entry_points_are_named(monkeypatch):
    monkeypatch.setattr(checks, "PLUGINS", {"vllm.general_plugins": "not_registered"})
    assert checks.plugins().found == "not_registered not registered"
    assert checks.plugins().remedy


def test_kernels_that_cannot_run_are_named(monkeypatch):
    monkeypatch.setenv("VLLM_FLASHMLA_KERNELS", "fastest")
    assert "VLLM_FLASHMLA_KERNELS: got 'fastest'" in checks.kernels().remedy


@pytest.mark.parametrize("built, found", [(True, "not to be loaded: no GLIBC_2.38"), (False, "not built")])
def test_kernels_that_do_not_load_are_not_needed_on_a_cpu(built, found, monkeypatch):
    monkeypatch.setattr(checks, "device", lambda: torch.device("cpu"))
    monkeypatch.setattr(ops, "load_error", lambda: "no GLIBC_2.38")
    monkeypatch.setattr(ops, "kernels_built", lambda: built)
    assert checks.library() == checks.Check("GPU kernels", f"{found}, and not needed on a CPU")


def test_wrong_kernels_are_found_out(monkeypatch):
    monkeypatch.setattr(checks, "decodes_a_page", lambda: False)
    assert "WRONG" in checks.kernels().found
    assert checks.kernels().remedy


def test_vllm_out_of_range_is_named(monkeypatch):
    monkeypatch.setattr(checks, "installed_version", lambda *names: "vllm 0.25.1")
    assert "0.26 to 0.33 are supported" in checks.vllm_release().remedy


@pytest.mark.parametrize(
    "release, supported", [((3, 10, 9), False), ((3, 11, 0), True), ((3, 13, 9), True), ((3, 14, 0), False)]
)
def test_python_is_of_a_supported_release(release, supported, monkeypatch):
    monkeypatch.setattr(sys, "version_info", release)
    assert checks.python().remedy == (None if supported else "Python 3.11 to 3.13 is needed")


def test_report_is_one_block_with_versions_checks_entry_points_and_environment():
    said = doctor("--report", VLLM_FLASHMLA_KERNELS="reference")
    assert said.returncode == 0, said.stdout + said.stderr
    lines = said.stdout.strip().splitlines()
    assert lines[0] == "```text" and lines[-1] == "```"
    for found in (
        f"  torch: {torch.__version__}, CUDA",
        "  package: vllm-flashmla-backend 0.1.0",
        "  ok     kernels: reference is reference, decoding right",
        "  vllm.general_plugins: flashmla = vllm_flashmla_backend:register",
        "  VLLM_FLASHMLA_KERNELS=reference",
    ):
        assert any(line.startswith(found) for line in lines), found


def test_report_of_what_is_wrong_says_so_and_what_to_do():
    said = doctor("--report", VLLM_FLASHMLA_KERNELS="fastest")
    assert said.returncode == 1
    assert re.search("  wrong  kernels: fastest cannot run -> .*got 'fastest'", said.stdout)


def test_report_hides_secrets_and_homes():
    secrets = dict(
        HF_TOKEN="hf_abcdefghijklmnopqrst",
        VLLM_API_KEY="open-sesame",
        VLLM_HOST_IP="10.1.2.3",
        VLLM_MODEL="s3://user:pass@bucket/hf_ABCDEFGHIJKLMNOP42",
        VLLM_NOTE="open-sesame in /home/alice/models, /srv/bob/cache",
        HOME="/srv/bob",
    )
    text = report.write([checks.Check("library", "/root/x.so and hf_abcdefghijklmnopqrst", None)], secrets)
    for secret in ("hf_abc", "hf_ABC", "sesame", "10.1.2.3", "user:pass", "alice", "bob", "/root"):
        assert secret not in text, secret
    assert "VLLM_NOTE=(hidden) in ~/models, ~/cache" in text
    assert "VLLM_MODEL=s3://(hidden)@bucket/(hidden)" in text
    assert "HF_TOKEN" not in text  # only vLLM's variables are of interest


def test_ordinary_text_of_the_report_is_left_alone():
    ordinary = "flash_mla 0.1.0, lora_resolvers.hf_hub_resolver:register_hf_hub_resolver"
    assert report.mask(ordinary, {"SOME_KEY": "1"}) == ordinary
    system = "Linux-6.1-x86_64-with-glibc2.36"
    assert report.mask(system, {"HOSTTYPE": "x86_64"}) == system
