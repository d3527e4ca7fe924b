"""`python -m vllm_flashmla_backend.cli` is `vllm-flashmla`."""

from __future__ import annotations

import sys

from . import main

# vLLM may start its processes by importing this module again: they must not run the command.
if __name__ == "__main__":
    sys.exit(main())
