"""Ending a process, ours among them, with all that it started."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def ended_by_signals() -> Iterator[None]:
    """Have SIGTERM and SIGHUP end this process by SystemExit, so that it stops what it started on its way.

    One that is ignored, as SIGHUP is under nohup, still is.
    """

    def end(number: int, frame: object) -> None:
        raise SystemExit(128 + number)

    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    for number, handler in before.items():
        if handler is not signal.SIG_IGN:
            signal.signal(number, end)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def task_ended_by_signals() -> Iterator[None]:
    """`ended_by_signals` for the task that runs within: it is cancelled first.

    In an event loop what a handler raises comes up in whichever callback is running, and says so at length.
    """
    loop, task = asyncio.get_running_loop(), asyncio.current_task()
    received: list[int] = []

    def end(number: int) -> None:
        received.append(number)
        task.cancel()

    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    heeded = {number: handler for number, handler in before.items() if handler is not signal.SIG_IGN}
    for number in heeded:
        loop.add_signal_handler(number, end, number)
    try:
        yield
    except asyncio.CancelledError:
        if not received:
            raise
        raise SystemExit(128 + received[0]) from None
    finally:
        for number, handler in heeded.items():
            loop.remove_signal_handler(number)
            signal.signal(number, handler)


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
