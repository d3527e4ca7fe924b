"""`vllm serve configs/recall --attention-backend FLASHMLA`, asked through the `openai` client.

Without a GPU the server runs on the CPU; on a GPU host these tests are marked `gpu`, and it captures
CUDA graphs as it does by default.
"""

from __future__ import annotations

import asyncio
import math
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest
import torch

from vllm_flashmla_backend.recall import ANSWER_TOKENS, is_right, make_prompt, make_prompts

pytestmark = pytest.mark.gpu if torch.cuda.is_available() else []

RECALL = Path(__file__).parents[1] / "configs" / "recall"
START_SECONDS = 400
ANSWER = {"model": "recall", "temperature": 0, "max_tokens": ANSWER_TOKENS}


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[str]:
    """The URL of a server, which is gone with all its processes when the tests are."""
    url, log = f"http://127.0.0.1:{free_port()}", tmp_path_factory.mktemp("serve") / "log"
    command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(RECALL)]
    command += ["--attention-backend", "FLASHMLA", "--served-model-name", "recall"]
    command += ["--kv-cache-memory-bytes", "1G"]  # by default vLLM takes nearly all memory
    command += ["--host", "127.0.0.1", "--port", url.rpartition(":")[2]]
    if not torch.cuda.is_available():
        command += ["--enforce-eager"]  # compiling takes a CPU longer than these tests do
    with log.open("w") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        wait_until_healthy(url, process, log)
        yield url
    finally:
        stop_group(process)


def wait_until_healthy(url: str, process: subprocess.Popen, log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            pytest.fail(f"the server ended with status {process.returncode}:\n{log.read_text()[-4000:]}")
        try:
            urllib.request.urlopen(f"{url}/health", timeout=5)
            return
        except (urllib.error.URLError, OSError):
            time.sleep(1)
    pytest.fail(f"the server did not answer in {START_SECONDS} s:\n{log.read_text()[-4000:]}")


def stop_group(process: subprocess.Popen) -> None:
    """End the server's process group: politely, so that it can free what it holds, then for certain."""
    for end, patience in ((signal.SIGTERM, 30), (signal.SIGKILL, 10)):
        try:
            os.killpg(process.pid, end)
            process.wait(patience)
        except (ProcessLookupError, subprocess.TimeoutExpired):
            continue


@pytest.fixture(scope="module")
def client(server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server}/v1", api_key="none", timeout=300, max_retries=0)


def num_running(server: str) -> float:
    """Requests that the engine works on, by the server's own metrics."""
    metrics = urllib.request.urlopen(f"{server}/metrics", timeout=30).read().decode()
    return sum(
        float(line.rpartition(" ")[2])
        for line in metrics.splitlines()
        if line.startswith("vllm:num_requests_running")
    )


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
    whole = client.completions.create(prompt=prompt.text, **ANSWER).choices[0].text
    chunks = [
        chunk.choices[0].text
        for chunk in client.completions.create(prompt=prompt.text, stream=True, **ANSWER)
    ]
    assert "".join(chunks) == whole
    assert len([chunk for chunk in chunks if chunk]) > 1
    assert is_right(prompt, whole)


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
    while num_running(server) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert num_running(server) == 0, "the aborted request still runs"

    # The pages that it had are free again, and what others now keep in them is read right.
    after = make_prompts(seed=6, count=4)
    choices = client.completions.create(prompt=[prompt.text for prompt in after], **ANSWER).choices
    assert all(is_right(prompt, choice.text) for prompt, choice in zip(after, choices, strict=True))


async def ask_together_and_abort_one(server: str, prompts: list[str]) -> list[str]:
    """Send all prompts and, among them, one long request that hangs up after its first tokens."""
    client = openai.AsyncOpenAI(base_url=f"{server}/v1", api_key="none", timeout=300, max_retries=0)

    async def ask(text: str) -> str:
        return (await client.completions.create(prompt=text, **ANSWER)).choices[0].text

    async def hang_up() -> None:
        endless = {"ignore_eos": True}
        wordy = ANSWER | {"max_tokens": 1000}
        prompt = make_prompt(7, 2500).text
        stream = await client.completions.create(prompt=prompt, stream=True, extra_body=endless, **wordy)
        for _ in range(5):
            await anext(stream)
        assert num_running(server) >= 1
        await stream.close()

    *texts, _ = await asyncio.gather(*map(ask, prompts), hang_up())
    return texts
