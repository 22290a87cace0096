"""Tokens a second of a training step, against the step that transformers gives: `python benchmarks/train_step.py`.

Both train the bundled checkpoint's architecture on the same rows in one run, taking turns. The peer is what one writes
first: bfloat16 autocast over float32 weights with torch's fused attention, no compilation. Printed are both rates and
their ratio for every row length of the recipe.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts"))

from pocket_model import Shape, build_model
from pocket_rows import RowMaker, build_tokenizer
from train_pocket import PLANS, Trainer


def peer_step(vocabulary: int) -> Callable[[dict[str, torch.Tensor]], None]:
    """A step under autocast with torch's fused attention."""
    model = build_model(vocabulary, 0, Shape())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)

    def step(batch: dict[str, torch.Tensor]) -> None:
        ids, weights = batch["ids"], batch["weights"][:, 1:]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = model(ids[:, :-1], use_cache=False).logits
        losses = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
        optimizer.zero_grad()
        ((losses * weights.flatten()).sum() / weights.sum()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--steps", type=int, default=6, help="timed steps of each, after two that warm up")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    tokenizer = build_tokenizer()
    maker = RowMaker(tokenizer, 0)
    peer = peer_step(len(tokenizer))
    ours = Trainer(build_model(len(tokenizer), 0, Shape()), "cpu", compiled=True)
    for stage in PLANS["full"]:
        seconds: dict[str, list[float]] = {"ours": [], "peer": []}
        for step in range(arguments.steps + 2):
            batch = maker.batch(stage, step)
            for name, run in (("ours", lambda b: ours.step(b, 1e-5)), ("peer", peer)):
                started = time.perf_counter()
                run(batch)
                seconds[name].append(time.perf_counter() - started)
        tokens = stage.rows * stage.row_tokens
        rates = {name: tokens / statistics.median(found[2:]) for name, found in seconds.items()}
        print(
            f"rows of {stage.row_tokens}: {rates['ours']:,.0f} tokens/s, peer {rates['peer']:,.0f}, "
            f"{rates['ours'] / rates['peer']:.2f} times as fast; compiling took {seconds['ours'][0]:.0f} s",
            flush=True,
        )


if __name__ == "__main__":
    main()
