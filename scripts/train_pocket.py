"""Train models/pocket, the small checkpoint that ships with kvprofile: `python scripts/train_pocket.py --output DIR`.

The model learns to answer questions about its context and to repeat that context. Two KV heads of layer 0 start as
previous-token heads (``pocket_model``); all others start at random, the heads that look things up included. Every step
has a fresh seed (``pocket_rows``), so the run can stop anywhere and continue. The smoke mode (--smoke) takes about a
minute.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from pocket_model import INDUCTION_LAYER, WARM_HEADS, Shape, as_llama, build_model, training_attention
from pocket_rows import KINDS_OF_ROW, RowMaker, Stage, build_tokenizer
from safetensors.torch import load_file
from transformers import AttentionInterface, Qwen2ForCausalLM
from transformers.masking_utils import AttentionMaskInterface

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
