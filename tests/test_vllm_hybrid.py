"""A model with two kinds of cache: FLASHMLA serves its MLA layers, beside layers with a recurrent state.

It is a small Kimi-Linear with random weights. All layers share one memory: a block of it holds a layer's
state of one request, or as many tokens of an MLA layer as take that room.
"""

from __future__ import annotations

import json
from math import ceil

import pytest
import torch

vllm = pytest.importorskip("vllm")

from safetensors.torch import save_file  # noqa: E402
from vllm.v1.kv_cache_interface import MambaSpec, MLAAttentionSpec  # noqa: E402
from vllm_engines import PEER, engine, random_prompts  # noqa: E402

from vllm_flashmla_backend.attention.impl import FlashMLAImpl  # noqa: E402
from vllm_flashmla_backend.flash_mla.schedule import PAGE_SIZE  # noqa: E402

pytestmark = pytest.mark.gpu

VOCAB, HIDDEN, INNER, HEADS = 1024, 256, 512, 16
LATENT, NOPE, ROPE, VALUE = 512, 128, 64, 128
STATE_HEADS, STATE_DIM, TAPS = 6, 128, 4
MLA_LAYERS, STATE_LAYERS = [3, 6], [1, 2, 4, 5]  # counted from 1, as in the model's configuration
NUM_LAYERS = len(MLA_LAYERS + STATE_LAYERS)

# A state is a float32 matrix per head, and the inputs of q, k and v that the convolutions still need.
STATE_BYTES = 4 * STATE_HEADS * STATE_DIM**2 + 2 * 3 * STATE_HEADS * STATE_DIM * (TAPS - 1)
PAGES = ceil(STATE_BYTES / (2 * PAGE_SIZE * (LATENT + ROPE)))  # in a block: 6
BLOCK_SIZE = PAGES * PAGE_SIZE

# vLLM 0.26.0 clears no state in a step of single tokens: a prompt of one is right only beside longer ones.
LENGTHS = [1, 40, 63, 64, 65, 300, 383, 384, 385, 700, 1000, 1500]
LONG = 3  # the last ones, which are asked once more with another first block
STEPS = 8
WORD = 7  # all that may be answered: so two engines never part where a choice is close
BLOCKS = 80  # of which all prompts take 60: when asked again, pages lie where states were, and the reverse
BOUND = 0.5  # in bfloat16, as in test_vllm_generate.py
OPTIONS = dict(
    skip_tokenizer_init=True,
    dtype="bfloat16",
    enable_prefix_caching=False,  # vLLM's default differs from version to version
    max_num_batched_tokens=512,  # long prompts are prefilled in chunks
)


def weights() -> dict[str, torch.Tensor]:
    """Those of a checkpoint: random, and such that an output has about the scale of its input.

    But for the queries, which are large, so that MLA attends to a few tokens and not to the mean of all.
    """
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int, scale: float = 1) -> torch.Tensor:
        return torch.randn(shape, generator=generator) * scale * shape[-1] ** -0.5

    def mla() -> dict[str, torch.Tensor]:
        return {
            "q_proj.weight": normal(HEADS * (NOPE + ROPE), HIDDEN, scale=3),
            "kv_a_proj_with_mqa.weight": normal(LATENT + ROPE, HIDDEN),
            "kv_a_layernorm.weight": torch.ones(LATENT),
            "kv_b_proj.weight": normal(HEADS * (NOPE + VALUE), LATENT),
            "o_proj.weight": normal(HIDDEN, HEADS * VALUE, scale=2),
        }

    def recurrent() -> dict[str, torch.Tensor]:
        width = STATE_HEADS * STATE_DIM
        layer = {
            "b_proj.weight": normal(STATE_HEADS, HIDDEN),
            "A_log": torch.zeros(1, 1, STATE_HEADS, 1),
            "dt_bias": torch.full((width,), -3.0),  # a token is forgotten after some 20 others
            "o_norm.weight": torch.ones(STATE_DIM),
            "o_proj.weight": normal(HIDDEN, width),
        }
        for name in "qkv":
            layer[f"{name}_proj.weight"] = normal(width, HIDDEN)
            layer[f"{name}_conv1d.weight"] = normal(width, 1, TAPS)
        for name in "fg":
            layer[f"{name}_a_proj.weight"] = normal(STATE_DIM, HIDDEN)
            layer[f"{name}_b_proj.weight"] = normal(width, STATE_DIM)
        return layer

    named = {
        "model.embed_tokens.weight": torch.randn(VOCAB, HIDDEN, generator=generator),
        "model.norm.weight": torch.ones(HIDDEN),
        "lm_head.weight": normal(VOCAB, HIDDEN, scale=3),
    }
    for i in range(NUM_LAYERS):
        attention = mla() if i + 1 in MLA_LAYERS else recurrent()
        layer = {f"self_attn.{name}": weight for name, weight in attention.items()} | {
            "mlp.gate_proj.weight": normal(INNER, HIDDEN),
            "mlp.up_proj.weight": normal(INNER, HIDDEN),
            "mlp.down_proj.weight": normal(HIDDEN, INNER),
            "input_layernorm.weight": torch.ones(HIDDEN),
            "post_attention_layernorm.weight": torch.ones(HIDDEN),
        }
        named |= {f"model.layers.{i}.{name}": weight for name, weight in layer.items()}
    return named


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    config = dict(
        architectures=["KimiLinearForCausalLM"],
        model_type="kimi_linear",
        dtype="bfloat16",
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=INNER,
        num_hidden_layers=NUM_LAYERS,
        num_attention_heads=HEADS,
        kv_lora_rank=LATENT,
        qk_nope_head_dim=NOPE,
        qk_rope_head_dim=ROPE,
        v_head_dim=VALUE,
        mla_use_nope=True,  # nothing is rotated
        linear_attn_config=dict(
            full_attn_layers=MLA_LAYERS,
            kda_layers=STATE_LAYERS,
            num_heads=STATE_HEADS,
            head_dim=STATE_DIM,
            short_conv_kernel_size=TAPS,
        ),
        model_max_length=2048,
    )
    folder = tmp_path_factory.mktemp("kimi-linear")
    (folder / "config.json").write_text(json.dumps(config))
    save_file({name: w.bfloat16() for name, w in weights().items()}, folder / "model.safetensors")
    return str(folder)


