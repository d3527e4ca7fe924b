"""What a log says of why its process failed."""

from __future__ import annotations

import re

COLOUR = re.compile(r"\x1b\[[\d;]*m")

VLLM_PREFIX = re.compile(r"^(?:\[rank\d+\]: |\(\w+ pid=\d+\) |ERROR \S+ \S+ \[\S+\] )+", re.M)
"""What vLLM puts before the lines of its processes' tracebacks."""

ERROR = re.compile(r"^[\w.]+(?:Error|Exception)\b.*(?:\n[ \t].*)*", re.M)
"""The last line of a traceback, and further lines of the error's words, where they are indented."""


def errors(log: str) -> list[str]:
    """The errors that the tracebacks in the log end with, each once.

    They come in the log's order. vLLM's engine runs in a process of its own: why it failed is said before the
    last of them, which is that of the process that waited for it.
    """
    return list(dict.fromkeys(ERROR.findall(VLLM_PREFIX.sub("", COLOUR.sub("", log)))))
