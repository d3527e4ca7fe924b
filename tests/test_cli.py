"""What all commands of `vllm-flashmla` have in common: how they end where they cannot go on."""

from __future__ import annotations

import pytest

from vllm_flashmla_backend.cli import bench_serve, main, plan
from vllm_flashmla_backend.cli.options import numbers


def fail_with(monkeypatch, error: BaseException) -> None:
    """Have `vllm-flashmla plan` raise `error`."""

    def run(args):
        raise error

    monkeypatch.setattr(plan, "run", run)


def test_interrupted_command_ends_in_a_word(monkeypatch, capsys):
    fail_with(monkeypatch, KeyboardInterrupt())
    assert main(["plan", "--lens", "1"]) == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_command_without_vllm_leads_to_doctor(monkeypatch):
    fail_with(monkeypatch, ModuleNotFoundError("No module named 'torch'", name="torch"))
    with pytest.raises(SystemExit, match="^No module named 'torch'; `vllm-flashmla doctor` says"):
        main(["plan", "--lens", "1"])


def test_another_missing_module_is_an_error_of_its_own(monkeypatch):
    fail_with(monkeypatch, ModuleNotFoundError("No module named 'matplotlib'", name="matplotlib"))
    with pytest.raises(ModuleNotFoundError):
        main(["plan", "--lens", "1"])


@pytest.mark.parametrize(
    "command, message",
    [
        (["soak", "--seconds", "x"], "argument --seconds: 'x', expected a number\n"),
        (["soak", "--burst", "1.5"], "argument --burst: '1.5', expected a whole number\n"),
        (["bench", "--row-seconds", "1s"], "argument --row-seconds: '1s', expected a number\n"),
        (["demo", "--prompts", ""], "argument --prompts: '', expected a whole number\n"),
    ],
)
def test_option_that_is_no_number_says_what_is_expected(command, message, capsys):
    with pytest.raises(SystemExit):
        main(command)
    assert capsys.readouterr().err.endswith(message)


def test_names_and_numbers_given_twice_are_measured_once():
    assert bench_serve.chosen_backends("ours,ours") == ["ours"]
    assert numbers("8,16,8") == (8, 16)


@pytest.mark.parametrize("config, why", [("{}", "lacks hidden_size"), ("{", "is no JSON")])
@pytest.mark.parametrize("kind", ["--serve", "--tails"])
def test_model_without_mla_is_refused(kind, config, why, tmp_path):
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(SystemExit, match=f"--model is {tmp_path}, whose config.json {why}"):
        main(["bench", kind, "--model", str(tmp_path)])
