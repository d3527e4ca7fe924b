"""What is measured: the 24 rows that targets are set for, by regime, a few more, and random ones."""

from __future__ import annotations

import random
import re
from dataclasses import asdict, dataclass

LENGTHS = ("fixed", "normal", "one long")
LONG = 50  # how many times longer than the others the first sequence of "one long" is
SEED = 0

WORD = re.compile(
    r"b=(?P<b>[0-9]+)|s_q=(?P<s_q>[0-9]+)|s_k=(?P<s_k>[0-9]+)|h=(?P<h_q>[0-9]+)"
    rf"|(?P<lengths>{'|'.join(LENGTHS)})|(?P<dtype>bfloat16|float16)"
)
MOST_SEQUENCES, MOST_TOKENS = 65_536, 2**31 - 1  # tokens of all of them, whose numbers are int32


@dataclass(frozen=True)
class Case:
    """The shape of one call: bf16 or fp16, one KV head, causal, pages of 64 tokens."""

    b: int  # sequences
    s_q: int  # query tokens of each
    s_k: int  # tokens in the cache of each; the mean where lengths are drawn
    h_q: int  # query heads
    lengths: str = "fixed"  # one of LENGTHS
    dtype: str = "bfloat16"

    def __str__(self) -> str:
        words = [f"b={self.b}", f"s_q={self.s_q}", f"s_k={self.s_k}", f"h={self.h_q}"]
        return " ".join(
            words + [self.lengths] * (self.lengths != "fixed") + [self.dtype] * (self.dtype != "bfloat16")
        )

    @classmethod
    def parse(cls, text: str) -> Case:
        """The case that `str` gives these words to, in whatever order; one query token may go unsaid.

        Raises
        ------
        ValueError
            The text is no such case, or no call has its shape.
        """
        from ..flash_mla.checks import MAX_HEADS  # here, for it loads torch, which --help does without

        said = {"s_q": "1"} | _fields(text)
        case = cls(**{name: int(word) if word.isdecimal() else word for name, word in said.items()})
        for name, value, least, most in (
            ("b", case.b, 1, MOST_SEQUENCES),
            ("h", case.h_q, 1, MAX_HEADS),
            ("s_k", case.s_k, 1, MOST_TOKENS),
        ):
            if not least <= value <= most:
                raise ValueError(f"{name}={value} in {text!r}, expected {least} to {most:,}")
        if not 1 <= case.s_q <= case.s_k:
            raise ValueError(f"s_q={case.s_q} in {text!r}, expected 1 to {case.s_k:,}, its s_k")
        if case.lengths == "one long" and case.b == 1:
            raise ValueError(f"b=1 in {text!r}, expected another sequence, than which one is longer")
        if (tokens := sum(case.cache_seqlens())) > MOST_TOKENS:
            raise ValueError(f"{tokens:,} tokens in {text!r}, expected up to {MOST_TOKENS:,} in all")
        return case

    def keys(self) -> dict:
        """The case as it stands in a row of a results file."""
        return asdict(self) | {"varlen": self.lengths != "fixed"}

    def cache_seqlens(self) -> list[int]:
        """Tokens of each sequence: the same for every peer, every run and every machine."""
        if self.lengths == "fixed":
            return [self.s_k] * self.b
        if self.lengths == "one long":
            return [self.s_k * LONG] + [self.s_k] * (self.b - 1)
        draw = random.Random(SEED)
        return [max(self.s_q, int(draw.gauss(self.s_k, self.s_k / 2))) for _ in range(self.b)]

    def flops(self) -> int:
        """Multiplications and additions of both products; what causality hides is not taken off."""
        return 2 * self.h_q * self.s_q * sum(self.cache_seqlens()) * (576 + 512)

    def bytes_moved(self) -> int:
        """The cache read once, queries read, results written, two bytes a number."""
        return sum(self.cache_seqlens()) * 576 * 2 + self.b * self.s_q * self.h_q * (576 + 512) * 2


