"""Train the recall model of this folder: a DeepSeek-V3-shaped model that looks colours up by name.

    PYTHONPATH=. python configs/recall/train.py --out build/recall

The task is `vllm_flashmla_backend.recall`; README.md in this folder says why the model has its
shape and how it learns. Writes the model, its tokenizer and `results.json` to `--out`.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import random
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, models, pre_tokenizers
from tqdm import tqdm
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM, PreTrainedTokenizerFast

from vllm_flashmla_backend import recall

MAX_POSITIONS = 8192
FIRST_LENGTH = 64
"""Tokens of the sequences training begins with; they double whenever the model has learnt them."""

LEARNT = 0.9
"""Part of the colours that is right when the sequences get longer."""

CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{{ message['content'] }}"
    "{%- if message['role'] == 'assistant' %} " + recall.END + "{% endif -%}"
    "{%- if not loop.last %} {% endif -%}"
    "{%- endfor -%}"
)
"""Adds nothing to a single user message: chat and completion give the same tokens."""

ID = {word: i for i, word in enumerate(recall.VOCABULARY)}
WORD, STATEMENT, QUERY = range(3)
ITEM_TOKENS = torch.tensor([1, recall.STATEMENT_TOKENS, recall.QUESTION_TOKENS + recall.ANSWER_TOKENS])
COLOUR_IN_STATEMENT, COLOUR_IN_QUERY = 2, 4
"""Places of the colour in `name : colour .` and in `? name name : colour </s>`."""


@dataclass
class Batch:
    """Sequences to learn from.

    Attributes
    ----------
    tokens : (b, length) int64
    is_answer : (b, length) bool; tokens the model shall predict
    is_colour : (b, length) bool; those of them that need the lookup
    subject : (b, length) int64; the name that the first layer shall bind to a token, -100 if none:
        to the colours in statements and to the `:` in answers
    """

    tokens: torch.Tensor
    is_answer: torch.Tensor
    is_colour: torch.Tensor
    subject: torch.Tensor


def make_batch(
    batch: int, length: int, num_names: int, statement_share: float, query_share: float, queries_last: bool
) -> Batch:
    """Make sequences of statements, fillers and queries `? name name : colour </s>`.

    The shares are of the tokens. Queries ask about a statement before them; they lie anywhere, or
    at the end as in a prompt of the task. Made on the default device, without a loop over tokens.
    """
    statements = max(1, min(num_names, int(length * statement_share) // recall.STATEMENT_TOKENS))
    queries = max(1, int(length * query_share) // int(ITEM_TOKENS[QUERY]))
    words = length - statements * int(ITEM_TOKENS[STATEMENT]) - queries * int(ITEM_TOKENS[QUERY])

    counts = torch.tensor([words, statements, queries])
    kinds = torch.arange(3).repeat_interleave(counts)  # (items)
    order = torch.rand(batch, len(kinds)) + (kinds == QUERY) * float(queries_last)
    kinds = kinds[order.argsort(dim=1)]  # (b, items)

    names = torch.rand(batch, num_names).argsort(dim=1)[:, :statements] + ID[recall.NAMES[0]]
    colours = torch.randint(len(recall.COLOURS), (batch, statements)) + ID[recall.COLOURS[0]]
    stated = (kinds == STATEMENT).cumsum(dim=1)  # (b, items) statements so far, this one included
    asked = (torch.rand(kinds.shape) * stated).long()  # a statement before this item
    subject = torch.where(kinds == STATEMENT, stated - 1, asked).clamp(max=statements - 1)
    name, colour = names.gather(1, subject), colours.gather(1, subject)  # (b, items)

    table = torch.zeros(*kinds.shape, int(ITEM_TOKENS.max()), dtype=torch.int64)  # (b, items, 6)
    table[..., 0] = torch.randint(len(recall.FILLERS), kinds.shape) + ID[recall.FILLERS[0]]
    for kind, parts in (
        (STATEMENT, [name, ID[recall.IS], colour, ID[recall.STOP]]),
        (QUERY, [ID[recall.ASK], name, name, ID[recall.IS], colour, ID[recall.END]]),
    ):
        for i, part in enumerate(parts):
            table[..., i] = torch.where(kinds == kind, torch.as_tensor(part), table[..., i])

    place = torch.arange(table.shape[-1])  # (6)
    used = place < ITEM_TOKENS.to(place.device)[kinds][..., None]  # (b, items, 6): exactly b * length
    answerable = ((kinds == QUERY) & (stated > 0))[..., None]  # a first item may have nothing to ask
    is_answer = answerable & (place >= recall.QUESTION_TOKENS)
    is_colour = answerable & (place == COLOUR_IN_QUERY)
    binds = (kinds == STATEMENT)[..., None] & (place == COLOUR_IN_STATEMENT)
    binds = binds | (kinds == QUERY)[..., None] & (place == COLOUR_IN_QUERY - 1)
    subject = torch.where(binds, name[..., None], -100)
    columns = (table, is_answer, is_colour, subject)
    return Batch(*(column.expand(used.shape)[used].view(batch, length) for column in columns))


def random_batch(rng: random.Random, length: int, num_names: int, tokens: int) -> Batch:
    """A batch of about `tokens` tokens: shares and order vary, lengths from `length / 2` up."""
    length = rng.randint(length // 2, length)
    statements = rng.uniform(0.1, 0.5)
    return make_batch(
        batch=max(1, tokens // length),
        length=length,
        num_names=num_names,
        statement_share=statements,
        query_share=rng.uniform(0.1, 0.9 - statements),
        queries_last=rng.random() < 0.5,
    )


def model_config(hidden_size: int, num_heads: int) -> DeepseekV3Config:
    """Two layers, dense MLPs, and the head sizes FLASHMLA serves (latent 512 + rope 64)."""
    return DeepseekV3Config(
        vocab_size=len(recall.VOCABULARY),
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=2,
        first_k_dense_replace=2,
        num_attention_heads=num_heads,
        num_key_value_heads=num_heads,
        q_lora_rank=None,
        kv_lora_rank=512,
        qk_nope_head_dim=64,
        qk_rope_head_dim=64,
        v_head_dim=128,
        max_position_embeddings=MAX_POSITIONS,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        rms_norm_eps=1e-6,
        n_routed_experts=2,
        n_shared_experts=1,
        num_experts_per_tok=1,
        moe_intermediate_size=hidden_size,
        n_group=1,
        topk_group=1,
        num_nextn_predict_layers=0,
        bos_token_id=None,
        eos_token_id=ID[recall.END],
        pad_token_id=ID[recall.PADDING],
        tie_word_embeddings=False,
        attn_implementation="sdpa",
    )


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token per word, words split at whitespace."""
    tokenizer = Tokenizer(models.WordLevel(ID, unk_token=recall.UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token=recall.UNKNOWN,
        pad_token=recall.PADDING,
        eos_token=recall.END,
        model_max_length=MAX_POSITIONS,
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )


def loss_and_right(model: DeepseekV3ForCausalLM, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss, and the part of the answers' colours that is right.

    The loss is the cross-entropy of the answers' tokens, and that of the names which the first layer
    must bind to colours, read off its output by the embeddings: the lookup in the second layer needs
    them, and without this part training stays for long at guessing any colour of the prompt.
    """
    states = model.model(batch.tokens, use_cache=False, output_hidden_states=True).hidden_states
    predicts = batch.is_answer[:, 1:]  # (b, length - 1): the token before predicts
    logits = model.lm_head(states[-1][:, :-1][predicts]).float()  # (answers, vocabulary)
    target = batch.tokens[:, 1:][predicts]
    loss = F.cross_entropy(logits, target)

    binds = batch.subject >= 0
    bound = F.rms_norm(states[1][binds], states[1].shape[-1:])  # (bindings, hidden)
    name_logits = F.linear(bound, model.model.embed_tokens.weight).float()
    binding_loss = F.cross_entropy(name_logits, batch.subject[binds])

    right = (logits.argmax(-1) == target)[batch.is_colour[:, 1:][predicts]].float().mean()
    return loss + binding_loss, right


@torch.no_grad()
def accuracy(model: DeepseekV3ForCausalLM, length: int, num_names: int, tokens: int) -> float:
    """Part of the colours that is right in fresh sequences of one length, questions last."""
    batch = make_batch(max(1, tokens // length), length, num_names, 0.25, 0.1, queries_last=True)
    return loss_and_right(model, batch)[1].item()


def learning_rate(progress: float, peak: float, warmup: float = 0.02) -> float:
    """Linear warm-up, then a cosine to a hundredth of the peak; `progress` runs from 0 to 1."""
    if progress < warmup:
        return peak * (progress + 1e-3) / warmup
    fraction = (progress - warmup) / (1 - warmup)
    return peak * (0.01 + 0.99 * (1 + math.cos(math.pi * fraction)) / 2)


class Saver:
    """Writes the model to a folder whenever its accuracy beats what the folder holds."""

    def __init__(self, out: Path):
        self.out, self.best = out, -1.0
        make_tokenizer().save_pretrained(out)

    def offer(self, model: DeepseekV3ForCausalLM, score: float) -> None:
        if score < self.best:
            return
        self.best = score
        copy.deepcopy(model).to(torch.bfloat16).save_pretrained(self.out)


def train(args: argparse.Namespace, device: torch.device) -> dict:
    """Train until the minutes or the steps are used up; the best model lies in `args.out`."""
    model = DeepseekV3ForCausalLM(model_config(args.hidden_size, args.heads)).to(device)
    torch.nn.init.normal_(model.model.embed_tokens.weight)  # words are told apart from the first step
    decayed = [p for p in model.parameters() if p.ndim > 1]
    kept = [p for p in model.parameters() if p.ndim == 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.01}, {"params": kept, "weight_decay": 0.0}],
        betas=(0.9, 0.98),
        fused=device.type == "cuda",
    )
    rng, saver = random.Random(args.seed), Saver(args.out)
    length, smoothed, tokens_seen, history, next_check = FIRST_LENGTH, 0.0, 0, [], 0.0
    start, step, progress = time.monotonic(), 0, 0.0
    bar = tqdm(total=100, bar_format="{l_bar}{bar}| {elapsed}{postfix}")
    while progress < 1:
        batch = random_batch(rng, length, args.names, args.tokens)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(progress, args.learning_rate)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss, right = loss_and_right(model, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

        step, tokens_seen = step + 1, tokens_seen + batch.tokens.numel()
        progress = max(step / args.steps, (time.monotonic() - start) / (60 * args.minutes))
        if step % 10 == 0:
            smoothed = 0.7 * smoothed + 0.3 * right.item()
            bar.set_postfix(step=step, length=length, loss=f"{loss.item():.4f}", right=f"{smoothed:.4f}")
            bar.update(min(100.0, 100 * progress) - bar.n)
        if smoothed > LEARNT and length < args.max_length:
            length, smoothed = min(2 * length, args.max_length), 0.0
        if progress >= next_check:
            next_check += 0.05
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                scores = {n: accuracy(model, n, args.names, args.tokens) for n in checked_lengths(args)}
            history.append({"step": step, "tokens": tokens_seen, "length": length, "accuracy": scores})
            tqdm.write(
                f"step {step}, sequences of {length}: "
                + ", ".join(f"{n}: {a:.4f}" for n, a in scores.items())
            )
            saver.offer(model, scores[args.max_length])
    bar.close()
    return {
        "steps": step,
        "tokens": tokens_seen,
        "minutes": round((time.monotonic() - start) / 60, 2),
        "history": history,
    }


def checked_lengths(args: argparse.Namespace) -> list[int]:
    """Lengths whose accuracy is printed: quarters of the longest, and the longest."""
    return sorted({max(FIRST_LENGTH, args.max_length // n) for n in (64, 16, 4, 2, 1)})


@torch.no_grad()
def evaluate(out: Path, device: torch.device, count: int, lengths: tuple[int, int], batch: int = 32) -> dict:
    """Ask the saved model in bf16, by greedy generation, what `recall.make_prompt` asks.

    Prompt lengths are drawn uniformly from `lengths`, one for each `batch` prompts (no padding);
    answers lie anywhere. Returns the part that is right: of all, and by tenth of the prompt in
    which the answer stands.
    """
    tokenizer = PreTrainedTokenizerFast.from_pretrained(out)
    model = DeepseekV3ForCausalLM.from_pretrained(out, dtype=torch.bfloat16, attn_implementation="sdpa")
    model.to(device).eval()
    rng = random.Random(20240607)  # no seed of the training
    by_tenth: list[list[bool]] = [[] for _ in range(10)]
    for _ in tqdm(range(math.ceil(count / batch)), desc="evaluating"):
        num_tokens = rng.randint(*lengths)
        prompts = [recall.make_prompt(rng, num_tokens) for _ in range(batch)]
        ids = tokenizer([p.text for p in prompts], return_tensors="pt").input_ids.to(device)
        generated = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=recall.ANSWER_TOKENS,
        )
        texts = tokenizer.batch_decode(generated[:, num_tokens:], skip_special_tokens=True)
        for prompt, text in zip(prompts, texts, strict=True):
            tenth = 10 * prompt.answer_token_index // num_tokens
            by_tenth[tenth].append(recall.is_right(prompt, text))
    total = sum(map(len, by_tenth))
    return {
        "prompts": total,
        "prompt_tokens": list(lengths),
        "dtype": "bfloat16",
        "device": device.type,
        "right": sum(map(sum, by_tenth)),
        "accuracy": sum(map(sum, by_tenth)) / total,
        "by_tenth": [{"prompts": len(t), "accuracy": sum(t) / len(t) if t else None} for t in by_tenth],
    }


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for the model and results.json")
    parser.add_argument("--minutes", type=float, default=2.5, help="training time")
    parser.add_argument("--steps", type=int, default=1_000_000, help="most steps; for tries on a CPU")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tokens", type=int, default=65536, help="tokens per step")
    parser.add_argument("--max-length", type=int, default=4480, help="tokens of the longest sequences")
    parser.add_argument("--names", type=int, default=len(recall.NAMES), help="how many of the names occur")
    parser.add_argument("--hidden-size", type=int, default=256)
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--evaluate", type=int, default=1024, help="prompts asked at the end")
    parser.add_argument("--only-evaluate", action="store_true", help="ask the model that is in --out again")
    parser.add_argument("--seed", type=int, default=1)
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    device = torch.device(args.device)
    torch.manual_seed(args.seed)
    torch.set_default_device(device)
    torch.set_float32_matmul_precision("high")
    report = args.out / "results.json"
    if args.only_evaluate:
        results = json.loads(report.read_text())
    else:
        results = {
            "training": train(args, device),
            "settings": {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()},
            "device": torch.cuda.get_device_name() if device.type == "cuda" else "CPU",
        }
    longest = min(4000, args.max_length)
    results["evaluation"] = evaluate(args.out, device, args.evaluate, (longest // 2, longest))
    report.write_text(json.dumps(results, indent=2) + "\n")
    print(json.dumps(results["evaluation"], indent=2))


if __name__ == "__main__":
    main()
