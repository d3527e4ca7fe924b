"""configs/*.yaml are what `vllm serve --config` reads: each goes through vLLM's own parser."""

from __future__ import annotations

from pathlib import Path

import pytest

CONFIGS = sorted((Path(__file__).parents[1] / "configs").glob("*.yaml"))
GPUS = {"deepseek-r1": 8, "deepseek-v2-lite": 1, "deepseek-v3": 8, "kimi-k2": 16, "recall": 1}


def parse(*arguments: str):
    """What `vllm serve` makes of a command line, its own validation included."""
    from vllm.entrypoints.cli.serve import ServeSubcommand
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    command = ServeSubcommand()
    parser = FlexibleArgumentParser()
    command.subparser_init(parser.add_subparsers(dest="subparser", required=True))
    args = parser.parse_args(["serve", *arguments])
    command.validate(args)
    return args


def test_every_model_has_its_config():
    assert {path.stem for path in CONFIGS} == set(GPUS)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_config_is_read_by_vllm_and_asks_for_flashmla(path):
    args = parse("--config", str(path))
    assert args.model
    assert args.attention_backend == "FLASHMLA"
    assert args.tensor_parallel_size == GPUS[path.stem]
    assert args.block_size is None  # FLASHMLA says itself which it needs


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_command_line_wins_over_config(path):
    assert parse("--config", str(path), "--max-model-len", "1024").max_model_len == 1024


def test_unknown_key_is_refused(tmp_path):
    config = tmp_path / "wrong.yaml"
    config.write_text("model: configs/recall\nattention-backends: FLASHMLA\n")
    with pytest.raises(SystemExit):
        parse("--config", str(config))
