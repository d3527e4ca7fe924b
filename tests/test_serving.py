"""A server of our own: how it is started and reached, and what is said where it does not answer."""

from __future__ import annotations

import sys
from collections.abc import Callable

import pytest

from vllm_flashmla_backend import serving
from vllm_flashmla_backend.cli import main
from vllm_flashmla_backend.serving import serve


@pytest.fixture
def stand_in(tmp_path, monkeypatch) -> Callable[[str], None]:
    """Has the server's interpreter run a program of this one instead."""

    def install(program: str) -> None:
        (tmp_path / "program.py").write_text(program)
        python = tmp_path / "python"
        python.write_text(f'#!/bin/sh\nexec {sys.executable} {tmp_path}/program.py "$@"\n')
        python.chmod(0o755)
        monkeypatch.setattr(sys, "executable", str(python))

    return install


FAILING = "import sys; print('no model in', sys.argv[4]); sys.exit(3)"
ANSWERING = """
import http.server, json, sys

class Answer(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps({"data": [{"id": "kimi"}]}).encode())

port = int(sys.argv[sys.argv.index("--port") + 1])
http.server.HTTPServer(("127.0.0.1", port), Answer).serve_forever()
"""


def test_server_that_ends_before_it_answers_says_why(tmp_path, stand_in):
    stand_in(FAILING)
    why = f"the server ended with status 3:\nno model in {tmp_path}"
    with pytest.raises(RuntimeError, match=why), serve(tmp_path, name="soak"):
        pass


def test_soak_of_a_server_that_does_not_start_says_why(stand_in):
    stand_in(FAILING)
    with pytest.raises(SystemExit, match="the server ended with status 3"):
        main(["soak", "--seconds", "1"])


def test_own_server_is_reached_past_a_proxy(tmp_path, monkeypatch, stand_in):
    stand_in(ANSWERING)
    monkeypatch.setattr(serving, "START_SECONDS", 60)
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with serve(tmp_path, name="kimi") as server:
        assert server.metrics("vllm:num_requests_running") == [0]


def test_server_of_another_model_at_its_port_is_not_taken_for_it(tmp_path, stand_in):
    stand_in(ANSWERING)
    with pytest.raises(RuntimeError, match="is no model recall"), serve(tmp_path, name="recall"):
        pass