def _fields(text: str) -> dict[str, str]:
    """A case's words by the fields that they are of."""
    said: dict[str, str] = {}
    wrong = []
    for word in re.findall(r"one long\b|\S+", " ".join(text.split())):
        found = WORD.fullmatch(word)
        if found is None:
            wrong.append(repr(word))
        elif found.lastgroup in said:
            wrong.append(f"{word!r}, the second of its kind,")
        else:
            said[found.lastgroup] = found[found.lastgroup]
    wrong += [
        f"no {word}=" for word, field in {"b": "b", "s_k": "s_k", "h": "h_q"}.items() if field not in said
    ]
    if wrong:
        raise ValueError(
            f"{wrong[0]} in {text!r}, expected a case as in 'b=32 s_k=4096 h=16' or 'b=4 s_q=2 "
            f"s_k=900 h=128 normal float16'; lengths are {', '.join(LENGTHS)}"
        )
    return said


@dataclass(frozen=True)
class Regime:
    """What bounds a group of cases, and the speed asked of it as best peer's time ÷ ours."""

    must: float
    goal: float
    cases: tuple[Case, ...]
    goal_tflops: float | None = None
    goal_gbps: float | None = None


def _pairs(*shapes: tuple[int, int]) -> tuple[Case, ...]:
    """Each (b, s_k) with one query token, fixed lengths, 16 and 128 heads."""
    return tuple(Case(b, 1, s_k, h_q) for b, s_k in shapes for h_q in (16, 128))


REGIMES = {
    "compute bound": Regime(
        must=1.00,
        goal=1.08,
        goal_tflops=660,
        cases=tuple(Case(128, s_q, s_k, 128, "normal") for s_q in (1, 2) for s_k in (16384, 32768)),
    ),
    "memory bound": Regime(
        must=1.05,
        goal=1.20,
        goal_gbps=4200,
        cases=tuple(Case(128, 1, 16384, h_q, "normal") for h_q in (16, 32, 64)),
    ),
    "middle": Regime(
        must=1.05,
        goal=1.20,
        cases=tuple(Case(128, 1, 4096, h_q, "normal") for h_q in (16, 32, 64, 128))
        + (Case(128, 2, 4096, 128, "normal"),),
    ),
    "latency": Regime(must=1.25, goal=1.50, cases=_pairs((1, 8192), (4, 8192), (32, 1024), (64, 512))),
    "few long": Regime(must=1.05, goal=1.20, cases=_pairs((16, 8192), (1, 131072))),
    "also": Regime(
        must=1.00,
        goal=1.00,
        cases=(
            *(Case(128, s_q, 4096, h_q) for s_q in (3, 4) for h_q in (16, 128)),
            *(Case(128, 1, 4096, h_q) for h_q in (8, 20, 40)),
            *(Case(128, 1, 4096, h_q, dtype="float16") for h_q in (16, 128)),
            *_pairs((256, 1024), (8, 131072)),
            *(Case(32, 1, 1024, h_q, "one long") for h_q in (16, 128)),
        ),
    ),
}
"""Five regimes, together the 24 rows that the geometric mean is over, and `also`, which is not in it."""

ALSO = "also"
GEOMEAN_MUST, GEOMEAN_GOAL = 1.15, 1.30
GOAL_US = {Case(1, 1, 8192, 16): 12.0}
"""Goals in microseconds, where a case has one of its own."""

TABLE = tuple(case for name, regime in REGIMES.items() if name != ALSO for case in regime.cases)


def _drawn(number: int) -> tuple[Case, ...]:
    """Shapes that nobody chose: batch and context over all magnitudes, of up to half a million tokens."""
    draw, drawn = random.Random(SEED), set()
    while len(drawn) < number:
        b, s_k = round(2 ** draw.uniform(0, 8)), round(2 ** draw.uniform(7, 16))
        if b * s_k <= 2**19:
            s_q, h_q = draw.choice((1, 1, 1, 2, 3, 4)), draw.choice((8, 16, 20, 32, 40, 64, 96, 128))
            drawn.add(Case(b, s_q, s_k, h_q, draw.choice(("fixed", "normal"))))
    return tuple(sorted(drawn, key=lambda case: (case.b * case.s_k, case.b)))


QUICK = (Case(1, 1, 8192, 16), Case(32, 1, 1024, 128), Case(128, 1, 4096, 128, "normal"))
ROWS = {
    "24": TABLE,
    "extra": REGIMES[ALSO].cases,
    "all": TABLE + REGIMES[ALSO].cases,
    "quick": QUICK,
    "random": _drawn(200),
}
"""What `--rows` chooses from."""


def regime_of(case: Case) -> str:
    """Name of the regime that `case` belongs to; `also` for any case that is in none."""
    return next((name for name, regime in REGIMES.items() if case in regime.cases), ALSO)
