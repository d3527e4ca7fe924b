"""A command that is told to end stops what it started in sessions of its own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

from vllm_flashmla_backend.processes import ended_by_signals

PROGRAM = """
import signal, subprocess, sys, time
from vllm_flashmla_backend.processes import ended_by_signals, stop_group
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # which is ignored where the tests run under nohup
with ended_by_signals():
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], start_new_session=True)
    try:
        print(child.pid, flush=True)
        time.sleep(60)
    finally:
        stop_group(child)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_process_that_gets_a_signal_stops_what_it_started(number):
    process = subprocess.Popen([sys.executable, "-c", PROGRAM], stdout=subprocess.PIPE, text=True)
    child = int(process.stdout.readline())
    process.send_signal(number)
    assert process.wait(30) == 128 + number
    with pytest.raises(ProcessLookupError):
        for _ in range(100):
            os.kill(child, 0)
            time.sleep(0.1)


TASK = """
import asyncio, os, signal
from vllm_flashmla_backend.processes import ended_by_signals, task_ended_by_signals
signal.signal(signal.SIGHUP, signal.SIG_DFL)
async def main():
    with task_ended_by_signals():
        others = [asyncio.create_task(asyncio.sleep(60)) for _ in range(3)]
        print("runs", flush=True)
        try:
            await asyncio.gather(*others)
        except asyncio.CancelledError:  # which does not keep the process from ending
            os.kill(os.getpid(), signal.SIGTERM)  # nor does a second signal cut this short
            await asyncio.sleep(0.1)
            print("cleaned up", flush=True)
with ended_by_signals():
    asyncio.run(main())
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_task_that_gets_a_signal_ends_cleanly_and_without_a_word(number):
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen([sys.executable, "-c", TASK], **pipes)
    assert process.stdout.readline() == "runs\n"
    process.send_signal(number)
    assert process.communicate(timeout=30) == ("cleaned up\n", "")
    assert process.returncode == 128 + number


def test_signal_that_nohup_has_ignored_ends_nothing():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with ended_by_signals():
            os.kill(os.getpid(), signal.SIGHUP)
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)
