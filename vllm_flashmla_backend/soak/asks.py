"""What clients ask: recall prompts of all lengths, answers short and long, and clients that hang up."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from dataclasses import dataclass

from ..recall import ANSWER_TOKENS, FILLERS, QUESTION_TOKENS, STATEMENT_TOKENS, RecallPrompt, make_prompt

LONGEST_ANSWER = 512
WORDY_SHARE = 0.3
"""Share of the requests that ask for a long answer; of the others, the answer is as long as it must be."""

MOST_READ = 8
"""Pieces of an answer that a client reads at most before it hangs up; some read none."""


@dataclass(frozen=True)
class Ask:
    """One request.

    Attributes
    ----------
    text : the prompt, `num_tokens` long.
    recall : what is right to answer; None where nothing is.
    max_tokens : how long the answer may be.
    exact : whether it must be just so long; else it may end before.
    hang_up_after : pieces of the answer that the client reads before it closes; None if it reads all.
    """

    text: str
    num_tokens: int
    recall: RecallPrompt | None
    max_tokens: int
    exact: bool
    hang_up_after: int | None = None


def make_asks(seed: int, max_tokens: int, abort_share: float, scored: bool) -> Iterator[Ask]:
    """Requests without end, the same for the same arguments.

    Parameters
    ----------
    max_tokens : tokens of the longest prompt and its answer together. Lengths of prompts are spread evenly
        over the orders of magnitude from 1 on.
    abort_share : share of clients that hang up.
    scored : whether the model knows the recall task; if not, answers are held against their length alone.
    """
    rng = random.Random(seed)
    while True:
        aborted = rng.random() < abort_share
        wordy = aborted or rng.random() < WORDY_SHARE
        answer = _spread(rng, ANSWER_TOKENS, min(LONGEST_ANSWER, max_tokens // 2)) if wordy else ANSWER_TOKENS
        num_tokens = _spread(rng, 1, max_tokens - answer)
        recall, text = None, " ".join(rng.choices(FILLERS, k=num_tokens))
        if num_tokens >= STATEMENT_TOKENS + QUESTION_TOKENS:  # a shorter prompt can ask nothing
            recall = make_prompt(rng, num_tokens)
            text = recall.text
        yield Ask(
            text=text,
            num_tokens=num_tokens,
            recall=recall if scored else None,
            max_tokens=answer,
            exact=wordy or not scored,
            hang_up_after=rng.randint(0, MOST_READ) if aborted else None,
        )


def _spread(rng: random.Random, least: int, most: int) -> int:
    """A number from `least` to `most`, evenly spread over their logarithms."""
    return min(most, int(math.exp(rng.uniform(math.log(least), math.log(most + 1)))))


def arrivals(seed: int, seconds: float, rate: float, burst: int, burst_every: float) -> list[float]:
    """When each request is sent, in seconds from the start: a Poisson process, and bursts on top of it.

    Parameters
    ----------
    rate : requests a second, on average.
    burst, burst_every : so many more at once, every so many seconds.
    """
    rng = random.Random(seed)
    times, now = [], 0.0
    while (now := now + rng.expovariate(rate)) < seconds:
        times.append(now)
    bursts = math.ceil(seconds / burst_every) - 1
    times += [burst_every * (number + 1) for number in range(bursts) for _ in range(burst)]
    return sorted(times)
