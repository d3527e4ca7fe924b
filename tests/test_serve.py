"""`vllm serve configs/recall --attention-backend FLASHMLA`, asked through the `openai` client.

Without a GPU the server runs on the CPU; on a GPU host these tests are marked `gpu`, and it captures
CUDA graphs as it does by default.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest
import torch

from vllm_flashmla_backend.cli.demo import FREE_SHARE
from vllm_flashmla_backend.recall import ANSWER_TOKENS, is_right, make_prompt, make_prompts
from vllm_flashmla_backend.serving import Server, serve

pytestmark = pytest.mark.gpu if torch.cuda.is_available() else []

RECALL = Path(__file__).parents[1] / "configs" / "recall"
RUNNING = "vllm:num_requests_running"
ANSWER = {"model": "recall", "temperature": 0, "max_tokens": ANSWER_TOKENS}


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    # By default vLLM takes nearly all memory, and starts only where it is free.
    options = ["--kv-cache-memory-bytes", "1G", "--gpu-memory-utilization", str(FREE_SHARE)]
    if not torch.cuda.is_available():
        options += ["--enforce-eager"]  # compiling takes a CPU longer than these tests do
    with serve(RECALL, *options, name="recall") as server:
        yield server


@pytest.fixture(scope="module")
def client(server) -> openai.OpenAI:
    return openai.OpenAI(**server.client_options(), timeout=300)


def test_completions_of_a_batch_are_right(client):
    prompts = make_prompts(seed=1, count=8)
    choices = client.completions.create(prompt=[prompt.text for prompt in prompts], **ANSWER).choices
    assert all(is_right(prompt, choice.text) for prompt, choice in zip(prompts, choices, strict=True))


def test_chat_goes_on_over_several_turns(client):
    first = make_prompt(2, 2500)
    messages = [{"role": "user", "content": first.text}]
    for _ in range(2):  # the second turn asks the same again, behind the first answer
        answer = client.chat.completions.create(messages=messages, **ANSWER).choices[0].message.content
        assert is_right(first, answer)
        messages += [{"role": "assistant", "content": answer}]
        messages += [{"role": "user", "content": f"? {first.name}"}]


def test_stream_gives_the_same_text_in_pieces(client):
    prompt = make_prompt(3, 2200)
    # Long, as pieces that wait to be sent are sent as one.
    asked = ANSWER | {"prompt": prompt.text, "max_tokens": 200, "extra_body": {"ignore_eos": True}}
    whole = client.completions.create(**asked).choices[0].text
    chunks = [chunk.choices[0].text for chunk in client.completions.create(stream=True, **asked)]
    assert "".join(chunks) == whole
    assert len([chunk for chunk in chunks if chunk]) > 1
    assert " ".join(whole.split()).startswith(prompt.answer)


def test_logprobs_are_those_of_the_greedy_choice(client):
    prompt = make_prompt(4, 2100)
    logprobs = client.completions.create(prompt=prompt.text, logprobs=3, **ANSWER).choices[0].logprobs
    assert len(logprobs.token_logprobs) == ANSWER_TOKENS
    for chosen, best in zip(logprobs.token_logprobs, logprobs.top_logprobs, strict=True):
        assert len(best) >= 3
        assert chosen == max(best.values())
        assert sum(math.exp(value) for value in best.values()) <= 1 + 1e-3
        assert chosen > math.log(0.5)  # the model knows its answers


def test_sixteen_at_once_with_one_aborted_midway(client, server):
    prompts = make_prompts(seed=5, count=15)
    texts = asyncio.run(ask_together_and_abort_one(server, [prompt.text for prompt in prompts]))
    assert all(is_right(prompt, text) for prompt, text in zip(prompts, texts, strict=True))

    deadline = time.monotonic() + 30
    while server.metrics(RUNNING) != [0] and time.monotonic() < deadline:
        time.sleep(0.2)
    assert server.metrics(RUNNING) == [0], "the aborted request still runs"

    # The pages that it had are free again, and what others now keep in them is read right.
    after = make_prompts(seed=6, count=4)
    choices = client.completions.create(prompt=[prompt.text for prompt in after], **ANSWER).choices
    assert all(is_right(prompt, choice.text) for prompt, choice in zip(after, choices, strict=True))


async def ask_together_and_abort_one(server: Server, prompts: list[str]) -> list[str]:
    """Send all prompts and, among them, one long request that hangs up after its first tokens."""
    client = openai.AsyncOpenAI(**server.client_options(), timeout=300)

    async def ask(text: str) -> str:
        return (await client.completions.create(prompt=text, **ANSWER)).choices[0].text

    async def hang_up() -> None:
        endless = {"ignore_eos": True}
        wordy = ANSWER | {"max_tokens": 1000}
        prompt = make_prompt(7, 2500).text
        stream = await client.completions.create(prompt=prompt, stream=True, extra_body=endless, **wordy)
        for _ in range(5):
            await anext(stream)
        assert server.metrics(RUNNING) >= [1]
        await stream.close()

    *texts, _ = await asyncio.gather(*map(ask, prompts), hang_up())
    return texts
