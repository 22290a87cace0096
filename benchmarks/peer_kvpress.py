"""NVIDIA kvpress' KVzipPress on one context, in an environment of its own: a child of `profile_speed.py`.

It is used as its pipeline uses it: the context through the decoder with a cache, then the press scores. What comes
behind the scores, choosing the pairs to drop, is left out, because it is no part of profiling.
"""

from __future__ import annotations

import argparse
import json
import logging
from pathlib import Path
from typing import Any

import torch
from kvpress import KVzipPress
from measuring import Watch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, DynamicCache

WARM_UP_TOKENS = 128


class Scores(KVzipPress):  # type: ignore[misc]
    """The press up to its scores [L, 1, G, P + T], which it keeps in ``found``."""

    def compress_post(self, model: Any) -> None:  # noqa: ARG002 - kvpress calls it so
        """Keep the scores, drop nothing."""
        self.found = self.score_val


def score(model: Any, ids: list[int], chunk_tokens: int, watch: Watch) -> torch.Tensor:
    """Scores [L, G, P + T] of a context with its prefix."""
    press = Scores(compression_ratio=0.5, chunk_size=chunk_tokens)
    with torch.inference_mode(), press(model):
        watch.part("setup")  # it loads the tokenizer
        model.model(input_ids=torch.tensor([ids]), past_key_values=DynamicCache())
        watch.part("prefill")
    watch.part("scoring")
    return press.found[:, 0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name, kind in (("model", Path), ("ids", Path), ("scores", Path), ("chunk-tokens", int), ("dtype", str)):
        parser.add_argument(f"--{name}", type=kind, required=True)
    asked = parser.parse_args()
    logging.disable(logging.WARNING)
    dtype = getattr(torch, asked.dtype)
    model = AutoModelForCausalLM.from_pretrained(asked.model, dtype=dtype, attn_implementation="sdpa").eval()
    ids = json.loads(asked.ids.read_text())
    score(model, ids[:WARM_UP_TOKENS], asked.chunk_tokens, Watch())
    watch = Watch()
    found = score(model, ids, asked.chunk_tokens, watch)
    measured = watch.found()
    save_file({"scores": found.float().contiguous()}, asked.scores)
    print(json.dumps({**measured, "threads": torch.get_num_threads()}))


if __name__ == "__main__":
    main()
