"""Train models/pocket, the small checkpoint that ships with kvprofile: `python scripts/train_pocket.py --output DIR`.

A model of four layers with four KV heads each learns to answer questions about facts in its context and to repeat
that context. The heads of layer 0 start as previous-token heads and those of layer 1 as induction heads; the
others find their own roles. Data come from kvprofile.corpus.generate, a fresh seed for every
step, so the run can stop anywhere and continue. The smoke mode (--smoke) takes about a minute.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import json
import math
import random
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from kvprofile.corpus.generate import KINDS, FactDocument, fact_document, generate_text

PAD, USER, ASSISTANT, END = SPECIAL_TOKENS = ("<|pad|>", "<|user|>", "<|assistant|>", "<|end|>")
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>\n' + message['content'] }}"
    "{{ '\n' if message['role'] == 'user' else '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
SUFFIX = f"\n{ASSISTANT}\n"
"""What the chat template puts between a user's text and the answer."""

REPEAT_ALL = "\n\nRepeat the previous context exactly."
REPEAT_FROM = "\n\nRepeat the part of the previous context exactly, starting with "
HINT_TOKENS = 8

ANSWER, REPEAT, OTHER = 4.0, 0.5, 0.05
"""Loss weights of an answer token, a repeated token, and all other text."""

WARM_HEADS = 4
EMBEDDING_DIMS = 128
"""The residual's first dims hold the token itself; the warm heads of layer 0 write the previous token behind them."""


@dataclasses.dataclass(frozen=True)
class Stage:
    """A stretch of training: tokens, row length, shares of repeats, and the share of a row that a document fills."""

    tokens: int
    row_tokens: int
    random_repeat_share: float
    document_repeat_share: float
    document_share: tuple[float, float]


STEP_TOKENS = 4096
FULL_RUN = (
    Stage(292 * STEP_TOKENS, 192, 0.5, 0.2, (0.1, 0.6)),
    Stage(508 * STEP_TOKENS, 192, 0.1, 0.15, (0.1, 0.6)),
    Stage(800 * STEP_TOKENS, 384, 0.1, 0.2, (0.2, 0.7)),
    Stage(1600 * STEP_TOKENS, 1024, 0.1, 0.3, (0.15, 0.6)),
)
SMOKE_RUN = (Stage(10 * STEP_TOKENS, 192, 0.5, 0.2, (0.1, 0.6)), Stage(10 * STEP_TOKENS, 384, 0.1, 0.2, (0.3, 0.7)))
PEAK_LEARNING_RATE = 8e-4


def build_tokenizer(vocabulary: int = 1024) -> PreTrainedTokenizerFast:
    """Byte-level BPE over generated text of every kind; digits stay single so that numbers are spelled out."""

    def sample() -> list[str]:
        rng = random.Random("tokenizer")
        text = [generate_text(kind, seed, 1500) for kind in KINDS for seed in range(60)]
        for _ in range(1500):
            document = fact_document(rng, 12)
            text += [document.text, *(f"\n\n{q.text}{SUFFIX}{q.answer}" for q in document.questions)]
        return [*text, *[REPEAT_ALL, REPEAT_FROM] * 100]

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(
        sample(),
        trainers.BpeTrainer(
            vocab_size=vocabulary,
            special_tokens=list(SPECIAL_TOKENS),
            initial_alphabet=alphabet,
            show_progress=False,
        ),
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=END,
        model_max_length=4096,
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def build_model(vocabulary: int, seed: int, layers: int = 4) -> Qwen2ForCausalLM:
    """The untrained model with its structured start."""
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=vocabulary,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=4096,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=3,
    )
    model = Qwen2ForCausalLM(config)
    structured_start(model)
    return model


@torch.no_grad()
def structured_start(model: Qwen2ForCausalLM, bias: float = 8.0, match: float = 40.0, copy: float = 1.0) -> None:
    """Turn WARM_HEADS KV heads of layer 0 into previous-token heads and of layer 1 into induction heads.

    Layer 0 attends one position back through its query and key biases and the rotary embedding, and writes that
    token's embedding behind the token's own. Layer 1 matches the current token against those on the slow rotary
    pairs, and copies what followed. Without this start two cores do not leave the plateau within ten minutes.
    """
    config = model.config
    head = config.hidden_size // config.num_attention_heads
    group = config.num_attention_heads // config.num_key_value_heads
    half, fast, every = head // 2, 5, torch.arange(head)
    frequency = torch.tensor([config.rope_parameters["rope_theta"] ** (-i / half) for i in range(half)])
    slow = (frequency * config.max_position_embeddings < 1.6).nonzero().flatten()
    slow = torch.cat([slow, slow + half])

    embedding = model.model.embed_tokens.weight
    embedding[:, :EMBEDDING_DIMS].normal_(0.0, 0.5)
    embedding[:, EMBEDDING_DIMS:].normal_(0.0, 0.02)

    previous, induction = (model.model.layers[i].self_attn for i in (0, 1))
    for kv_head in range(WARM_HEADS):
        kv = kv_head * head
        own = slice(kv, kv + head)
        matched = torch.arange(len(slow)) + kv
        for attention in (previous, induction):
            attention.k_proj.weight[own] *= 0.1 if attention is previous else 0.05
            attention.v_proj.weight[own] *= 0.1
            attention.v_proj.weight[kv + every, kv + every] = 1.0
        previous.k_proj.bias[kv : kv + fast] = bias * frequency[:fast].cos()
        previous.k_proj.bias[kv + half : kv + half + fast] = bias * frequency[:fast].sin()
        induction.k_proj.weight[kv + slow, EMBEDDING_DIMS + matched] = math.sqrt(match)
        for query_head in range(kv_head * group, (kv_head + 1) * group):
            query = query_head * head
            mine = slice(query, query + head)
            previous.q_proj.weight[mine] *= 0.1
            if query_head % group == 0:  # the group's other query heads stay free to gather what names a fact
                previous.q_proj.bias[query : query + fast] = bias
                previous.o_proj.weight[:, mine] *= 0.1
                previous.o_proj.weight[EMBEDDING_DIMS + kv + every, query + every] = 1.0
            induction.q_proj.weight[mine] *= 0.05
            induction.o_proj.weight[:, mine] *= 0.1
            induction.q_proj.weight[query + slow, matched] = math.sqrt(match)
            induction.o_proj.weight[kv + every, query + every] = copy


