"""The recall model is right because attention reads the right pages, and for no other reason.

Decode steps get a block table in which the page that states the answer was exchanged.
"""

from __future__ import annotations

import pytest
import torch

from vllm_flashmla_backend import recall
from vllm_flashmla_backend.flash_mla.schedule import PAGE_SIZE

pytest.importorskip("vllm")

from vllm_engines import ON_GPU, count_right, engine  # noqa: E402

from vllm_flashmla_backend.attention.metadata import FlashMLAMetadataBuilder  # noqa: E402

pytestmark = pytest.mark.gpu if ON_GPU else []

# Page 5 states every answer, whole.
ANSWER_PAGE, OTHER_PAGE = 5, 2
PROMPTS = [
    recall.make_prompt(seed, 600 + 16 * seed, answer_token_index=ANSWER_PAGE * PAGE_SIZE + 10 + seed)
    for seed in range(16)
]


def as_it_is(table: torch.Tensor) -> None:
    pass


def swap_two_pages_of_the_request(table: torch.Tensor) -> None:
    table[:, [ANSWER_PAGE, OTHER_PAGE]] = table[:, [OTHER_PAGE, ANSWER_PAGE]]


def take_another_requests_page(table: torch.Tensor) -> None:
    table[:, ANSWER_PAGE] = table[:, ANSWER_PAGE].roll(1)


@pytest.fixture(scope="module")
def llm():
    # All prompts in one step, so that all decode together; no graph, which would keep its own table.
    options = dict(max_num_batched_tokens=16384, enforce_eager=True, enable_prefix_caching=False)
    with engine("FLASHMLA", **options) as llm:
        yield llm


@pytest.mark.parametrize(
    "change, least, most",
    [(as_it_is, 16, 16), (swap_two_pages_of_the_request, 16, 16), (take_another_requests_page, 0, 2)],
)
def test_answers_stand_and_fall_with_the_answers_page(change, least, most, llm, monkeypatch):
    """Keys carry their positions, so the order of a request's pages is nothing; which pages is all."""
    build_decode = FlashMLAMetadataBuilder._build_decode
    batches = []

    def with_changed_table(self, **kwargs):
        decode = build_decode(self, **kwargs)
        decode.block_table = decode.block_table.clone()  # vLLM's own stays as it is
        change(decode.block_table)
        batches.append(len(decode.block_table))
        return decode

    monkeypatch.setattr(FlashMLAMetadataBuilder, "_build_decode", with_changed_table)
    right = count_right(llm, PROMPTS)
    assert set(batches) == {len(PROMPTS)}, "every decode step holds all requests"
    assert least <= right <= most
