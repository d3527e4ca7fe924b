"""Decode steps of whole vLLM: the same model under several attention backends, a process for each.

The model has DeepSeek-V3's attention and random weights. What runs in the processes is `serve_engine`.
"""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from ..logs import errors
from ..processes import stop_group
from .report import OURS, read

if TYPE_CHECKING:
    from .tails import TailsJob

MODEL = Path(__file__).parents[2] / "configs" / "deepseek-v3-few-layers"
PEERS = {"cuda": ("FLASHMLA", "FLASH_ATTN_MLA", "TRITON_MLA"), "cpu": ("CPU_MLA",)}
"""vLLM's own backends for MLA, by device type; ours goes by the name `ours`."""

HEADS, BATCHES, CONTEXTS = (16, 128), (1, 16, 64, 128), (1024, 8192, 32768)
WARM_STEPS = 4  # of each round
PAGE_TOKENS = 64  # one page is kept past a row's last token

CPU_CACHE_BYTES = 64 << 20
"""The KV cache on a CPU, where vLLM would take nearly all memory for it."""

TOKEN_BYTES = 576 * 2  # of a layer's KV cache

SILENCE_SECONDS = 180
"""An engine that reports nothing for so long, start included, has hung."""

SHAPE_KEYS = (
    "hidden_size",
    "intermediate_size",
    "q_lora_rank",
    "kv_lora_rank",
    "qk_nope_head_dim",
    "qk_rope_head_dim",
    "v_head_dim",
    "vocab_size",
)
SAME = ("gpu", "driver", "torch", "vllm", "commit", "model", "options")
"""What two runs must have in common for their rows to stand in one file."""


@dataclass(frozen=True)
class Job:
    """What one backend's process is to measure.

    Attributes
    ----------
    backend : `ours`, or the name of one of vLLM's own.
    model : directory with a config.json; no weights are read.
    layers : how many the model gets, all of them with a dense MLP.
    heads, batches, contexts : an engine for each number of heads, in it a row for each batch and context.
    rounds : how often a row's requests are added anew; the fastest round makes the row.
    steps : decode steps that are timed in a round.
    row_seconds : a row's steps, of all rounds together, end after so long, however many they were.
    """

    engine: ClassVar[str] = "serve_engine"  # what runs in the process

    backend: str
    model: str
    layers: int
    heads: tuple[int, ...]
    batches: tuple[int, ...]
    contexts: tuple[int, ...]
    rounds: int
    steps: int
    row_seconds: float

    @property
    def num_rows(self) -> int:
        return len(self.heads) * len(self.batches) * len(self.contexts)

    @property
    def num_tokens(self) -> int:
        """Tokens that each request of a row generates at most."""
        return WARM_STEPS + self.steps + PAGE_TOKENS

    @property
    def max_model_len(self) -> int:
        return max(self.contexts) + self.num_tokens

    @property
    def cache_tokens(self) -> int:
        """Tokens without room for which no engine starts; a row that needs more is left out."""
        return self.max_model_len


def cpu_cache_tokens(layers: int) -> int:
    """Tokens that the KV cache has room for on a CPU; one page is vLLM's own."""
    return max(0, CPU_CACHE_BYTES // (layers * TOKEN_BYTES * PAGE_TOKENS) - 1) * PAGE_TOKENS


def model_shape(model: Path, layers: int) -> dict:
    """The model as it stands in a results file."""
    config = json.loads((model / "config.json").read_text())
    return {"layers": layers} | {key: config[key] for key in SHAPE_KEYS}


def measure(job: Job | TailsJob, silence_seconds: float = SILENCE_SECONDS) -> Iterator[dict]:
    """Run the job's process; what it reports, as it comes.

    Yields
    ------
    What the process says: `{"engine": …}` when an engine has started, `{"rows": …}` for a row,
    `{"skipped": …}` for one that was left out, with the reason; and last
    `{"failure": …}` if the process did not get to its end, with the errors in its log, and the log's end.
    """
    plugins = "flashmla,flashmla_cpu" if job.backend == OURS else ""  # set, so that no others differ either
    environment = os.environ | {"VLLM_PLUGINS": plugins}
    command = [sys.executable, "-m", f"{__package__}.{job.engine}", json.dumps(asdict(job))]
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=log, text=True, env=environment, start_new_session=True
        )
        try:
            for line in _lines(process, silence_seconds):
                yield json.loads(line)
            reason = f"ended with status {process.returncode}" if process.wait() else None
        except TimeoutError as error:
            reason = str(error)
        finally:
            stop_group(process)
        if reason:
            log.seek(0)
            said = log.read()
            why = "\n".join([reason, *errors(said)])
            yield {"failure": {"backend": job.backend, "error": why, "log": said[-4000:]}}


def _lines(process: subprocess.Popen, silence_seconds: float) -> Iterator[str]:
    """The process's output by lines; TimeoutError when none comes for so long."""
    lines: queue.Queue[str | None] = queue.Queue()

    def read() -> None:
        for line in process.stdout:
            lines.put(line)
        lines.put(None)

    threading.Thread(target=read, daemon=True).start()
    while True:
        try:
            line = lines.get(timeout=silence_seconds)
        except queue.Empty:
            raise TimeoutError(f"reported nothing for {silence_seconds:g} s") from None
        if line is None:
            return
        yield line


def key(row: dict) -> tuple:
    """What a row, or one left out, is of."""
    return row["h"], row["b"], row["context"], row["backend"]


def name(row: dict) -> str:
    """A row, or one left out, in words."""
    return f"{row['backend']} h={row['h']} b={row['b']} context={row['context']}"


def add(results: dict, name: str, entry: dict) -> None:
    """Put a measured row (`rows`) or one left out (`skipped`) into the results, in place of an older one."""
    for each in ("rows", "skipped"):
        results[each] = [old for old in results[each] if key(old) != key(entry)]
    results[name].append(entry)
    results[name].sort(key=lambda row: key(row)[:3])


def other_failures(results: dict, jobs: list[Job]) -> list[dict]:
    """The failures in the results but those of which these jobs measure all again."""
    heads = {job.backend: job.heads for job in jobs}
    return [
        failure
        for failure in results.get("failures", ())
        if failure["backend"] not in heads
        or not set(failure.get("heads", ())) <= set(heads[failure["backend"]])
    ]


def mergeable(directory: Path, head: dict) -> Path | None:
    """The file in `directory` that this run's rows may join, the last by name: all of `SAME` is the same.

    Code that is not all committed has no name, so such runs, and those of an unknown commit, join none. None
    joins a file that does not say how its rows were timed.
    """
    if not head["commit"] or head["commit"].endswith("-dirty"):
        return None
    for path in sorted(directory.glob("*-serve*.json"), reverse=True):
        try:
            results = read(path, head="model")
        except ValueError:  # a run of which nothing came
            continue
        if all(results.get(name) == head[name] for name in SAME):
            return path
    return None
