"""Watches the server while the load runs: its memory, how many requests wait, how many are put aside."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import median

import psutil

from ..serving import Server

RUNNING, WAITING = "vllm:num_requests_running", "vllm:num_requests_waiting"
PREEMPTIONS = "vllm:num_preemptions_total"

WARM_UP_SECONDS = 60.0
"""In which memory may grow: caches fill, kernels load, allocators find their size."""

LEAST_SAMPLES = 60  # after the warm-up; of fewer nothing is concluded

ALLOWED_BYTES, ALLOWED_SHARE = 64 << 20, 0.03
"""What memory may grow by after that, whichever is more."""


@dataclass(frozen=True)
class Sample:
    """The server at one moment; memory in bytes, None where it cannot be read."""

    at: float
    host: int | None
    gpu: int | None
    running: int
    waiting: int
    preemptions: int


@dataclass
class Watched:
    """What was seen of a server while the load ran.

    Attributes
    ----------
    missed : samples that could not be taken.
    left_running : requests that it still had when all clients had gone; None where it did not say.
    """

    samples: list[Sample] = field(default_factory=list)
    missed: int = 0
    left_running: int | None = None


def sample(server: Server, gpu_memory: Callable[[], int | None]) -> Sample:
    """Take a sample. `gpu_memory()` gives the bytes in use on the GPU, or None.

    Raises
    ------
    ConnectionError, psutil.Error : the server gives no metrics; its process is gone.
    """
    host = resident_bytes(server.pid) if server.pid else None
    running, waiting, preemptions = map(int, server.metrics(RUNNING, WAITING, PREEMPTIONS))
    return Sample(time.monotonic(), host, gpu_memory(), running, waiting, preemptions)


def resident_bytes(pid: int) -> int:
    """Resident memory of a process and all that it started, which may end meanwhile."""
    total = 0
    process = psutil.Process(pid)
    for each in (process, *process.children(recursive=True)):
        try:
            total += each.memory_info().rss
        except psutil.NoSuchProcess:
            continue
    return total


@dataclass(frozen=True)
class Growth:
    """Memory of one kind, in bytes: at the end of the warm-up, and at the end of the run."""

    begin: int
    end: int

    @property
    def flat(self) -> bool:
        return self.end - self.begin <= max(ALLOWED_BYTES, ALLOWED_SHARE * self.begin)


def growth(values: Sequence[tuple[float, int | None]]) -> Growth | None:
    """Of samples (seconds, bytes): medians of the first and of the last quarter of those after the warm-up.

    None where there are too few, or memory could not be read.
    """
    warm = [count for at, count in values if count is not None and at - values[0][0] >= WARM_UP_SECONDS]
    if len(warm) < LEAST_SAMPLES:
        return None
    quarter = len(warm) // 4
    return Growth(int(median(warm[:quarter])), int(median(warm[-quarter:])))
