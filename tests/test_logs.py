"""Why a process failed is found in its log, wherever in it that stands."""

from __future__ import annotations

import pytest

from vllm_flashmla_backend.logs import errors

WANT = "ValueError: To serve at least one request, 0.56 GiB KV cache is needed"
LAST = "RuntimeError: Engine core initialization failed. See root cause above."
TRACEBACK = (
    'Traceback (most recent call last):\n  File "core.py", line 1030, in check\n    raise ValueError(\n'
)


def prefixed(prefix: str, lines: str) -> str:
    return "".join(f"{prefix}{line}\n" for line in lines.splitlines())


def test_error_of_a_process_that_vllm_started_comes_before_its_own():
    """As vLLM 0.32 logs it: the engine's traceback twice, once behind a prefix; then the one that waited."""
    core = prefixed("(EngineCore pid=3) ERROR 11-26 05:30:20 [core.py:1510] ", TRACEBACK + WANT)
    log = f"(EngineCore pid=3) INFO 11-26 05:30:20 [utils.py:347] Using LBNHC.\n{core}Process EngineCore:\n"
    log += f"{TRACEBACK}{WANT}\n{TRACEBACK}{LAST}\n/usr/lib/tracker.py:254: UserWarning: 1 leaked\n  warn(\n"
    assert errors(log) == [WANT, LAST]


@pytest.mark.parametrize(
    "prefix",
    [
        "[rank0]: ",
        "ERROR 11-26 05:30:20 [core.py:1510] ",
        "\x1b[0;36m(EngineCore pid=3)\x1b[0;0m \x1b[31mERROR\x1b[0m 11-26 05:30:20 [core.py:1510] ",
    ],
    ids=["rank", "no process", "coloured"],
)
def test_error_is_found_behind_a_prefix(prefix):
    assert errors(prefixed(prefix, TRACEBACK + WANT)) == [WANT]


def test_indented_lines_belong_to_the_error_before_them():
    log = "pydantic_core._pydantic_core.ValidationError: 1 validation error\n  Value error, no cache\nbye\n"
    assert errors(log) == [log.removesuffix("\nbye\n")]


def test_log_without_a_traceback_has_no_error():
    assert errors("INFO An Error: is told about\nKilled\n") == []
