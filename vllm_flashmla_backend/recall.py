"""The recall task: prompts that are answered right only if attention finds one place in the prompt.

A prompt is a run of statements `name : colour .` among filler words, and ends with a question
`? name`. The answer repeats the name first, `name : colour`, so the colour is produced by a decode
step, which must look it up in the KV cache of the whole prompt. Every word is one token.

`configs/recall` holds a model trained on this task; the demo and the tests ask it.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

UNKNOWN, PADDING, END = "<unk>", "<pad>", "</s>"
"""Words that never occur in a prompt; the model ends its answer with `END`."""

ASK, IS, STOP = "?", ":", "."
"""A statement is `name : colour .`; a question is `? name`."""

STATEMENT_TOKENS = 4
QUESTION_TOKENS = 2
ANSWER_TOKENS = 4
"""Tokens to let the model generate: `name : colour </s>`."""

TOKENS_PER_STATEMENT = 16
"""A prompt holds one statement per so many tokens: 125 in 2,000 tokens, 250 in 4,000."""


def _words(text: str) -> list[str]:
    return text.split()


_FIRST_SYLLABLES = [c + v for c in "bdfgklmn" for v in "aiou"]
_SECOND_SYLLABLES = [c + v for c in "lmnprstv" for v in "aiou"]
NAMES = [first + second for first in _FIRST_SYLLABLES for second in _SECOND_SYLLABLES]

COLOURS = _words("""
amber apricot aqua auburn azure beige black blue bronze brown burgundy canary carmine cerise chalk
charcoal chestnut cobalt copper coral cream crimson cyan ebony emerald fawn fuchsia ginger gold green
grey hazel indigo ivory jade khaki lavender lemon lilac linen magenta maroon mauve mint mustard navy
ochre olive orange peach pearl pink plum purple red rust saffron salmon sand scarlet silver teal violet
white
""")

FILLERS = _words("""
a about above across after again all along also always among an and another any apart are around as at
away back because before behind below beside between beyond both but by came can day down each early
every far few field find for forest from garden gave gently good great had half has have here high hill
house in inside into island it just know lake large late leaf left light like little long low made many
meadow more morning most mountain much near never next night not now of often old on once one only open
or other our out over path quiet rain river road round seen several since slow small some soon still
stone sun than that the then there these they through time to tree under until upon valley very village
walk was water way were when where which while wind winter with without wood year yet you young
""")

VOCABULARY = [UNKNOWN, PADDING, END, ASK, IS, STOP, *FILLERS, *COLOURS, *NAMES]
"""All words; a word's token id is its index."""


@dataclass(frozen=True)
class RecallPrompt:
    """A prompt, its right answer, and where in the prompt the answer stands.

    Attributes
    ----------
    text : the prompt; also the content of a chat message that asks the same.
    name, colour : what is asked for and what is right.
    num_tokens : tokens in `text`, before anything is generated.
    statement_start : index of the first token of the statement `name : colour .` that answers.
    """

    text: str
    name: str
    colour: str
    num_tokens: int
    statement_start: int

    @property
    def answer(self) -> str:
        """The completion that is right."""
        return f"{self.name} {IS} {self.colour}"

    @property
    def answer_token_index(self) -> int:
        """Index of the token of `colour` in the prompt; its page is this `// 64`."""
        return self.statement_start + 2


def make_prompt(
    rng: random.Random | int, num_tokens: int, answer_token_index: int | None = None
) -> RecallPrompt:
    """Make one prompt of an exact number of tokens.

    Parameters
    ----------
    rng : a random generator, or a seed for one; equal seeds give equal prompts.
    num_tokens : tokens in the prompt, at least 6.
    answer_token_index : where the colour that answers stands, 2 to `num_tokens - 4`; drawn
        uniformly if None.

    Raises
    ------
    ValueError : an argument is out of range.
    """
    if isinstance(rng, int):
        rng = random.Random(rng)
    shortest = STATEMENT_TOKENS + QUESTION_TOKENS
    if num_tokens < shortest:
        raise ValueError(f"num_tokens is {num_tokens}, expected at least {shortest}")
    last = num_tokens - QUESTION_TOKENS - STATEMENT_TOKENS
    statement_start = rng.randint(0, last) if answer_token_index is None else answer_token_index - 2
    if not 0 <= statement_start <= last:
        raise ValueError(f"answer_token_index is {answer_token_index}, expected 2 to {last + 2}")

    num_statements = min(num_tokens // TOKENS_PER_STATEMENT, len(NAMES) - 1)
    name, *names = rng.sample(NAMES, num_statements + 1)
    colour = rng.choice(COLOURS)
    num_before = round(num_statements * statement_start / num_tokens)
    words = _region(rng, statement_start, names[:num_before])
    words += _statement(name, colour)
    words += _region(rng, last - statement_start, names[num_before:])
    words += [ASK, name]
    return RecallPrompt(" ".join(words), name, colour, num_tokens, statement_start)


def make_prompts(seed: int, count: int, min_tokens: int = 2000, max_tokens: int = 4000) -> list[RecallPrompt]:
    """Make `count` prompts whose lengths, and answers within them, are drawn uniformly."""
    rng = random.Random(seed)
    return [make_prompt(rng, rng.randint(min_tokens, max_tokens)) for _ in range(count)]


def is_right(prompt: RecallPrompt, completion: str) -> bool:
    """Whether a completion is the right name and colour, and nothing else."""
    return completion.split() == prompt.answer.split()


def _statement(name: str, colour: str) -> list[str]:
    return [name, IS, colour, STOP]


def _region(rng: random.Random, num_tokens: int, names: Sequence[str]) -> list[str]:
    """`num_tokens` words: a statement about each of the names (as many as fit), shuffled with fillers."""
    names = names[: num_tokens // STATEMENT_TOKENS]
    items = [_statement(name, rng.choice(COLOURS)) for name in names]
    items += [[rng.choice(FILLERS)] for _ in range(num_tokens - STATEMENT_TOKENS * len(names))]
    rng.shuffle(items)
    return [word for item in items for word in item]