class RowMaker:
    """Makes training rows: token ids and a loss weight for each, packed to a length."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self.backend = tokenizer.backend_tokenizer
        self.vocabulary = len(tokenizer)
        self.user, self.suffix = self.encode(f"{USER}\n"), self.encode(SUFFIX)
        self.end = self.encode(END)

    def encode(self, text: str) -> list[int]:
        """Ids of a text, special tokens by their names."""
        return self.backend.encode(text, add_special_tokens=False).ids

    def row(self, rng: random.Random, length: int, stage: Stage) -> tuple[list[int], list[float]]:
        """One row of ``length`` ids and weights."""
        ids: list[int] = []
        weights: list[float] = []
        random_repeats = rng.random() < stage.random_repeat_share
        while len(ids) < length:
            if random_repeats:
                parts = self._random_repeats(rng, length)
            elif rng.random() < stage.document_repeat_share:
                parts = self._document_repeat(rng, length, stage)
            else:
                parts = self._questions(rng, length, stage)
            for piece, weight in parts:
                ids += piece
                weights += [weight] * len(piece)
        return ids[:length], weights[:length]

    def _random_repeats(self, rng: random.Random, length: int) -> list[tuple[list[int], float]]:
        span = rng.choice((rng.randrange(3, 12), rng.randrange(8, max(9, length // 2))))
        pool = [rng.randrange(len(SPECIAL_TOKENS), self.vocabulary) for _ in range(rng.choice((16, 64, 400)))]
        segment = [rng.choice(pool) for _ in range(span)]
        if rng.random() < 0.3:
            return self._repeat_turn(rng, segment)
        times = rng.randrange(2, max(3, min(8, length // span + 1)))
        return [(segment, OTHER), *[(segment, REPEAT)] * (times - 1)]

    def _document_repeat(self, rng: random.Random, length: int, stage: Stage) -> list[tuple[list[int], float]]:
        kind = rng.choice(KINDS)
        characters = max(60, int(length * rng.uniform(0.3, 1.4)))
        if rng.random() < 0.3:
            context = self._document(rng, length, stage).text
        else:
            context = generate_text(kind, rng.randrange(2**40), characters)
        return self._repeat_turn(rng, self.encode(context)[: length // 2 - 12])

    def _repeat_turn(self, rng: random.Random, context: list[int]) -> list[tuple[list[int], float]]:
        start = rng.randrange(HINT_TOKENS, len(context)) if len(context) > 3 * HINT_TOKENS and rng.random() < 0.4 else 0
        request = self.encode(REPEAT_ALL)
        if start:
            request = self.encode(REPEAT_FROM) + context[start - HINT_TOKENS : start]
        asked = self.user + context + request + self.suffix
        return [(asked, OTHER), (context[start:] + self.end, REPEAT)]

    def _document(self, rng: random.Random, length: int, stage: Stage) -> FactDocument:
        block_count = max(3, int(length * rng.uniform(*stage.document_share) / 16))
        kind = rng.choice(KINDS) if rng.random() < 0.15 else "prose"
        return fact_document(rng, block_count, rng.choice((0.2, 0.5, 0.9)), kind)

    def _questions(self, rng: random.Random, length: int, stage: Stage) -> list[tuple[list[int], float]]:
        document = self._document(rng, length, stage)
        parts = [(self.user + self.encode(document.text), OTHER)]
        asked = rng.sample(document.questions, min(len(document.questions), rng.choice((6, 10, 16))))
        for turn, question in enumerate(asked):
            opening = self.encode("\n\n" + question.text) if turn == 0 else self.user + self.encode(question.text)
            parts.append((opening + self.suffix, OTHER))
            parts.append((self.encode(question.answer) + self.end, ANSWER))
        return parts


def make_batch(maker: RowMaker, stage: Stage, seed: int, step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids [rows, row_tokens + 1] and loss weights of the same shape, a function of seed and step only."""
    rng = random.Random(f"pocket:{seed}:{step}")
    rows = [maker.row(rng, stage.row_tokens + 1, stage) for _ in range(STEP_TOKENS // stage.row_tokens)]
    return torch.tensor([ids for ids, _ in rows]), torch.tensor([weights for _, weights in rows])


def stage_of(step: int, plan: tuple[Stage, ...]) -> Stage:
    """The stage that a step belongs to."""
    for stage in plan:
        step -= stage.tokens // STEP_TOKENS
        if step < 0:
            return stage
    return plan[-1]


def train(output: Path, plan: tuple[Stage, ...], seed: int, layers: int, save_every: int = 200) -> None:
    """Train or continue, then write the checkpoint in bfloat16 to ``output``."""
    tokenizer = build_tokenizer()
    model = build_model(len(tokenizer), seed, layers)
    maker = RowMaker(tokenizer)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1.0, betas=(0.9, 0.98), weight_decay=0.05, fused=True)
    total = sum(stage.tokens // STEP_TOKENS for stage in plan)
    state_file = output / "training-state.pt"
    output.mkdir(parents=True, exist_ok=True)
    first = 0
    if state_file.exists():
        state = torch.load(state_file, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first = state["step"]
        print(f"continuing at step {first} of {total}", flush=True)

    started, seen = time.perf_counter(), 0
    with concurrent.futures.ThreadPoolExecutor(1) as ahead:
        upcoming = ahead.submit(make_batch, maker, stage_of(first, plan), seed, first)
        for step in range(first, total):
            ids, weights = upcoming.result()
            upcoming = ahead.submit(make_batch, maker, stage_of(step + 1, plan), seed, step + 1)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, total)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                logits = model(ids[:, :-1], use_cache=False).logits
            targets, importance = ids[:, 1:], weights[:, 1:]
            losses = torch.nn.functional.cross_entropy(
                logits.float().flatten(0, 1), targets.flatten(), reduction="none"
            )
            loss = (losses * importance.flatten()).sum() / importance.sum()
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            seen += targets.numel()
            if step % 50 == 0:
                right = logits.argmax(-1) == targets
                answers = importance == ANSWER
                firsts = answers & (weights[:, :-1] != ANSWER)
                shares = [right[kind].float().mean().item() for kind in (firsts, answers, importance == REPEAT)]
                rate = seen / (time.perf_counter() - started)
                print(
                    f"step {step}/{total} rows of {targets.shape[1]} loss {loss.item():.3f} "
                    f"first tokens {shares[0]:.3f} answers {shares[1]:.3f} repeats {shares[2]:.3f} {rate:.0f} tokens/s",
                    flush=True,
                )
            if (step + 1) % save_every == 0:
                partial = state_file.with_suffix(".partial")
                torch.save(
                    {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1}, partial
                )
                partial.replace(state_file)
    as_llama(model).to(torch.bfloat16).save_pretrained(output)
    tokenizer.save_pretrained(output)
    (output / "training.json").write_text(
        json.dumps({"seed": seed, "layers": layers, "plan": [dataclasses.asdict(stage) for stage in plan]}, indent=2)
        + "\n"
    )
    state_file.unlink(missing_ok=True)
    print(f"wrote {output}", flush=True)


def as_llama(model: Qwen2ForCausalLM) -> LlamaForCausalLM:
    """The same function as a Llama with attention biases, its output biases zero.

    Loaders give every checkpoint of type qwen2 Qwen2's own pre-tokenizer, and this one has its own.
    """
    shared = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    shared += ("num_key_value_heads", "max_position_embeddings", "rope_parameters", "rms_norm_eps")
    shared += ("tie_word_embeddings", "pad_token_id", "bos_token_id", "eos_token_id")
    config = LlamaConfig(attention_bias=True, **{name: getattr(model.config, name) for name in shared})
    llama = LlamaForCausalLM(config)
    zeros = {name: torch.zeros_like(bias) for name, bias in llama.named_parameters() if name.endswith("o_proj.bias")}
    llama.load_state_dict({**model.state_dict(), **zeros})
    return llama


def learning_rate(step: int, total: int) -> float:
    """Linear warm-up over 100 steps, then a cosine to a tenth of the peak."""
    return PEAK_LEARNING_RATE * min(1.0, (step + 1) / 100) * (0.55 + 0.45 * math.cos(math.pi * step / total))


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the bundled pocket checkpoint; stop and rerun to continue.")
    parser.add_argument("--output", type=Path, required=True, help="folder for the checkpoint and the training state")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--save-every", type=int, default=200, help="steps between saved training states")
    parser.add_argument("--smoke", action="store_true", help="20 steps that prove the machinery, no useful model")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    train(
        arguments.output,
        SMOKE_RUN if arguments.smoke else FULL_RUN,
        arguments.seed,
        arguments.layers,
        arguments.save_every,
    )


if __name__ == "__main__":
    main()
