"""Ending a process with all that it started."""

from __future__ import annotations

import os
import signal
import subprocess


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
