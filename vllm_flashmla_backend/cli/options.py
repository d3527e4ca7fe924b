"""Options out of range: told at once, in a line that names the option, what came, and what is expected."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from .environment import device

if TYPE_CHECKING:
    from ..bench.serve import Job
    from ..bench.tails import TailsJob


def require(*options: tuple[str, float, float] | tuple[str, float, float, float]) -> None:
    """SystemExit where an option's value is below its least, or above its most if it has one:
    (name, value, least, most)."""
    for name, value, least, *most in options:
        if not least <= value <= (most[0] if most else sys.float_info.max):  # nor is NaN
            wanted = f"{_words(least)} to {_words(most[0])}" if most else f"at least {_words(least)}"
            raise SystemExit(f"{name} is {_words(value)}, expected {wanted}")


def _words(number: float) -> str:
    return f"{number:,}" if isinstance(number, int) else f"{number:g}"


def require_heads(*numbers: int) -> None:
    """SystemExit where `--heads` has a number that no call may have."""
    from ..flash_mla.checks import check_heads

    try:
        for heads in numbers:
            check_heads("--heads", heads)
    except ValueError as error:
        raise SystemExit(str(error)) from error


def require_model(path: Path, keys: Sequence[str] = ()) -> None:
    """SystemExit where `--model` is no directory of a model, or lacks keys of its configuration."""
    if not (path / "config.json").is_file():
        raise SystemExit(f"--model is {path}, which has no config.json")
    try:
        config = json.loads((path / "config.json").read_text())
    except ValueError as error:
        raise SystemExit(f"--model is {path}, whose config.json is no JSON: {error}") from error
    if not isinstance(config, dict):
        raise SystemExit(f"--model is {path}, whose config.json holds no object")
    if lacking := [key for key in keys if key not in config]:
        raise SystemExit(
            f"--model is {path}, whose config.json lacks {', '.join(lacking)}; expected a model with MLA"
        )


def require_out(directory: Path) -> None:
    """SystemExit where `--out` names a place that cannot be written to; makes the directory."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=directory).close()
    except OSError as error:
        raise SystemExit(f"--out: {directory} cannot be written to: {error.strerror}") from error


def require_cpu_cache(job: Job | TailsJob, options: str, instead: str) -> None:
    """SystemExit where `options` want a larger KV cache than a CPU has: vLLM says so after half a minute."""
    from ..bench.serve import cpu_cache_tokens

    room = cpu_cache_tokens(job.layers)
    if device().type == "cpu" and job.cache_tokens > room:
        raise SystemExit(
            f"{options}, --layers {job.layers}: needs a KV cache of {job.cache_tokens:,} tokens, expected at "
            f"most {room:,}, which it has on a CPU. This takes one a minute or two:\n"
            f"    vllm-flashmla bench {instead}"
        )


def names(text: str) -> list[str]:
    """`fa3,flashmla` as names, each once."""
    return list(dict.fromkeys(name for name in text.split(",") if name))


def numbers(text: str) -> tuple[int, ...]:
    """`16,128` as numbers, each once."""
    words = text.split(",")
    if not all(word.isdecimal() and int(word) for word in words):
        raise argparse.ArgumentTypeError(f"{text!r}, expected numbers from 1 with commas between them")
    return tuple(dict.fromkeys(int(word) for word in words))
