"""`vllm-flashmla soak`: what it asks, what it counts, what it lets pass; and a short run on a real server."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
from functools import cache
from itertools import islice
from types import SimpleNamespace
from unittest.mock import AsyncMock, Mock

import openai
import pytest
import torch
from rich.console import Console

from vllm_flashmla_backend.cli import main
from vllm_flashmla_backend.cli import soak as cli_soak
from vllm_flashmla_backend.serving import Server
from vllm_flashmla_backend.soak import load, watch
from vllm_flashmla_backend.soak.asks import Ask, arrivals, make_asks
from vllm_flashmla_backend.soak.load import Load, Outcome, check_whole
from vllm_flashmla_backend.soak.report import faults, figures
from vllm_flashmla_backend.soak.watch import Growth, Sample, Watched, growth

ON_GPU = torch.cuda.is_available()
MIB = 1 << 20


@cache
def asks(count: int = 2000, **other) -> list[Ask]:
    return list(
        islice(make_asks(**dict(seed=0, max_tokens=8192, abort_share=0.1, scored=True) | other), count)
    )


def test_prompts_have_all_lengths_from_1_and_fit_with_their_answers():
    lengths = [ask.num_tokens for ask in asks()]
    assert min(lengths) == 1 and max(lengths) > 7000
    assert all(ask.num_tokens + ask.max_tokens <= 8192 for ask in asks())
    for ask in asks(200):
        assert len(ask.text.split()) == ask.num_tokens


def test_asks_are_the_same_for_the_same_seed():
    assert asks(50) == asks()[:50]
    assert asks(50) != asks(50, seed=1)


def test_share_of_aborts_and_of_long_answers():
    made = asks()
    aborted = [ask for ask in made if ask.hang_up_after is not None]
    assert 0.07 < len(aborted) / len(made) < 0.13
    assert {ask.hang_up_after for ask in aborted} == set(range(9))
    assert max(ask.max_tokens for ask in made) > 300
    assert 0.3 < sum(ask.exact for ask in made) / len(made) < 0.45


def test_without_scores_every_answer_has_its_exact_length():
    assert all(ask.exact and ask.recall is None for ask in asks(100, scored=False))


def test_arrivals_are_a_poisson_process_with_bursts_between():
    times = arrivals(0, seconds=300, rate=20, burst=0, burst_every=30)
    gaps = [after - before for before, after in zip(times, times[1:], strict=False)]
    assert abs(len(times) / 6000 - 1) < 0.05
    assert 0.12 < sum(gap > 0.1 for gap in gaps) / len(gaps) < 0.15  # e^-2
    with_bursts = arrivals(0, seconds=300, rate=20, burst=50, burst_every=30)
    assert [with_bursts.count(30.0 * number) for number in range(1, 11)] == [50] * 9 + [0]


def chunk(text: str | None, finish: str | None = None, usage=None) -> SimpleNamespace:
    choices = [] if text is None else [SimpleNamespace(text=text, finish_reason=finish)]
    return SimpleNamespace(choices=choices, usage=usage)


class Stream:
    """What the client gets for one request: pieces, an error, or nothing for ever."""

    def __init__(self, *pieces) -> None:
        self.pieces, self.closed = list(pieces), False

    async def __aenter__(self):
        return self

    async def __aexit__(self, *_):
        self.closed = True

    async def __aiter__(self):
        for piece in self.pieces:
            if piece is Ellipsis:
                await asyncio.sleep(60)
            if isinstance(piece, Exception):
                raise piece
            yield piece


def load_on(stream: Stream) -> Load:
    """A load on a client that answers with `stream`."""
    return Load(SimpleNamespace(completions=SimpleNamespace(create=AsyncMock(return_value=stream))), "recall")


def outcome_of(ask: Ask, stream: Stream) -> Outcome:
    """Send one request to a client that answers with `stream`."""
    made = load_on(stream)
    asyncio.run(made.run([ask], [0.0]))
    (outcome,) = made.outcomes
    return outcome


RECALL = next(ask for ask in asks() if ask.recall and not ask.exact)
RIGHT = RECALL.recall.answer


def whole(tokens: int = 4, prompt: int = RECALL.num_tokens) -> SimpleNamespace:
    return chunk(None, usage=SimpleNamespace(prompt_tokens=prompt, completion_tokens=tokens))


@pytest.mark.parametrize(
    "stream, ended, right, error",
    [
        (Stream(chunk(RIGHT, "stop"), whole()), "completed", True, None),
        (Stream(chunk("kano"), chunk(" : "), chunk("blue", "stop"), whole()), "completed", False, None),
        (Stream(chunk(RIGHT)), "failed", None, "finish_reason None"),
        (Stream(chunk(RIGHT, "stop"), whole(prompt=1)), "failed", None, "1 tokens of the prompt arrived"),
        (Stream(chunk("kano"), OSError("gone")), "failed", None, "OSError: gone"),
    ],
)
def test_outcome_of_a_request(stream, ended, right, error):
    outcome = outcome_of(RECALL, stream)
    assert (outcome.ended, outcome.right) == (ended, right)
    assert outcome.error is None if error is None else error in outcome.error
    assert stream.closed


@pytest.mark.parametrize("pieces", [0, 2])
def test_client_that_hangs_up_closes_its_stream(pieces):
    stream = Stream(chunk("kano"), chunk(" :"), chunk(" blue"), AssertionError("read on"))
    outcome = outcome_of(Ask("kano", 1, None, 100, True, hang_up_after=pieces), stream)
    assert outcome.ended == "aborted"
    assert stream.closed


ANSWER = b'data: {"choices": [{"index": 0, "text": "kano", "finish_reason": "length"}]}\n\n'
ANSWER += b'data: {"choices": [], "usage": {"prompt_tokens": 1, "completion_tokens": 1}}\n\ndata: [DONE]\n\n'
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nContent-Length: %d\r\n\r\n" % len(ANSWER)


async def answer_one_request(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Serve a connection as a server whose patience with an idle one ends as the next request comes."""
    with contextlib.suppress(asyncio.IncompleteReadError):
        head = await reader.readuntil(b"\r\n\r\n")
        await reader.readexactly(int(re.search(rb"(?i)content-length: (\d+)", head)[1]))
        writer.write(HEAD + ANSWER)
        await reader.readexactly(1)  # of the next request, or the client's end
    writer.close()


