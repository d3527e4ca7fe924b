"""`vllm serve` in a process of its own, asked on loopback, and gone with all its processes at the end."""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from http.client import HTTPException
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

    def metrics(self, *names: str) -> list[float]:
        """Numbers from the server's own metrics, each summed over its engines; 0 where there is none.

        Raises
        ------
        ConnectionError : it does not answer.
        """
        try:
            with urllib.request.urlopen(f"{self.url}/metrics", timeout=30) as answer:
                text = answer.read().decode()
            return [
                sum(map(float, re.findall(rf"^{re.escape(name)}(?:\{{.*\}})? (\S+)$", text, re.M)))
                for name in names
            ]
        except (OSError, HTTPException, ValueError) as error:
            raise ConnectionError(f"the server gave no metrics: {error}") from error

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
    url = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(model)]
    command += ["--attention-backend", "FLASHMLA", "--served-model-name", name]
    command += ["--host", "127.0.0.1", "--port", str(port), *options]
    with _no_proxy("127.0.0.1"), tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            _wait_until_ready(url, name, process, log)
            yield Server(url, process.pid)
        finally:
            stop_group(process)


def _free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


@contextlib.contextmanager
def _no_proxy(host: str) -> Iterator[None]:
    """Have clients of this process, urllib's and httpx's, go to the host itself where a proxy is set."""
    before = os.environ.get("no_proxy")
    exempt = before or os.environ.get("NO_PROXY")
    os.environ["no_proxy"] = f"{exempt},{host}" if exempt else host
    try:
        yield
    finally:
        if before is None:
            del os.environ["no_proxy"]
        else:
            os.environ["no_proxy"] = before


def _wait_until_ready(url: str, name: str, process: subprocess.Popen, log: IO[str]) -> None:
    """Until the server answers and knows its model, as another may have got its port."""
    deadline = time.monotonic() + START_SECONDS
    why = ""
    while time.monotonic() < deadline:
        if process.poll() is not None:
            why = f"ended with status {process.returncode}"
            break
        try:
            with urllib.request.urlopen(f"{url}/v1/models", timeout=5) as answer:
                if name in [model["id"] for model in json.load(answer)["data"]]:
                    return
            why = f"did not take its port, or has another name: at {url} is no model {name}"
            break
        except (OSError, HTTPException, ValueError, KeyError, TypeError) as error:
            why = f"did not answer in {START_SECONDS} s: {error}"
        time.sleep(1)
    log.seek(0)
    said = log.read()
    raise RuntimeError("\n".join([f"the server {why}:", said[-LOG_TAIL:], *errors(said)]))
