"""Ending a process, ours among them, with all that it started."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager


def _heeded() -> dict[int, signal.Handlers | Callable | None]:
    """SIGTERM and SIGHUP with their handlers, but for one that is ignored, as SIGHUP is under nohup."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    return {number: handler for number, handler in before.items() if handler is not signal.SIG_IGN}


@contextmanager
def ended_by_signals() -> Iterator[None]:
    """Have SIGTERM and SIGHUP end this process by SystemExit, so that it stops what it started on its way.

    Only the first one does: a second must not cut that short.
    """
    heeded = _heeded()

    def end(number: int, frame: object) -> None:
        for each in heeded:
            signal.signal(each, signal.SIG_IGN)
        raise SystemExit(128 + number)

    for number in heeded:
        signal.signal(number, end)
    try:
        yield
    finally:
        for number, handler in heeded.items():
            signal.signal(number, handler)


@contextmanager
def task_ended_by_signals() -> Iterator[None]:
    """The same for the task that runs within, which is cancelled first; inside of `ended_by_signals`.

    In an event loop what a handler raises comes up in whichever callback is running, and says so at length.
    """
    loop, task, heeded = asyncio.get_running_loop(), asyncio.current_task(), _heeded()
    received: list[int] = []

    def end(number: int) -> None:
        received.append(number)
        for each in heeded:
            loop.remove_signal_handler(each)
            signal.signal(each, signal.SIG_IGN)
        task.cancel()

    for number in heeded:
        loop.add_signal_handler(number, end, number)
    try:
        yield
    except asyncio.CancelledError:
        if not received:
            raise
    finally:
        if not received:
            for number, handler in heeded.items():
                loop.remove_signal_handler(number)
                signal.signal(number, handler)
    if received:  # also where the task took no notice
        raise SystemExit(128 + received[0])


def stop_group(process: subprocess.Popen, patience: float = 30) -> None:
    """End the group that `process` leads: politely, so that it can free what it holds, then for certain.

    Parameters
    ----------
    process : started with `start_new_session=True`; it may have ended already, its children not.
    patience : seconds that it is given to end by itself.
    """
    for end, seconds in ((signal.SIGTERM, patience), (signal.SIGKILL, 10)):
        try:
            os.killpg(process.pid, end)
            process.wait(seconds)
        except (ProcessLookupError, subprocess.TimeoutExpired):
            continue
