"""`bench --serve` and `bench --tails` on a CPU: rows that it has no room for are refused at once."""

from __future__ import annotations

import pytest
import torch

from vllm_flashmla_backend.bench import serve
from vllm_flashmla_backend.cli import main, options, results


@pytest.mark.parametrize("kind", ["--serve", "--tails"])
def test_rows_without_room_are_refused_with_some_that_have_it(kind, tmp_path, monkeypatch):
    started = []
    monkeypatch.setattr(serve, "measure", lambda job: started.append(job) or iter([]))
    for module in (options, results):
        monkeypatch.setattr(module, "device", lambda: torch.device("cpu"))
    with pytest.raises(
        SystemExit, match=r"up to [\d,]+, --layers 16: needs .* expected at most 3,520"
    ) as refused:
        main(["bench", kind, "--out", str(tmp_path)])
    assert not started
    program, *smaller = str(refused.value).splitlines()[-1].split()
    with pytest.raises(SystemExit, match="^nothing was measured"):
        main([*smaller, "--out", str(tmp_path)])
    assert program == "vllm-flashmla" and started


def test_room_on_a_cpu_is_what_vllm_reckons_there():
    """16 layers: its error names 3,520 tokens."""
    assert (serve.cpu_cache_tokens(16), serve.cpu_cache_tokens(1)) == (3520, 909 * 64)