def test_connection_that_the_server_gives_up_fails_no_request():
    asks = [Ask("kano", 1, None, 1, exact=True)] * 2

    async def run() -> list[Outcome]:
        async with await asyncio.start_server(answer_one_request, "127.0.0.1", 0) as server:
            port = server.sockets[0].getsockname()[1]
            async with openai.AsyncOpenAI(**Server(f"http://127.0.0.1:{port}").client_options()) as client:
                made = Load(client, "recall")
                for ask in asks:
                    await made.run([ask], [0.0])
                return made.outcomes

    assert [(outcome.ended, outcome.error) for outcome in asyncio.run(run())] == [("completed", None)] * 2


def test_failure_says_what_it_came_from():
    error = ConnectionError("Connection error.")
    error.__cause__ = OSError("reset by peer")
    outcome = outcome_of(RECALL, Stream(error))
    assert outcome.error == "ConnectionError: Connection error. (from OSError: reset by peer)"


def test_interrupt_leaves_requests_that_run_lost_not_failed():
    stream = Stream(chunk("kano"), ...)
    made = load_on(stream)

    async def run() -> None:
        running = asyncio.create_task(made.run([RECALL], [0.0]))
        while not made.outcomes or made.outcomes[0].first is None:
            await asyncio.sleep(0.01)
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        assert stream.closed  # before the client is

    asyncio.run(run())
    assert [outcome.ended for outcome in made.outcomes] == [None]


def test_one_missed_answer_at_the_end_is_asked_for_again():
    server = Mock()
    server.metrics.side_effect = [ConnectionError("busy"), [1, 0], [0, 0]]
    assert asyncio.run(cli_soak.wait_until_quiet(server)) == 0


