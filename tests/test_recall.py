"""The recall task, and the model in `configs/recall` that is trained on it."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

from vllm_flashmla_backend import recall

MODEL = Path(__file__).parent.parent / "configs" / "recall"


@pytest.fixture(scope="module")
def tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(MODEL)


@pytest.fixture(scope="module")
def model():
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.bfloat16).eval()


@pytest.mark.parametrize("num_tokens", [6, 7, 8, 63, 64, 65, 2000, 3333, 4000, 8000])
def test_prompt_has_the_asked_number_of_tokens(num_tokens, tokenizer):
    prompt = recall.make_prompt(1, num_tokens)
    assert prompt.num_tokens == num_tokens
    assert len(tokenizer(prompt.text).input_ids) == num_tokens


@pytest.mark.parametrize("index", [2, 3, 62, 63, 64, 65, 66, 1000, 1996])
def test_answer_stands_where_asked(index):
    prompt = recall.make_prompt(1, 2000, answer_token_index=index)
    words = prompt.text.split()
    assert prompt.answer_token_index == index
    assert words[index] == prompt.colour
    assert words[prompt.statement_start : index + 2] == [*prompt.answer.split(), recall.STOP]


def test_prompt_states_each_name_once_and_asks_for_one():
    prompt = recall.make_prompt(1, 4000)
    *statements, ask, asked = prompt.text.split()
    stated = [word for word in statements if word in set(recall.NAMES)]
    assert (ask, asked) == (recall.ASK, prompt.name)
    assert len(stated) == len(set(stated)) == 1 + 4000 // recall.TOKENS_PER_STATEMENT
    assert prompt.name in stated


def test_answers_cover_the_whole_prompt():
    prompts = recall.make_prompts(seed=1, count=2000)
    tenths = [10 * prompt.answer_token_index // prompt.num_tokens for prompt in prompts]
    assert min(tenths.count(tenth) for tenth in range(10)) > 150
    assert min(prompt.num_tokens for prompt in prompts) < 2020
    assert max(prompt.num_tokens for prompt in prompts) > 3980


def test_equal_seeds_give_equal_prompts_and_others_do_not():
    assert recall.make_prompts(1, 4) == recall.make_prompts(1, 4)
    assert recall.make_prompts(1, 4) != recall.make_prompts(2, 4)


def test_only_the_whole_answer_is_right():
    prompt = recall.make_prompt(1, 100)
    other = next(colour for colour in recall.COLOURS if colour != prompt.colour)
    assert recall.is_right(prompt, f" {prompt.name} : {prompt.colour}")
    assert not recall.is_right(prompt, f"{prompt.name} : {other}")
    assert not recall.is_right(prompt, f"{prompt.name} : {prompt.colour} . {other}")
    assert not recall.is_right(prompt, prompt.colour)
    assert not recall.is_right(prompt, "")


@pytest.mark.parametrize(
    ("num_tokens", "index", "message"),
    [
        (5, None, "num_tokens is 5, expected at least 6"),
        (100, 1, "answer_token_index is 1, expected 2 to 96"),
        (100, 97, "answer_token_index is 97, expected 2 to 96"),
    ],
)
def test_bad_arguments_are_named(num_tokens, index, message):
    with pytest.raises(ValueError, match=message):
        recall.make_prompt(1, num_tokens, index)


def test_every_word_is_one_known_token(tokenizer):
    assert len(set(recall.VOCABULARY)) == len(recall.VOCABULARY)
    ids = tokenizer.convert_tokens_to_ids(recall.VOCABULARY)
    assert ids == list(range(len(recall.VOCABULARY)))
    assert tokenizer.convert_tokens_to_ids("unheard") == recall.VOCABULARY.index(recall.UNKNOWN)


def test_chat_and_completion_give_the_same_tokens(tokenizer):
    prompt = recall.make_prompt(1, 300)
    message = {"role": "user", "content": prompt.text}
    chat = tokenizer.apply_chat_template([message], add_generation_prompt=True, tokenize=False)
    assert tokenizer(chat).input_ids == tokenizer(prompt.text).input_ids


def test_chat_closes_the_answers_of_earlier_turns(tokenizer):
    messages = [
        {"role": "user", "content": "kano : red . ? kano"},
        {"role": "assistant", "content": "kano : red"},
        {"role": "user", "content": "? kano"},
    ]
    chat = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert " ".join(chat.split()) == "kano : red . ? kano kano : red </s> ? kano"


def test_model_is_small_and_has_the_shape_flashmla_serves():
    assert sum(f.stat().st_size for f in MODEL.glob("*.safetensors")) <= 16_000_000
    config = json.loads((MODEL / "config.json").read_text())
    assert config["architectures"] == ["DeepseekV3ForCausalLM"]
    assert config["kv_lora_rank"] + config["qk_rope_head_dim"] == 576
    assert config["num_attention_heads"] == 16
    assert config["num_hidden_layers"] == 2  # one to bind colour to name, one to look up


def test_reported_accuracy_is_of_enough_prompts_and_high_enough():
    report = json.loads((MODEL / "results.json").read_text())["evaluation"]
    assert report["prompts"] >= 400
    assert report["prompt_tokens"] == [2000, 4000]
    assert report["accuracy"] >= 0.99


@pytest.mark.parametrize("chat", [False, True], ids=["completion", "chat"])
def test_model_answers_right(chat, tokenizer, model):
    import torch

    prompts = recall.make_prompts(seed=7, count=4)
    right = 0
    for prompt in prompts:
        text = prompt.text
        if chat:
            text = tokenizer.apply_chat_template(
                [{"role": "user", "content": text}], add_generation_prompt=True, tokenize=False
            )
        ids = tokenizer(text, return_tensors="pt").input_ids
        with torch.no_grad():
            generated = model.generate(ids, do_sample=False, max_new_tokens=recall.ANSWER_TOKENS)
        completion = tokenizer.decode(generated[0, ids.shape[1] :], skip_special_tokens=True)
        right += recall.is_right(prompt, completion)
    assert right == len(prompts)


def test_training_script_runs(tmp_path):
    """Two steps on a CPU write a model that loads and a report; nothing is learnt."""
    import subprocess

    script = [sys.executable, str(MODEL / "train.py"), "--out", str(tmp_path), "--device", "cpu"]
    small = [
        "--steps=2",
        "--tokens=256",
        "--max-length=128",
        "--hidden-size=32",
        "--heads=2",
        "--evaluate=32",
    ]
    environment = os.environ | {"PYTHONPATH": str(MODEL.parent.parent), "OMP_NUM_THREADS": "1"}
    subprocess.run(script + small, check=True, env=environment, timeout=300)
    report = json.loads((tmp_path / "results.json").read_text())
    assert report["training"]["steps"] == 2
    assert report["evaluation"]["prompts"] == 32
    assert (tmp_path / "model.safetensors").stat().st_size > 0
