"""Through vLLM and FLASHMLA the recall model answers as well as transformers has it answer."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from vllm_flashmla_backend import recall

pytest.importorskip("vllm")

from vllm_engines import MODEL, ON_GPU, count_right, engine  # noqa: E402

pytestmark = pytest.mark.gpu if ON_GPU else []

SEED = 48  # of no other prompts: neither the demo's nor those of training and its evaluation
PROMPTS = recall.make_prompts(SEED, 512 if ON_GPU else 48, 2000, 4000)
TRANSFORMERS = json.loads((Path(MODEL) / "results.json").read_text())["evaluation"]["accuracy"]


@pytest.fixture(scope="module")
def llm():
    as_by_default = dict(compilation_config=None) if ON_GPU else {}
    with engine("FLASHMLA", max_model_len=4096, **as_by_default) as llm:
        yield llm


def test_accuracy_on_fresh_prompts_is_that_of_transformers(llm):
    """Compiled and with CUDA graphs on a GPU, as vLLM does it by default."""
    assert llm.llm_engine.model_config.enforce_eager is not ON_GPU
    assert count_right(llm, PROMPTS) / len(PROMPTS) >= TRANSFORMERS - 0.005
