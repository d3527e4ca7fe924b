"""What all commands of `vllm-flashmla` have in common: how they end where they cannot go on."""

from __future__ import annotations

import pytest

from vllm_flashmla_backend.cli import main, plan


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