def test_request_without_end_is_lost(monkeypatch):
    monkeypatch.setattr(load, "DRAIN_SECONDS", 0.1)
    stream = Stream(chunk("kano"), ...)
    assert outcome_of(RECALL, stream).ended is None
    assert stream.closed


def test_answer_shorter_than_was_asked_for_is_a_failure():
    usage = SimpleNamespace(prompt_tokens=1, completion_tokens=99)
    with pytest.raises(ValueError, match="99 tokens came, 100 were asked for"):
        check_whole(Ask("kano", 1, None, 100, exact=True), "length", usage)


def run(
    completed: int = 1000,
    wrong: int = 0,
    failed: int = 0,
    lost: int = 0,
    left: int | None = 0,
    missed: int = 0,
    cut_off: bool = False,
    **memory,
) -> dict:
    outcomes = [
        Outcome(RECALL, 0.0, first=0.5, last=0.53, tokens=4, ended="completed", right=index >= wrong)
        for index in range(completed)
    ]
    outcomes += [Outcome(RECALL, 0.0, ended="failed", error="ValueError: half")] * failed
    outcomes += [Outcome(RECALL, 0.0)] * lost
    memory = dict(host=[1 << 30] * 200) | memory
    samples = [Sample(float(at), count, None, 9, 3, at) for at, count in enumerate(memory["host"])]
    return figures(outcomes, Watched(samples, missed, left), cut_off)


def test_figures_of_a_run():
    made = run(completed=1000, wrong=1, lost=2)
    assert (made["requests"], made["completed"], made["lost"]) == (1002, 1000, 2)
    assert (made["right"], made["answers"], made["tokens"]) == (999, 1000, 4000)
    assert made["first_token_ms"] == {"p50": 500.0, "p99": 500.0}
    assert made["per_token_ms"] == {"p50": 10.0, "p99": 10.0}
    assert (made["most_running"], made["most_waiting"], made["preemptions"]) == (9, 3, 199)


def test_equal_errors_are_counted():
    other = Outcome(RECALL, 0.0, ended="failed", error="OSError: gone")
    failed = [Outcome(RECALL, 0.0, ended="failed", error="ValueError: half") for _ in range(30)]
    assert figures([other, *failed], Watched())["errors"] == {"ValueError: half": 30, "OSError: gone": 1}


@pytest.mark.parametrize(
    "url", ["nonsense", "http://127.0.0.1:9", "http://127.0.0.1:9/a b", "ftp://127.0.0.1"]
)
def test_address_where_no_server_answers_is_named_before_the_load(url, monkeypatch):
    monkeypatch.setattr(cli_soak, "drive", None)
    with pytest.raises(SystemExit, match=f"--base-url is {url}, where /health does not answer: "):
        main(["soak", "--base-url", url, "--seconds", "1"])


@pytest.mark.parametrize(
    "what, fault",
    [
        (dict(), None),
        (dict(wrong=10), None),
        (dict(wrong=11), "989 of 1000 answers right"),
        (dict(failed=1), "1 request failed"),
        (dict(lost=1), "1 request lost"),
        (dict(left=1), "1 request left running"),
        (dict(left=None), "does not say whether requests are left"),
        (dict(missed=200), None),
        (dict(missed=201), "seen 200 times of 401"),
        (dict(left=None, cut_off=True), "cut off before its end"),
        (dict(completed=0), "no answer was scored"),
        (dict(host=[MIB * (1024 + at) for at in range(200)]), "host memory grew from 1,101 MiB to 1,206 MiB"),
    ],
)
def test_what_makes_a_run_fail(what, fault):
    found = list(faults(run(**what), scored=True))
    assert len(found) == (fault is not None)
    assert fault is None or fault in found[0]


def test_memory_may_grow_while_it_warms_up_and_only_then():
    stepped = [(float(at), (1024 if at < 59 else 2048) * MIB) for at in range(200)]
    assert growth(stepped) == Growth(2048 * MIB, 2048 * MIB)
    late = [(float(at), (1024 if at < 150 else 2048) * MIB) for at in range(200)]
    assert not growth(late).flat
    assert growth(stepped[:100]) is None  # too short to say
    assert growth([(float(at), None) for at in range(200)]) is None