def answers(llm) -> list[vllm.RequestOutput]:
    """Answers to prompts of all LENGTHS, then to the LONG ones with another first block."""
    *prompts, block = (p["prompt_token_ids"] for p in random_prompts(llm, [*LENGTHS, BLOCK_SIZE]))
    prompts += [block + prompt[BLOCK_SIZE:] for prompt in prompts[-LONG:]]
    params = vllm.SamplingParams(
        temperature=0, max_tokens=STEPS, logprobs=5, ignore_eos=True, allowed_token_ids=[WORD]
    )
    return llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], params, use_tqdm=False)


def logprobs(answers: list[vllm.RequestOutput]) -> list[list[dict[int, float]]]:
    """Those of the five best tokens and of WORD, at each step of each answer."""
    assert all(list(answer.outputs[0].token_ids) == [WORD] * STEPS for answer in answers)
    return [
        [{token: entry.logprob for token, entry in step.items()} for step in answer.outputs[0].logprobs]
        for answer in answers
    ]


def differences(ours: list[vllm.RequestOutput], theirs: list[vllm.RequestOutput]) -> torch.Tensor:
    """The largest difference of a logprob: (answers, STEPS)."""

    def largest(p: dict[int, float], q: dict[int, float]) -> float:
        return max(abs(p[token] - q[token]) for token in p.keys() & q.keys())

    pairs = zip(logprobs(ours), logprobs(theirs), strict=True)
    return torch.tensor([[largest(p, q) for p, q in zip(a, b, strict=True)] for a, b in pairs])


@pytest.fixture(scope="module")
def expected(model) -> list[vllm.RequestOutput]:
    """What vLLM's own backend answers: eagerly, and with prompts in other chunks."""
    with engine(PEER, model=model, enforce_eager=True, **OPTIONS | dict(max_num_batched_tokens=2048)) as llm:
        return answers(llm)


def check_caches(llm) -> None:
    """FLASHMLA serves the two MLA layers, a group of their own, in the memory of two groups of states."""
    (config,) = llm.collective_rpc(lambda worker: worker.model_runner.kv_cache_config)
    layers = llm.llm_engine.vllm_config.compilation_config.static_forward_context
    groups = [(g.kv_cache_spec, [layers[name] for name in g.layer_names]) for g in config.kv_cache_groups]
    ((spec, served),) = ((spec, group) for spec, group in groups if isinstance(spec, MLAAttentionSpec))
    states = [group for spec, group in groups if isinstance(spec, MambaSpec)]
    assert len(groups) == 3 and [len(group) for group in [served, *states]] == [2, 2, 2]
    assert spec.block_size == llm.llm_engine.vllm_config.cache_config.block_size == BLOCK_SIZE == 384

    width = LATENT + ROPE
    for layer in served:
        assert isinstance(layer.impl, FlashMLAImpl)
        assert layer.kv_cache.shape == (config.num_blocks * PAGES, PAGE_SIZE, width)
        assert layer.kv_cache.stride() == (PAGE_SIZE * width, width, 1)
    addresses = [layer.kv_cache.data_ptr() for layer in served]
    for group in states:
        assert [layer.kv_cache[0].data_ptr() for layer in group] == addresses
        for layer in group:
            assert {state.stride(0) * state.itemsize for state in layer.kv_cache} == {2 * BLOCK_SIZE * width}


def test_the_comparison_would_see_a_wrong_block(expected):
    """Neither are the logprobs flat, nor can a far block be another without that at each step they move."""
    best = [[sorted(step.values(), reverse=True) for step in steps] for steps in logprobs(expected)]
    assert sum(step[0] - step[4] for steps in best for step in steps) > 2 * BOUND * len(best) * STEPS
    moved = differences(expected[-2 * LONG : -LONG], expected[-LONG:])  # (LONG, STEPS)
    assert moved.amax(dim=0).min() > BOUND


def test_mla_beside_recurrent_states_gives_the_peers_logprobs(model, expected):
    with engine("FLASHMLA", model=model, num_gpu_blocks_override=BLOCKS, **OPTIONS) as llm:
        check_caches(llm)
        first, again = answers(llm), answers(llm)
    assert not any(answer.num_cached_tokens for answer in again)
    assert differences(first, expected).max() < BOUND
    assert differences(again, expected).max() < BOUND


def test_a_cached_prefix_gives_the_peers_logprobs(model, expected):
    """vLLM finds a prefix where it has kept both its pages and the states after it."""
    with engine("FLASHMLA", model=model, **OPTIONS | dict(enable_prefix_caching=True)) as llm:
        check_caches(llm)
        first, again = answers(llm), answers(llm)
    assert sum(answer.num_cached_tokens for answer in again) > sum(LENGTHS) / 2
    assert differences(first, expected).max() < BOUND
    assert differences(again, expected).max() < BOUND
