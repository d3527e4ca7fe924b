"""`vllm serve` in a process of its own, asked on loopback, and gone with all its processes at the end."""

from __future__ import annotations

import contextlib
import re
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from .logs import errors
from .processes import stop_group

START_SECONDS = 400
LOG_TAIL = 4000


@dataclass(frozen=True)
class Server:
    """A server that answers.

    Attributes
    ----------
    url : without a path.
    pid : of its first process; None for one that somebody else started.
    """

    url: str
    pid: int | None = None

    def metric(self, name: str) -> float:
        """A number from the server's own metrics, summed over its engines; 0 where there is none."""
        text = urllib.request.urlopen(f"{self.url}/metrics", timeout=30).read().decode()
        return sum(map(float, re.findall(rf"^{re.escape(name)}(?:\{{.*\}})? (\S+)$", text, re.M)))

    def client_options(self) -> dict:
        """What one of openai's clients needs to ask each request once, over a connection of its own.

        A kept connection that was idle for 5 s is closed by the server just when the client may still send
        on it, and what fails then says nothing of the server.
        """
        once = {"Connection": "close"}
        return {"base_url": f"{self.url}/v1", "api_key": "none", "max_retries": 0, "default_headers": once}


@contextlib.contextmanager
def serve(model: Path, *options: str, name: str) -> Iterator[Server]:
    """Run `vllm serve` under FLASHMLA until the block ends.

    Parameters
    ----------
    model : directory of the model.
    options : further options of `vllm serve`.
    name : what the model is called by clients.

    Raises
    ------
    RuntimeError : the server ended, or did not answer within 400 s; holds the end of its log, and the errors
        in all of it.
    """
    port = _free_port()
    command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(model)]
    command += ["--attention-backend", "FLASHMLA", "--served-model-name", name]
    command += ["--host", "127.0.0.1", "--port", str(port), *options]
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            url = f"http://127.0.0.1:{port}"
            _wait_until_healthy(url, process, log)
            yield Server(url, process.pid)
        finally:
            stop_group(process)


def _free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


def _wait_until_healthy(url: str, process: subprocess.Popen, log: IO[str]) -> None:
    deadline = time.monotonic() + START_SECONDS
    why = f"did not answer in {START_SECONDS} s"
    while time.monotonic() < deadline:
        if process.poll() is not None:
            why = f"ended with status {process.returncode}"
            break
        try:
            urllib.request.urlopen(f"{url}/health", timeout=5)
            return
        except (urllib.error.URLError, OSError):
            time.sleep(1)
    log.seek(0)
    said = log.read()
    raise RuntimeError("\n".join([f"the server {why}:", said[-LOG_TAIL:], *errors(said)]))
