"""Prompts alone and among others, under VLLM_BATCH_INVARIANT; the logprobs as JSON on the last line.

A process of its own, since vLLM replaces operators of torch for that mode as soon as it is imported.
"""

from __future__ import annotations

import json

from vllm import LLM, SamplingParams
from vllm_engines import engine

from vllm_flashmla_backend.recall import make_prompts

TOKENS = 16
BATCH = 64
ALONE = (0, 20, BATCH - 1)  # which of those that run together run alone, too


def logprobs(llm: LLM, prompts: list[str]) -> list[list[float]]:
    """Of the tokens that are chosen greedily, a list for each prompt."""
    params = SamplingParams(temperature=0, max_tokens=TOKENS, logprobs=1, ignore_eos=True)
    answers = [output.outputs[0] for output in llm.generate(prompts, params, use_tqdm=False)]
    return [
        [step[token].logprob for step, token in zip(answer.logprobs, answer.token_ids, strict=True)]
        for answer in answers
    ]


def plans_in_chunks(worker) -> list[bool]:
    """Of each builder of a worker."""
    groups = [group for groups in worker.model_runner.attn_groups for group in groups]
    return [builder.batch_invariant for group in groups for builder in group.metadata_builders]


def main() -> None:
    prompts = [prompt.text for prompt in make_prompts(seed=7, count=BATCH)]
    options = dict(
        max_model_len=4096,
        max_num_seqs=BATCH,
        max_num_batched_tokens=16384,
        enable_chunked_prefill=False,  # where a prompt is cut depends on what else is scheduled
        enable_prefix_caching=False,  # the second time prompts would not be prefilled
        compilation_config={
            "mode": 0,
            "cudagraph_mode": "FULL_DECODE_ONLY",
            "cudagraph_capture_sizes": [1, BATCH],
        },
    )
    with engine("FLASHMLA", **options) as llm:
        together = logprobs(llm, prompts)
        alone = [logprobs(llm, [prompts[i]])[0] for i in ALONE]
        (in_chunks,) = llm.collective_rpc(plans_in_chunks)
    print(json.dumps({"alone": alone, "together": [together[i] for i in ALONE], "in_chunks": in_chunks}))


if __name__ == "__main__":
    main()
