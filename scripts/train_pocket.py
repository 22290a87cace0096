"""Train models/pocket, the small checkpoint that ships with kvprofile: `python scripts/train_pocket.py --output DIR`.

The model learns to answer questions about its context and to repeat that context. Two KV heads of layer 0 start as
previous-token heads; all others start at random, the heads that look things up included. Data
come from kvprofile.evaluate.tasks under the purpose "train", a fresh seed for every step, so the run can stop anywhere
and continue. The smoke mode (--smoke) takes about a minute.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import random
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AttentionInterface,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)
from transformers.masking_utils import AttentionMaskInterface

from kvprofile.corpus.generate import KINDS, generate_text
from kvprofile.evaluate.tasks import TASKS, exercise
from kvprofile.scoring.prompts import HINT_TOKENS, REPEAT_ALL, REPEAT_FROM

PAD, USER, ASSISTANT, END = SPECIAL_TOKENS = ("<|pad|>", "<|user|>", "<|assistant|>", "<|end|>")
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>\n' + message['content'] }}"
    "{{ '\n' if message['role'] == 'user' else '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
SUFFIX = f"\n{ASSISTANT}\n"
"""What the chat template puts between a user's text and the answer."""

ANSWER, COPY, OTHER = 4.0, 0.5, 0.05
"""Loss weights of an answer token, a repeated token, and all other text."""

QUESTION_TASKS = {
    "needle": 3.0, "multi_key": 3.0, "multi_turn": 2.0, "lookup": 1.5, "variables": 1.0, "functions": 1.0,
    "prose": 2.0, "persona": 1.5, "multi_value": 0.7, "counting": 0.3,
}  # fmt: skip
"""How often each task is drawn where a row asks questions."""

CHAINS = ("variables", "functions", "multi_value")
"""Tasks whose answers are found in several steps, which are learned last."""

WARM_HEADS = 2
"""KV heads of layer 0 that start with a role."""

INDUCTION_LAYER = 2
"""Where heads start as induction heads if that is asked for, which shortens training by two thirds."""


@dataclass(frozen=True)
class Shape:
    """What a checkpoint of this recipe may differ in."""

    layers: int = 6
    width: int = 256
    query_heads: int = 8
    kv_heads: int = 4
    head_size: int = 32
    inner: int = 512
    induction_heads: int = 0


@dataclass(frozen=True)
class Stage:
    """A stretch of training: steps, rows a step, row length, shares of rows that copy tokens and that repeat text.

    Tasks in CHAINS are drawn ``chain_weight`` times as often as QUESTION_TASKS says.
    """

    steps: int
    rows: int
    row_tokens: int
    copy_share: float
    repeat_share: float
    chain_weight: float = 1.0


PLANS = {
    "full": (
        Stage(1600, 21, 192, 0.4, 0.2),
        Stage(600, 11, 384, 0.15, 0.2),
        Stage(500, 8, 1024, 0.1, 0.25),
        Stage(350, 4, 2048, 0.05, 0.35),
    ),
    "extend": (
        Stage(400, 8, 1024, 0.05, 0.25, 3.0),
        Stage(300, 4, 2048, 0.05, 0.3, 3.0),
        Stage(200, 3, 3072, 0.05, 0.3, 3.0),
    ),
    "study": (
        Stage(400, 21, 192, 0.4, 0.2),
        Stage(250, 11, 384, 0.15, 0.2),
        Stage(200, 8, 1024, 0.1, 0.25),
    ),
    "study-extend": (Stage(300, 8, 1024, 0.05, 0.25, 3.0),),
    "smoke": (Stage(10, 21, 192, 0.4, 0.2), Stage(10, 4, 1024, 0.15, 0.2)),
}
"""The bundled checkpoint, those of the studies, for each a second part from --start on, and a minute's proof."""

PEAK_LEARNING_RATE = 8e-4
WARM_UP_STEPS = 100
DECAY_SHARE = 0.2
"""The last part of the steps, over which the learning rate falls to a twentieth."""

