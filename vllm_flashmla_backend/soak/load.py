"""Sends the requests, each at its time whatever became of those before, and records what came back."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ..recall import is_right
from .asks import Ask

if TYPE_CHECKING:
    from openai import AsyncOpenAI

DRAIN_SECONDS = 120
"""How long after the last request was sent answers may still come; what has not ended then is lost."""

RECALL_WORDS = 3  # `name : colour`; what a wordy answer goes on with says nothing


@dataclass
class Outcome:
    """What came of one request; times in seconds of one clock.

    Attributes
    ----------
    ended : `completed`, `aborted` (as it was to be) or `failed`; None if it never ended.
    error : why it failed.
    right : whether the answer was; None where nothing is right.
    """

    ask: Ask
    sent: float
    first: float | None = None
    last: float | None = None
    tokens: int = 0
    ended: str | None = None
    error: str | None = None
    right: bool | None = None


def describe(error: Exception) -> str:
    """An error with what it came from, of which the client's `Connection error.` says nothing."""
    said = f"{type(error).__name__}: {error}"
    return f"{said} (from {describe(error.__cause__)})" if error.__cause__ else said


@dataclass
class Load:
    """A load as it runs.

    Attributes
    ----------
    outcomes : of all that were sent, in that order.
    """

    client: AsyncOpenAI
    model: str
    outcomes: list[Outcome] = field(default_factory=list)

    async def run(self, asks: list[Ask], times: list[float]) -> None:
        """Send each request at its time, in seconds from now, and wait until all have ended or are lost."""
        start = time.monotonic()
        tasks = []
        try:
            for at, ask in zip(times, asks, strict=True):
                await asyncio.sleep(max(0.0, start + at - time.monotonic()))
                tasks.append(asyncio.create_task(self._send(ask)))
            if tasks:
                await asyncio.wait(tasks, timeout=DRAIN_SECONDS)
        finally:  # while the client is still open: what it closes under a request would pass for a failure
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def count(self, holds: Callable[[Outcome], bool]) -> int:
        return sum(map(holds, self.outcomes))

    async def _send(self, ask: Ask) -> None:
        outcome = Outcome(ask, time.monotonic())
        self.outcomes.append(outcome)
        try:
            outcome.ended = await self._ask(ask, outcome)
        except Exception as error:  # of the client's many kinds each is one request that failed
            outcome.ended, outcome.error = "failed", describe(error)

    async def _ask(self, ask: Ask, outcome: Outcome) -> str:
        """Ask and read the answer; how it ended. Raises ValueError where the answer is not whole."""
        stream = await self.client.completions.create(
            model=self.model,
            prompt=ask.text,
            max_tokens=ask.max_tokens,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
            extra_body={"ignore_eos": ask.exact},
        )
        pieces, reason, usage = [], None, None
        async with stream:
            if ask.hang_up_after == 0:
                return "aborted"
            async for chunk in stream:
                usage = chunk.usage or usage
                if not chunk.choices:
                    continue
                outcome.last = time.monotonic()
                outcome.first = outcome.first or outcome.last
                pieces.append(chunk.choices[0].text)
                reason = chunk.choices[0].finish_reason or reason
                if len(pieces) == ask.hang_up_after:
                    return "aborted"
        check_whole(ask, reason, usage)
        outcome.tokens = usage.completion_tokens
        if ask.recall:
            answer = " ".join("".join(pieces).split()[:RECALL_WORDS])
            outcome.right = is_right(ask.recall, answer)
        return "completed"


def check_whole(ask: Ask, reason: str | None, usage) -> None:
    """ValueError where something of the prompt or of the answer is lacking."""
    if reason not in ("stop", "length") or usage is None:
        raise ValueError(f"the stream ended with finish_reason {reason} and usage {usage}")
    if usage.prompt_tokens != ask.num_tokens:
        raise ValueError(f"{usage.prompt_tokens} tokens of the prompt arrived, {ask.num_tokens} were sent")
    if ask.exact and usage.completion_tokens != ask.max_tokens:
        raise ValueError(f"{usage.completion_tokens} tokens came, {ask.max_tokens} were asked for")
