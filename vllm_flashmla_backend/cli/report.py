"""The text of `vllm-flashmla doctor --report`: what a reader of an issue needs, and nothing secret."""

from __future__ import annotations

import platform
import re
from collections.abc import Mapping
from importlib.metadata import entry_points

from .checks import PLUGINS, Check
from .environment import VLLM, commit, gpus, installed_version

HIDDEN = "(hidden)"
SECRET_NAME = re.compile(r"TOKEN|KEY|SECRET|PASSW|CREDENTIAL|AUTH|_IP$|HOST(?!TYPE)", re.IGNORECASE)
SECRET_TEXT = re.compile(
    r"\bhf_[a-zA-Z0-9]{16,}|\bsk-[\w-]{8,}|\b(?:ghp|gho|ghs|github_pat)_\w{8,}|(?<=://)[^/\s@]+(?=@)"
)
HOME = re.compile(r"/(?:home|Users)/[^/\s:,;'\"]+|/root(?=/|\b)")
SHORTEST_SECRET = 6  # a shorter value of a secret variable, such as 1, is a word of ordinary text


def write(checks: list[Check], environment: Mapping[str, str]) -> str:
    """Write the report as one block of text in Markdown's fences.

    Parameters
    ----------
    checks : what `checks.examine` found.
    environment : the variables of the process as the user set them; those of vLLM are shown.
    """
    sections = {
        "versions": _versions(),
        "checks": [_line(check) for check in checks],
        "entry points": _entry_points(),
        "environment": [
            f"{name}={HIDDEN if SECRET_NAME.search(name) else environment[name]}"
            for name in sorted(environment)
            if name.startswith("VLLM_")
        ],
    }
    lines = ["vllm-flashmla doctor --report"]
    for title, entries in sections.items():
        lines += [f"{title}:", *(f"  {entry}" for entry in entries or ["none"])]
    return "\n".join(["```text", mask("\n".join(lines), environment), "```"])


def mask(text: str, environment: Mapping[str, str]) -> str:
    """Hide tokens, passwords in addresses, values of variables with secret names, and home folders."""
    values = [value for name, value in environment.items() if SECRET_NAME.search(name)]
    for value in sorted(values, key=len, reverse=True):
        if len(value) >= SHORTEST_SECRET:
            text = text.replace(value, HIDDEN)
    text = SECRET_TEXT.sub(HIDDEN, text)
    home = environment.get("HOME", "").rstrip("/")
    if home:
        text = text.replace(home, "~")
    return HOME.sub("~", text)


def _versions() -> list[str]:
    found = {
        "package": installed_version("vllm-flashmla-backend"),
        "commit": commit(),
        "vLLM": installed_version(*VLLM),
        "torch": _torch(),
        "TVM FFI": installed_version("apache-tvm-ffi"),
        "Python": platform.python_version(),
        "system": platform.platform(),
    }
    gpu_lines = [f"GPU {i}: {gpu}" for i, gpu in enumerate(gpus())]
    return [f"{name}: {value or 'unknown'}" for name, value in found.items()] + (gpu_lines or ["GPU: none"])


def _torch() -> str | None:
    try:
        import torch
    except Exception as error:  # a broken installation is what reports are about
        return f"{installed_version('torch')}, not to be imported: {type(error).__name__}: {error}"
    return f"{torch.__version__}, CUDA {torch.version.cuda}"


def _line(check: Check) -> str:
    state = "wrong" if check.remedy else "ok"
    return f"{state:5}  {check.name}: {check.found}" + (f" -> {check.remedy}" if check.remedy else "")


def _entry_points() -> list[str]:
    """Every plugin of vLLM's two groups, for others may take what is ours."""
    return [f"{group}: {each.name} = {each.value}" for group in PLUGINS for each in entry_points(group=group)]
