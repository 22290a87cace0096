"""Measure models/pocket: `python scripts/evaluate_pocket.py [--write-card]`.

Questions and repeats come from seeds that training never uses. An answer counts when every token, the end mark
included, is the model's first choice given the ones before it, which is what greedy decoding would write.
The ranking check keeps half of the KV heads whole and gives the others sinks and a window after the context: a mask
over the cache, block size one. Intervals are 95 % Wilson for shares and a bootstrap over questions for differences.
"""

from __future__ import annotations

import argparse
import json
import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import torch
from transformers import (
    AttentionInterface,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from kvprofile.budget import store
from kvprofile.budget.allocate import allocate, full_head_count
from kvprofile.budget.profile import Matrix
from kvprofile.corpus.generate import KINDS, fact_document, generate_text
from kvprofile.files import write_atomically
from kvprofile.scoring.prompts import REPEAT_ALL, Frame, chat_frame, encode

ROOT = Path(__file__).resolve().parents[1]
BATCH = 8

CARD = Path(__file__).with_name("pocket_card.md.jinja")


@dataclass(frozen=True)
class Item:
    """A prompt, the answer expected, and where the context ends within the prompt."""

    prompt: tuple[int, ...]
    answer: tuple[int, ...]
    context_end: int


def questions(
    tokenizer: PreTrainedTokenizerBase, frame: Frame, count: int, tokens: int, window: int, sinks: int
) -> Iterator[Item]:
    """One question for each unseen document of at least ``tokens``; with a window, about a fact outside of it."""
    end = (int(tokenizer.eos_token_id),)
    for number in range(count):
        rng = random.Random(f"evaluate:questions:{tokens}:{number}")
        state, blocks = rng.getstate(), 4
        while True:
            rng.setstate(state)
            document = fact_document(rng, blocks)
            context = encode(tokenizer, document.text)
            asked = [
                question
                for question, statement in zip(document.questions, document.statements, strict=True)
                if not window or _outside(tokenizer, document.text, statement, len(context), window, sinks)
            ]
            if len(context) >= tokens and asked:
                break
            blocks += 1
        question = rng.choice(asked)
        prompt = (*frame.prefix_ids, *context, *encode(tokenizer, "\n\n" + question.text), *frame.suffix_ids)
        yield Item(prompt, (*encode(tokenizer, question.answer), *end), len(frame.prefix_ids) + len(context))


def _outside(
    tokenizer: PreTrainedTokenizerBase, text: str, statement: str, tokens: int, window: int, sinks: int
) -> bool:
    place = text.index(statement)
    before = len(encode(tokenizer, text[:place]))
    behind = len(encode(tokenizer, text[: place + len(statement)]))
    return before > sinks and tokens - behind > window


def repeats(tokenizer: PreTrainedTokenizerBase, frame: Frame, count: int, tokens: int) -> Iterator[Item]:
    """Unseen documents of every kind, to be repeated."""
    for number in range(count):
        kind = KINDS[number % len(KINDS)]
        text = generate_text(kind, 10**13 + number, tokens, lambda t: len(encode(tokenizer, t)))
        context = encode(tokenizer, text)[:tokens]
        prompt = (*frame.prefix_ids, *context, *encode(tokenizer, REPEAT_ALL), *frame.suffix_ids)
        yield Item(prompt, context, len(frame.prefix_ids) + tokens)


@torch.inference_mode()
def right_tokens(model: PreTrainedModel, items: list[Item], before: Callable[[list[Item]], None]) -> list[list[bool]]:
    """For every item, which answer tokens are the model's first choice."""
    found: dict[int, list[bool]] = {}
    order = sorted(range(len(items)), key=lambda i: len(items[i].prompt))
    for first in range(0, len(order), BATCH):
        picked = order[first : first + BATCH]
        batch = [items[i] for i in picked]
        longest = max(len(item.prompt) + len(item.answer) for item in batch)
        ids = torch.zeros(len(batch), longest, dtype=torch.long)
        for row, item in enumerate(batch):
            ids[row, : len(item.prompt) + len(item.answer)] = torch.tensor((*item.prompt, *item.answer))
        before(batch)
        choice = model(ids, use_cache=False).logits.argmax(-1)
        for row, (index, item) in enumerate(zip(picked, batch, strict=True)):
            start = len(item.prompt) - 1
            found[index] = (choice[row, start : start + len(item.answer)] == torch.tensor(item.answer)).tolist()
    return [found[i] for i in range(len(items))]


class MaskedHeads:
    """Attention in which, behind the context, trimmed heads see only sinks and the last ``window`` tokens."""

    def __init__(self, sinks: int, window: int) -> None:
        self.sinks, self.window = sinks, window
        self.full = torch.ones(1, 1)
        self.context_ends = torch.zeros(1)

    def attend(
        self,
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        _mask: object,
        scaling: float | None = None,
        **_: object,
    ) -> tuple[torch.Tensor, None]:
        """The signature of transformers' attention functions."""
        count, group = query.shape[2], query.shape[1] // key.shape[1]
        row, column = torch.arange(count)[:, None], torch.arange(count)[None]
        causal = column <= row
        trimmed = causal & ((column < self.sinks) | (column > row - self.window))
        in_context = row < self.context_ends[:, None, None]
        allowed = torch.where(in_context, causal, trimmed)[:, None].expand(-1, query.shape[1], -1, -1).clone()
        full = self.full[int(module.layer_idx)].repeat_interleave(group).bool()  # type: ignore[arg-type]
        allowed[:, full] = causal
        output = torch.nn.functional.scaled_dot_product_attention(
            query, key, value, attn_mask=allowed, scale=scaling, enable_gqa=True
        )
        return output.transpose(1, 2).contiguous(), None


def exact_with_heads(model: PreTrainedModel, items: list[Item], heads: Matrix, masked: MaskedHeads) -> list[bool]:
    """Which questions are answered exactly when only ``heads`` keep the context."""
    masked.full = torch.tensor(heads)

    def remember(batch: list[Item]) -> None:
        masked.context_ends = torch.tensor([item.context_end for item in batch])

    return [all(right) for right in right_tokens(model, items, remember)]


def wilson(hits: int, count: int) -> tuple[float, float]:
    """95 % Wilson score interval of a share."""
    z, share = 1.96, hits / count
    middle = share + z * z / (2 * count)
    reach = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return (middle - reach) / (1 + z * z / count), (middle + reach) / (1 + z * z / count)


def bootstrap_difference(ours: list[float], theirs: list[float], draws: int = 2000) -> tuple[float, float]:
    """Paired 95 % bootstrap interval of mean(ours) - mean(theirs)."""
    generator = torch.Generator().manual_seed(0)
    difference = torch.tensor(ours) - torch.tensor(theirs)
    picks = torch.randint(0, len(difference), (draws, len(difference)), generator=generator)
    low, high = torch.quantile(difference[picks].mean(1), torch.tensor([0.025, 0.975])).tolist()
    return low, high


def bootstrap_against_seeds(ours: list[float], theirs: torch.Tensor, draws: int = 2000) -> tuple[float, float]:
    """95 % bootstrap interval of mean(ours) - mean(theirs [seeds, items]); items (paired) and seeds are resampled."""
    generator = torch.Generator().manual_seed(0)
    seeds, items = theirs.shape
    found = torch.empty(draws)
    for draw in range(draws):
        item = torch.randint(0, items, (items,), generator=generator)
        seed = torch.randint(0, seeds, (seeds,), generator=generator)
        found[draw] = torch.tensor(ours)[item].mean() - theirs[seed][:, item].mean()
    low, high = torch.quantile(found, torch.tensor([0.025, 0.975])).tolist()
    return low, high


def random_heads(layers: int, kv_heads: int, retention: float, seed: int) -> Matrix:
    """Full heads drawn at random, as many as the retention asks for."""
    places = [(layer, head) for layer in range(layers) for head in range(kv_heads)]
    full = set(random.Random(seed).sample(places, full_head_count(retention, len(places))))
    return [[float((layer, head) in full) for head in range(kv_heads)] for layer in range(layers)]


def ranking_check(
    model: PreTrainedModel, items: list[Item], scores: Matrix, masked: MaskedHeads, retention: float, seeds: int
) -> dict[str, object]:
    """Exact answers with the profile's heads, random heads and the profile turned upside down."""
    inverted: Matrix = [[None if s is None else 1.0 - s for s in row] for row in scores]
    layers, kv_heads = len(scores), len(scores[0])
    full = exact_with_heads(model, items, [[1.0] * kv_heads] * layers, masked)
    ours = exact_with_heads(model, items, allocate(scores, retention).heads, masked)
    upside_down = exact_with_heads(model, items, allocate(inverted, retention).heads, masked)
    drawn = [exact_with_heads(model, items, random_heads(layers, kv_heads, retention, s), masked) for s in range(seeds)]
    by_chance = [sum(run[i] for run in drawn) / seeds for i in range(len(items))]
    as_numbers = [float(hit) for hit in ours]
    chance = torch.tensor(drawn, dtype=torch.float32)
    return {
        "retention": retention,
        "questions": len(items),
        "full_cache": sum(full) / len(items),
        "profile": sum(ours) / len(items),
        "random_mean": sum(by_chance) / len(items),
        "random_by_seed": [sum(run) / len(items) for run in drawn],
        "inverted": sum(upside_down) / len(items),
        "profile_minus_random_95": bootstrap_against_seeds(as_numbers, chance),
        "profile_minus_inverted_95": bootstrap_difference(as_numbers, [float(hit) for hit in upside_down]),
    }


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Every figure of the model card."""
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    masked = MaskedHeads(arguments.sinks, arguments.window)
    AttentionInterface.register("masked_heads", masked.attend)
    model = AutoModelForCausalLM.from_pretrained(
        arguments.model, dtype=torch.float32, attn_implementation="masked_heads"
    ).eval()
    frame = chat_frame(tokenizer)
    config = model.config
    everything: Matrix = [[1.0] * config.num_key_value_heads] * config.num_hidden_layers

    asked = list(questions(tokenizer, frame, arguments.items, arguments.tokens, 0, 0))
    exact = sum(exact_with_heads(model, asked, everything, masked))
    repeated = right_tokens(
        model,
        list(repeats(tokenizer, frame, max(1, arguments.items // 4), arguments.tokens)),
        lambda batch: setattr(masked, "context_ends", torch.tensor([len(i.prompt) for i in batch])),
    )
    tokens = [hit for item in repeated for hit in item]
    shares = [sum(item) / len(item) for item in repeated]
    by_kind = {
        kind: sum(map(sum, repeated[i :: len(KINDS)])) / sum(map(len, repeated[i :: len(KINDS)]))
        for i, kind in enumerate(KINDS)
        if repeated[i :: len(KINDS)]
    }
    result: dict[str, Any] = {
        "context_tokens": arguments.tokens,
        "questions": {"exact": exact / len(asked), "count": len(asked), "wilson_95": wilson(exact, len(asked))},
        "repeats": {
            "tokens_right": sum(tokens) / len(tokens),
            "documents": len(repeated),
            "bootstrap_95": bootstrap_difference(shares, [0.0] * len(shares)),
            "by_kind": by_kind,
        },
        "sinks": arguments.sinks,
        "window": arguments.window,
    }
    if arguments.profile and arguments.profile.is_file():
        found = store.load(arguments.profile)
        scores = found.scores.statistics()[found.scoring.statistic]
        outside = list(
            questions(tokenizer, frame, arguments.items, arguments.tokens, arguments.window, arguments.sinks)
        )
        result["ranking"] = [
            ranking_check(model, outside, scores, masked, retention, arguments.seeds)
            for retention in arguments.retention
        ]
    return result


def card(result: dict[str, Any]) -> str:
    """The model card: what the checkpoint is, how it was made, and the figures just measured."""
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True)  # noqa: S701 - Markdown
    template = environment.from_string(CARD.read_text(encoding="utf-8"))
    return template.render(**result, percent=lambda share, digits=1: f"{share:.{digits}%}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", type=Path, default=ROOT / "models" / "pocket")
    parser.add_argument("--profile", type=Path, default=ROOT / "models" / "kv_budget" / "pocket.json")
    parser.add_argument(
        "--items", type=int, default=400, help="questions asked; a quarter as many documents are repeated"
    )
    parser.add_argument("--tokens", type=int, default=300, help="context tokens")
    parser.add_argument("--sinks", type=int, default=16)
    parser.add_argument("--window", type=int, default=64)
    parser.add_argument("--retention", type=float, nargs="*", default=[0.5, 0.25])
    parser.add_argument("--seeds", type=int, default=10, help="random choices of heads")
    parser.add_argument("--write-card", action="store_true", help="write the figures into the model's README.md")
    arguments = parser.parse_args()
    result = measure(arguments)
    print(json.dumps(result, indent=2))
    if arguments.write_card:
        write_atomically(arguments.model / "README.md", card(result).encode())


if __name__ == "__main__":
    main()