def test_server_that_is_gone_gives_no_metrics():
    with pytest.raises(ConnectionError, match="the server gave no metrics"):
        watch.sample(Server("http://127.0.0.1:9", pid=None), lambda: None)


def test_sample_that_fails_is_counted_and_the_next_one_taken(monkeypatch):
    sample = Sample(0.0, None, None, 1, 1, 1)
    taken = [sample, ValueError("half an answer"), sample, sample]
    monkeypatch.setattr(watch, "sample", Mock(side_effect=taken))
    monkeypatch.setattr(cli_soak, "SAMPLE_SECONDS", 0.001)
    watched, console = Watched(), Console(quiet=True)

    async def run() -> None:
        load = Load(None, "")
        watching = asyncio.create_task(cli_soak.watch(Server("http://nowhere"), load, watched, console))
        while len(watched.samples) < 3 and not watching.done():
            await asyncio.sleep(0.01)
        watching.cancel()

    asyncio.run(run())
    assert len(watched.samples) == 3 and watched.missed >= 1


@pytest.mark.parametrize("end", [SystemExit(143), RuntimeError("a fault of its own")])
def test_run_that_is_cut_off_leaves_its_figures(end, tmp_path, monkeypatch):
    async def drive(args, server, outcomes, *_) -> None:
        outcomes.append(Outcome(RECALL, 0.0))
        raise end

    monkeypatch.setattr(cli_soak, "drive", drive)
    monkeypatch.setattr(cli_soak, "check_health", lambda server: None)
    with pytest.raises(type(end), match=str(end)):
        main(["soak", "--base-url", "http://nowhere", "--name", "kimi", "--out", str(tmp_path / "soak.json")])
    made = json.loads((tmp_path / "soak.json").read_text())
    assert (made["cut_off"], made["requests"], made["lost"]) == (True, 1, 1)
    assert made["model"] == "kimi" and "torch" not in made  # the server's, which is not known


@pytest.mark.parametrize(
    "options, message",
    [
        (["--seconds", "0"], "--seconds is 0"),
        (["--rate", "0"], "--rate is 0, expected 0.01 to 10,000"),
        (["--seconds", "inf"], "--seconds is inf"),
        (["--base-url", "http://host", "--", "--port"], "--port: for a server that is started here"),
        (["--max-tokens", "8"], "--max-tokens is 8"),
        (["--abort-share", "1.5"], "--abort-share is 1.5"),
        (["--model", "/nowhere"], "--model is /nowhere"),
        (["--out", "/tmp"], "--out is /tmp, a directory; expected the name of a file in it"),
        (["--out", "/proc/s.json"], "--out: /proc cannot be written to: "),
        (
            ["--out", "/nowhere/s.json"],
            "--out is /nowhere/s.json, expected a file in a directory that exists",
        ),
    ],
)
def test_wrong_options_are_named(options, message):
    with pytest.raises(SystemExit, match=re.escape(message)):
        main(["soak", *options])


@pytest.mark.slow
@(pytest.mark.gpu if ON_GPU else lambda test: test)
def test_server_under_load_for_twenty_seconds(tmp_path, monkeypatch, capsys):
    """More at once than it runs, clients that hang up, all lengths; and every answer right."""
    monkeypatch.setattr(cli_soak, "SAMPLE_SECONDS", 0.1)  # so that a burst that is over in a second is seen
    out = tmp_path / "soak.json"
    options = ["--seconds", "20", "--rate", "1.5", "--burst", "24", "--burst-every", "8"]
    options += ["--max-tokens", "1500", "--abort-share", "0.2", "--out", str(out)]
    assert main(["soak", *options, "--", "--kv-cache-memory-bytes", "32M", "--max-num-seqs", "8"]) == 0
    made = json.loads(out.read_text())
    assert made["requests"] == made["completed"] + made["aborted"] > 48
    assert made["aborted"] > 0
    assert made["right"] >= 0.99 * made["answers"] > 0
    assert made["most_waiting"] > 0
    assert "right answers" in capsys.readouterr().out