POSITIONS = 4096


def build_tokenizer(vocabulary: int = 1024) -> PreTrainedTokenizerFast:
    """Byte-level BPE over generated text of every kind; digits stay single so that numbers are spelled out."""

    def sample() -> list[str]:
        text = [generate_text(kind, seed, 1500) for kind in KINDS for seed in range(60)]
        for task in QUESTION_TASKS:
            for seed in range(150):
                made = exercise(task, "tokenizer", seed, 900, 8)
                text += [made.context, *(f"\n\n{q.text}{SUFFIX}{q.answer}" for q in made.questions)]
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
        model_max_length=POSITIONS,
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


class CausalBlocks(torch.autograd.Function):
    """Causal grouped attention for training on a CPU, a block of rows at a time, its probabilities kept for backward.

    query [B, H, T, D], key and value [B, G, T, D]. The rows of a group's query heads are multiplied together, and a
    block meets only the keys up to its end. Measured in docs/decisions against torch's fused kernel.
    """

    BLOCK = 64

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> torch.Tensor:
        """Output [B, H, T, D]."""
        batch, heads, tokens, size = query.shape
        groups, block = key.shape[1], CausalBlocks.BLOCK
        rows, shared = batch * groups, heads // groups
        query = (query * size**-0.5).reshape(rows, shared, tokens, size)
        key, value = key.reshape(rows, tokens, size), value.reshape(rows, tokens, size)
        future = torch.ones(block, block, dtype=torch.bool).triu(1)
        output = torch.empty_like(query)
        kept = []
        for start in range(0, tokens, block):
            stop = min(start + block, tokens)
            count = stop - start
            logits = torch.bmm(query[:, :, start:stop].reshape(rows, shared * count, size), key[:, :stop].mT)
            logits = logits.view(rows, shared, count, stop)
            logits[..., start:].masked_fill_(future[:count, :count], -torch.inf)
            probabilities = torch.softmax(logits, -1).view(rows, shared * count, stop)
            output[:, :, start:stop] = torch.bmm(probabilities, value[:, :stop]).view(rows, shared, count, size)
            kept.append(probabilities)
        ctx.save_for_backward(query, key, value, output, *kept)
        return output.view(batch, heads, tokens, size)

    @staticmethod
    def backward(
        ctx: torch.autograd.function.FunctionCtx, gradient: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Gradients of query, key and value from that of the output."""
        query, key, value, output, *kept = ctx.saved_tensors  # type: ignore[attr-defined]
        rows, shared, tokens, size = query.shape
        batch, heads = gradient.shape[:2]
        gradient = gradient.reshape(rows, shared, tokens, size)
        means = (gradient.float() * output.float()).sum(-1, keepdim=True).to(gradient.dtype)
        to_query = torch.empty_like(query)
        to_key, to_value = torch.zeros(2, rows, tokens, size)
        for probabilities, start in zip(kept, range(0, tokens, CausalBlocks.BLOCK), strict=True):
            stop = min(start + CausalBlocks.BLOCK, tokens)
            flat = (rows, shared * (stop - start))
            arriving = gradient[:, :, start:stop].reshape(*flat, size)
            to_value[:, :stop] += torch.bmm(probabilities.mT, arriving)
            change = torch.bmm(arriving, value[:, :stop].mT)
            change -= means[:, :, start:stop].reshape(*flat, 1)
            change *= probabilities
            to_query[:, :, start:stop] = torch.bmm(change, key[:, :stop]).view(rows, shared, stop - start, size)
            to_key[:, :stop] += torch.bmm(change.mT, query[:, :, start:stop].reshape(*flat, size))
        shape = (batch, rows // batch, tokens, size)
        return (
            (to_query * size**-0.5).view(batch, heads, tokens, size),
            to_key.view(shape).to(key.dtype),
            to_value.view(shape).to(value.dtype),
        )


@torch.compiler.disable
def _causal_blocks(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    return CausalBlocks.apply(query, key, value)  # type: ignore[no-any-return]


def training_attention(
    _module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, _mask: None, **_: object
) -> tuple[torch.Tensor, None]:
    """The signature of transformers' attention functions: blocks on a CPU, torch's fused kernel elsewhere."""
    if query.is_cuda:
        output = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
    else:
        output = _causal_blocks(query, key, value)
    return output.transpose(1, 2).contiguous(), None


def build_model(vocabulary: int, seed: int, shape: Shape) -> Qwen2ForCausalLM:
    """The untrained model with its structured start, in float32."""
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=vocabulary,
        hidden_size=shape.width,
        intermediate_size=shape.inner,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.query_heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_size,
        max_position_embeddings=POSITIONS,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=3,
    )
    model = Qwen2ForCausalLM(config)
    structured_start(model, shape)
    return model


@torch.no_grad()
def structured_start(model: Qwen2ForCausalLM, shape: Shape, bias: float = 8.0) -> None:
    """Turn WARM_HEADS KV heads of layer 0 into previous-token heads; INDUCTION_LAYER gets as many as the shape says.

    The residual's first half holds the token itself. A previous-token head attends one position back through its
    query and key biases and the rotary embedding, and writes that token's embedding into the second half. Without
    this start two cores do not leave the plateau within ten minutes.
    """
    head, group, token_dims = shape.head_size, shape.query_heads // shape.kv_heads, shape.width // 2
    half, fast, every = head // 2, 5, torch.arange(head)
    frequency = torch.tensor([model.config.rope_parameters["rope_theta"] ** (-i / half) for i in range(fast)])

    embedding = model.model.embed_tokens.weight
    embedding[:, :token_dims].normal_(0.0, 0.5)
    embedding[:, token_dims:].normal_(0.0, 0.02)

    attention = model.model.layers[0].self_attn
    for kv_head in range(WARM_HEADS):
        kv = kv_head * head
        own = slice(kv, kv + head)
        attention.k_proj.weight[own] *= 0.1
        attention.v_proj.weight[own] *= 0.1
        attention.v_proj.weight[kv + every, kv + every] = 1.0
        attention.k_proj.bias[kv : kv + fast] = bias * frequency.cos()
        attention.k_proj.bias[kv + half : kv + half + fast] = bias * frequency.sin()
        for query_head in range(kv_head * group, (kv_head + 1) * group):
            query = query_head * head
            mine = slice(query, query + head)
            attention.q_proj.weight[mine] *= 0.1
            if query_head % group == 0:  # the group's other query heads stay free to gather what names a fact
                attention.q_proj.bias[query : query + fast] = bias
                attention.o_proj.weight[:, mine] *= 0.1
                attention.o_proj.weight[token_dims + kv + every, query + every] = 1.0
    for kv_head in range(shape.induction_heads):
        _induction_head(model, shape, kv_head)


@torch.no_grad()
def _induction_head(
    model: Qwen2ForCausalLM, shape: Shape, kv_head: int, match: float = 40.0, copy: float = 1.0
) -> None:
    """Let a KV head match the current token against those before each token, on slow rotary pairs, and copy."""
    head, group, token_dims = shape.head_size, shape.query_heads // shape.kv_heads, shape.width // 2
    half, every, kv = head // 2, torch.arange(head), kv_head * head
    frequency = torch.tensor([model.config.rope_parameters["rope_theta"] ** (-i / half) for i in range(half)])
    slow = (frequency * POSITIONS < 1.6).nonzero().flatten()
    slow = torch.cat([slow, slow + half])
    matched = torch.arange(len(slow)) + kv
    attention = model.model.layers[INDUCTION_LAYER].self_attn
    attention.k_proj.weight[kv : kv + head] *= 0.05
    attention.k_proj.weight[kv + slow, token_dims + matched] = match**0.5
    attention.v_proj.weight[kv : kv + head] *= 0.1
    attention.v_proj.weight[kv + every, kv + every] = 1.0
    for query in range(kv_head * group * head, (kv_head + 1) * group * head, head):
        attention.q_proj.weight[query : query + head] *= 0.05
        attention.q_proj.weight[query + slow, matched] = match**0.5
        attention.o_proj.weight[:, query : query + head] *= 0.1
        attention.o_proj.weight[kv + every, query + every] = copy


KINDS_OF_ROW = ("other", "copy", *TASKS)
"""What a token of a row belongs to, for the report while training; "other" is all that is not an answer."""

Piece = tuple[list[int], float, str]
"""Token ids, their loss weight, and one of KINDS_OF_ROW."""


class RowMaker:
    """Makes training rows, packed to a length."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, seed: int) -> None:
        self.backend = tokenizer.backend_tokenizer
        self.vocabulary = len(tokenizer)
        self.seed = seed
        self.user, self.suffix = self.encode(f"{USER}\n"), self.encode(SUFFIX)
        self.end = self.encode(END)

    def encode(self, text: str) -> list[int]:
        """Ids of a text, special tokens by their names."""
        return self.backend.encode(text, add_special_tokens=False).ids

    def measure(self, text: str) -> int:
        """Tokens of a text."""
        return len(self.encode(text))

    def batch(self, stage: Stage, step: int) -> dict[str, torch.Tensor]:
        """Ids, loss weights, kinds and positions, each [rows, row_tokens + 1], a function of seed and step only."""
        rng = random.Random(f"train:{self.seed}:{step}")
        rows = [self.row(rng, stage.row_tokens + 1, stage) for _ in range(stage.rows)]
        ids, weights, kinds = (torch.tensor([row[i] for row in rows]) for i in range(3))
        positions = torch.tensor([self.positions(rng, stage.row_tokens + 1) for _ in rows])
        return {"ids": ids, "weights": weights, "kinds": kinds, "positions": positions}

    @staticmethod
    def positions(rng: random.Random, length: int) -> list[int]:
        """Positions of a row; half of the rows leave gaps, so that short rows show the distances of long ones."""
        room = POSITIONS - length
        gaps = {}
        if rng.random() < 0.5:
            for place in (rng.randrange(1, length) for _ in range(rng.randrange(1, 4))):
                gaps[place] = rng.randrange(room + 1)
                room -= gaps[place]
        found, position = [], 0
        for index in range(length):
            position += gaps.get(index, 0)
            found.append(position)
            position += 1
        return found

    def row(self, rng: random.Random, length: int, stage: Stage) -> tuple[list[int], list[float], list[int]]:
        """One row of ``length`` ids, weights and indices into KINDS_OF_ROW."""
        ids: list[int] = []
        weights: list[float] = []
        kinds: list[int] = []
        drawn = rng.random()
        while len(ids) < length:
            room = length - len(ids)
            if drawn < stage.copy_share or room < 100:
                pieces = self._copies(rng, room)
            elif drawn < stage.copy_share + stage.repeat_share:
                pieces = self._repeat(rng, room)
            else:
                pieces = self._questions(rng, room, stage.chain_weight)
            for piece, weight, kind in pieces:
                ids += piece
                weights += [weight] * len(piece)
                kinds += [KINDS_OF_ROW.index(kind)] * len(piece)
        return ids[:length], weights[:length], kinds[:length]

    def _copies(self, rng: random.Random, room: int) -> list[Piece]:
        """Random tokens that occur again, some of them as the answer to a request."""
        span = rng.choice((rng.randrange(3, 12), rng.randrange(8, max(9, room // 2))))
        pool = [rng.randrange(len(SPECIAL_TOKENS), self.vocabulary) for _ in range(rng.choice((16, 64, 400)))]
        segment = [rng.choice(pool) for _ in range(span)]
        if rng.random() < 0.3:
            return self._repeat_turn(rng, segment, "copy")
        times = rng.randrange(2, max(3, min(8, room // span + 1)))
        return [(segment, OTHER, "other"), *[(segment, COPY, "copy")] * (times - 1)]

    def _repeat(self, rng: random.Random, room: int) -> list[Piece]:
        task = rng.choice(("repeat", "repeat", "repeat", "strings"))
        if rng.random() < 0.25:
            task = _draw(rng, QUESTION_TASKS)
        length = int((room // 2 - 16) * rng.uniform(0.2, 1.0))
        context = self.encode(exercise(task, "train", rng.randrange(2**48), max(20, length), 0, self.measure).context)
        return self._repeat_turn(rng, context[: room // 2 - 12], "strings" if task == "strings" else "repeat")

    def _repeat_turn(self, rng: random.Random, context: list[int], kind: str) -> list[Piece]:
        start = rng.randrange(HINT_TOKENS, len(context)) if len(context) > 3 * HINT_TOKENS and rng.random() < 0.4 else 0
        request = self.encode(REPEAT_ALL)
        if start:
            request = self.encode(REPEAT_FROM) + context[start - HINT_TOKENS : start]
        asked = self.user + context + request + self.suffix
        return [(asked, OTHER, "other"), (context[start:] + self.end, COPY, kind)]

    def _questions(self, rng: random.Random, room: int, chain_weight: float) -> list[Piece]:
        """A document, then a conversation that asks for what it says, each question once, until the room is used."""
        weights = {t: weight * (chain_weight if t in CHAINS else 1.0) for t, weight in QUESTION_TASKS.items()}
        task = _draw(rng, weights)
        length = int(room * rng.uniform(0.2, 0.8))
        made = exercise(task, "train", rng.randrange(2**48), length, room // 16, self.measure)
        pieces = [(self.user + self.encode(made.context), OTHER, "other")]
        for turn, question in enumerate(made.questions):
            opening = self.encode("\n\n" + question.text) if turn == 0 else self.user + self.encode(question.text)
            pieces.append((opening + self.suffix, OTHER, "other"))
            pieces.append((self.encode(question.answer) + self.end, ANSWER, task))
        return pieces


def _draw(rng: random.Random, weights: dict[str, float]) -> str:
    return rng.choices(list(weights), list(weights.values()))[0]


def stage_of(step: int, plan: tuple[Stage, ...]) -> Stage:
    """The stage that a step belongs to."""
    for stage in plan:
        step -= stage.steps
        if step < 0:
            return stage
    return plan[-1]


def learning_rate(step: int, total: int) -> float:
    """Linear warm-up, a plateau, and a linear decay over the last steps."""
    rise, fall = (step + 1) / WARM_UP_STEPS, (total - step) / (DECAY_SHARE * total)
    return PEAK_LEARNING_RATE * max(0.05, min(1.0, rise, fall))


class Trainer:
    """Weights in float32 for the optimiser, a copy in bfloat16 for the forward and backward pass."""

    def __init__(self, model: Qwen2ForCausalLM, device: str, compiled: bool) -> None:
        AttentionInterface.register("training", training_attention)
        AttentionMaskInterface.register("training", lambda *_, **__: None)
        self.device = device
        self.masters = [p.detach().clone().float().to(device).requires_grad_() for p in model.parameters()]
        self.model = model.to(device, torch.bfloat16)
        self.model.set_attn_implementation("training")
        self.forward = torch.compile(self.model, dynamic=False) if compiled else self.model
        self.optimizer = torch.optim.AdamW(self.masters, lr=1.0, betas=(0.9, 0.98), weight_decay=0.05, fused=True)

    def step(self, batch: dict[str, torch.Tensor], rate: float) -> tuple[float, torch.Tensor]:
        """One update. Gives the loss and which targets were the first choice, [rows, row_tokens]."""
        batch = {name: tensor.to(self.device) for name, tensor in batch.items()}
        ids, weights = batch["ids"], batch["weights"][:, 1:]
        logits = self.forward(ids[:, :-1], position_ids=batch["positions"][:, :-1], use_cache=False).logits
        targets = ids[:, 1:]
        losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="none")
        loss = (losses * weights.flatten()).sum() / weights.sum()
        loss.backward()
        for master, parameter in zip(self.masters, self.model.parameters(), strict=True):
            master.grad = parameter.grad.float()
            parameter.grad = None
        torch.nn.utils.clip_grad_norm_(self.masters, 1.0)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.share()
        return loss.item(), (logits.detach().argmax(-1) == targets).cpu()

    @torch.no_grad()
    def share(self) -> None:
        """Copy the float32 weights into the model."""
        for master, parameter in zip(self.masters, self.model.parameters(), strict=True):
            parameter.copy_(master)

    def state(self) -> dict[str, object]:
        """All that a later run needs to go on."""
        return {"masters": [m.detach() for m in self.masters], "optimizer": self.optimizer.state_dict()}

    @torch.no_grad()
    def restore(self, state: dict[str, object]) -> None:
        """Go on from :meth:`state`."""
        for master, saved in zip(self.masters, state["masters"], strict=True):  # type: ignore[call-overload]
            master.copy_(saved)
        self.optimizer.load_state_dict(state["optimizer"])  # type: ignore[arg-type]
        self.share()


class Report:
    """Prints now and then how often a target of each kind was the model's first choice since the last line."""

    def __init__(self, total: int, every: int) -> None:
        self.total, self.every = total, every
        self._clear()

    def _clear(self) -> None:
        self.right, self.count = torch.zeros(2, len(KINDS_OF_ROW))
        self.started, self.tokens = time.perf_counter(), 0

    def add(self, step: int, loss: float, right: torch.Tensor, kinds: torch.Tensor) -> None:
        """Take in one step, ``right`` and ``kinds`` [rows, row_tokens]."""
        self.right += torch.bincount(kinds.flatten(), right.flatten().float(), len(KINDS_OF_ROW))
        self.count += torch.bincount(kinds.flatten(), minlength=len(KINDS_OF_ROW))
        self.tokens += right.numel()
        if (step + 1) % self.every:
            return
        rate = self.tokens / (time.perf_counter() - self.started)
        shares = " ".join(
            f"{kind} {r / n:.3f}"
            for kind, r, n in zip(KINDS_OF_ROW, self.right.tolist(), self.count.tolist(), strict=True)
            if n
        )
        print(f"{step + 1}/{self.total} x{right.shape[1]} {rate:.0f} tok/s loss {loss:.3f} {shares}", flush=True)
        self._clear()


def train(output: Path, plan: tuple[Stage, ...], seed: int, shape: Shape, options: argparse.Namespace) -> None:
    """Train or continue, then write the checkpoint in bfloat16 to ``output``."""
    tokenizer = build_tokenizer()
    maker = RowMaker(tokenizer, seed)
    model = build_model(len(tokenizer), seed, shape)
    total = sum(stage.steps for stage in plan)
    record = {"seed": seed, "shape": dataclasses.asdict(shape), "plan": [dataclasses.asdict(stage) for stage in plan]}
    if options.start:
        record["start"] = take_weights(model, options.start, seed)
    trainer = Trainer(model, options.device, options.compile)
    state_file = output / "training-state.pt"
    output.mkdir(parents=True, exist_ok=True)
    first = 0
    if state_file.exists():
        state = torch.load(state_file, weights_only=True, map_location=options.device)
        if state["record"] != record:
            sys.exit(f"{state_file} belongs to a run with another seed, shape or plan; remove it or choose a folder")
        trainer.restore(state)
        first = state["step"]
        print(f"continuing at step {first} of {total}", flush=True)
    report = Report(total, 5 if total < 100 else 50)
    with ThreadPoolExecutor(1) as ahead:
        upcoming = ahead.submit(maker.batch, stage_of(first, plan), first)
        for step in range(first, total):
            batch = upcoming.result()
            upcoming = ahead.submit(maker.batch, stage_of(step + 1, plan), step + 1)
            loss, right = trainer.step(batch, learning_rate(step, total))
            report.add(step, loss, right, batch["kinds"][:, 1:])
            if (step + 1) % options.save_every == 0:
                partial = state_file.with_suffix(".partial")
                torch.save({**trainer.state(), "step": step + 1, "record": record}, partial)
                partial.replace(state_file)
    as_llama(trainer.model).save_pretrained(output)
    tokenizer.save_pretrained(output)
    (output / "training.json").write_text(json.dumps(record, indent=2) + "\n")
    state_file.unlink(missing_ok=True)
    print(f"wrote {output}", flush=True)


def take_weights(model: Qwen2ForCausalLM, start: Path, seed: int) -> dict[str, object]:
    """Load a finished checkpoint of this script into ``model`` and give the record of how it was trained."""
    record: dict[str, object] = json.loads((start / "training.json").read_text())
    if seed in seeds_of(record):
        sys.exit(f"{start} was trained on the rows of seed {seed}; choose another --seed")
    weights = load_file(start / "model.safetensors")
    expected = {name for name, _ in model.named_parameters()}
    model.load_state_dict({name: weights[name] for name in expected}, strict=False)
    return record


def seeds_of(record: dict[str, Any]) -> set[int]:
    """Seeds of a run and of those it started from."""
    return {record["seed"]} | (seeds_of(record["start"]) if "start" in record else set())


def as_llama(model: Qwen2ForCausalLM) -> LlamaForCausalLM:
    """The same function as a Llama with attention biases, its output biases zero.

    Loaders give every checkpoint of type qwen2 Qwen2's own pre-tokenizer, and this one has its own.
    """
    shared = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    shared += ("num_key_value_heads", "head_dim", "max_position_embeddings", "rope_parameters", "rms_norm_eps")
    shared += ("tie_word_embeddings", "pad_token_id", "bos_token_id", "eos_token_id")
    config = LlamaConfig(attention_bias=True, **{name: getattr(model.config, name) for name in shared})
    llama = LlamaForCausalLM(config).to(torch.bfloat16)
    zeros = {name: torch.zeros_like(bias) for name, bias in llama.named_parameters() if name.endswith("o_proj.bias")}
    llama.load_state_dict({**{k: v.cpu() for k, v in model.state_dict().items()}, **zeros})
    return llama


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the bundled pocket checkpoint; stop and rerun to continue.")
    parser.add_argument("--output", type=Path, required=True, help="folder for the checkpoint and the training state")
    parser.add_argument(
        "--start", type=Path, help="a finished checkpoint of this script to go on from, in its shape; needs a new seed"
    )
    parser.add_argument("--seed", type=int, default=0)
    for field in dataclasses.fields(Shape):
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=int, default=field.default)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=None, help="off in a smoke run")
    parser.add_argument("--save-every", type=int, default=100, help="steps between saved training states")
    parser.add_argument("--plan", choices=PLANS, default="full", help="length of the run; smoke gives no useful model")
    parser.add_argument("--smoke", dest="plan", action="store_const", const="smoke", help="short for --plan smoke")
    options = parser.parse_args()
    if options.compile is None:
        options.compile = options.plan != "smoke"
    torch.set_num_threads(options.threads)
    shape = Shape(**{field.name: getattr(options, field.name) for field in dataclasses.fields(Shape)})
    if options.start and not (options.start / "training.json").is_file():
        parser.error(f"{options.start} is no finished checkpoint of this script: it has no training.json")
    if options.start:
        shape = Shape(**json.loads((options.start / "training.json").read_text())["shape"])
    warm = WARM_HEADS + shape.induction_heads
    if (
        shape.layers * shape.kv_heads < 4 * warm
        or shape.kv_heads < warm - WARM_HEADS
        or shape.layers <= INDUCTION_LAYER
    ):
        sys.exit(
            f"{shape.layers} x {shape.kv_heads} KV heads: choose more layers or KV heads, so that the {warm} that start"
            " with a role are a quarter at most"
        )
    train(options.output, PLANS[options.plan], options.seed, shape, options)


if __name__ == "__main__":
    main()
