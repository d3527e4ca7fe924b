"""`vllm-flashmla demo` answers prompts through vLLM; its exit status says whether it was right."""

from __future__ import annotations

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from vllm_flashmla_backend.cli import demo, main
from vllm_flashmla_backend.cli.demo import RECALL

pytestmark = pytest.mark.gpu if torch.cuda.is_available() else []


def test_demo_answers_right_and_ends_with_its_table():
    command = [sys.executable, "-m", "vllm_flashmla_backend.cli", "demo", "--prompts", "8"]
    said = subprocess.run(command, env=os.environ | {"COLUMNS": "120"}, capture_output=True, text=True)
    assert said.returncode == 0, said.stdout[-4000:] + said.stderr[-4000:]
    assert "8 of 8 prompts (100.0%)" in said.stdout
    assert ", of 64 tokens each" in said.stdout
    for row in ("tokens per second", "pages used", "vLLM", "device", "FlashMLABackend", "kernels"):
        assert row in said.stdout


def test_demo_that_another_backend_would_serve_ends_before_it_asks(monkeypatch):
    others = type("FlashMLABackend", (), {"__module__": "vllm.flashmla"})  # vLLM's own has our class's name
    layer = SimpleNamespace(get_attn_backend=lambda: others)
    context = SimpleNamespace(static_forward_context={"layer": layer})
    config = SimpleNamespace(compilation_config=context)
    llm = SimpleNamespace(llm_engine=SimpleNamespace(vllm_config=config))
    monkeypatch.setattr(demo, "start_engine", lambda model: llm)
    with pytest.raises(
        SystemExit, match="vLLM serves the model with vllm.flashmla.FlashMLABackend, expected vllm_f"
    ):
        main(["demo", "--prompts", "1"])


def test_demo_with_kernels_that_there_are_not_says_which_there_are(monkeypatch):
    monkeypatch.setenv("VLLM_FLASHMLA_KERNELS", "fastest")
    monkeypatch.setenv("VLLM_LOGGING_LEVEL", "ERROR")
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # which start_engine sets
    with pytest.raises(SystemExit, match="^VLLM_FLASHMLA_KERNELS: got 'fastest', expected one of auto, nat"):
        main(["demo", "--prompts", "1"])


def test_demo_without_a_model_says_which_it_expects(tmp_path):
    with pytest.raises(SystemExit, match="no config.json; expected the repository.s configs/recall"):
        main(["demo", "--model", str(tmp_path)])


def test_demo_with_a_model_without_tokenizer_says_that_it_asks_the_recall_task():
    with pytest.raises(SystemExit, match="few-layers, which has no tokenizer; the demo asks the recall task"):
        main(["demo", "--model", str(RECALL.parent / "deepseek-v3-few-layers")])


@pytest.mark.parametrize(("prompts", "said"), [("0", "0"), ("100000", "100,000")])
def test_demo_answers_neither_no_prompt_nor_more_than_in_a_day(prompts, said):
    with pytest.raises(SystemExit, match=f"--prompts is {said}, expected 1 to 10,000"):
        main(["demo", "--prompts", prompts])


@pytest.mark.parametrize(
    "lengths, words", [([3460], "3,460"), ([7, 7], "7"), ([900, 1500, 800], "800 to 1,500")]
)
def test_prompt_lengths_are_a_range_only_where_they_differ(lengths, words):
    assert demo.span(lengths) == words
