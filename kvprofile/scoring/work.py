"""What profiling cannot do without: products counted from shapes, and how fast this machine multiplies.

Counted are multiply-adds of linear layers and of attention, every row against the keys it sees and no others. Not
counted are exponentials, norms, copies and what a layer that keeps a state does besides its MLP, so no run reaches the
time that follows from the count.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from kvprofile.budget.profile import SLIDING_ATTENTION, Geometry
from kvprofile.scoring.effort import sparse_rest
from kvprofile.scoring.prompts import Chunk, FramedDocument


@dataclass(frozen=True)
class DecoderShape:
    """A decoder as counting sees it: its heads, the width of its rows, what one MLP multiplies a row with, the window.

    ``mlp`` is in multiply-adds for each row; of a mixture of experts, those of the experts that a row visits. 0 where
    MLPs are layers of their own, which are not counted.
    """

    geometry: Geometry
    width: int
    mlp: int
    window: int | None

    @classmethod
    def of(cls, config: Any, geometry: Geometry) -> DecoderShape:
        """From a transformers config. MLPs are taken to be gated, as those of all decoders that can be profiled."""
        experts = int(getattr(config, "num_experts_per_tok", None) or 1)
        inner = getattr(config, "moe_intermediate_size", None) if experts > 1 else None
        inner = int(inner or getattr(config, "intermediate_size", None) or 4 * config.hidden_size)
        if getattr(config, "block_auto_adjust_ff_dim", False):
            inner = 2 * inner // 3  # LFM2 states the size before gating
        if {"mlp", "moe"} & {*(getattr(config, "layer_types", None) or ())}:
            inner = 0
        width = int(config.hidden_size)
        return cls(geometry, width, 3 * width * inner * experts, getattr(config, "sliding_window", None))

    def projections(self, names: str) -> int:
        """Multiply-adds a row of those of the projections q, k, v, o."""
        heads = {"q": self.geometry.attention_heads, "o": self.geometry.attention_heads}
        return sum(heads.get(name, self.geometry.kv_heads) for name in names) * self.geometry.head_size * self.width


@dataclass(frozen=True)
class Work:
    """Multiply-adds of reading contexts and of scoring their repeats."""

    prefill: int = 0
    scoring: int = 0

    def __add__(self, other: Work) -> Work:
        return Work(self.prefill + other.prefill, self.scoring + other.scoring)


@dataclass(frozen=True)
class Repeat:
    """A repeat of ``chunk`` context tokens that takes ``rows`` rows, which see ``rest`` other tokens of the context."""

    rows: int
    chunk: int
    rest: int

    @classmethod
    def of(cls, document: FramedDocument, chunk: Chunk, *, sparse_rows: bool = False) -> Repeat:
        """The repeat of a chunk of a document, exact or sparse."""
        prefix, context = len(document.prefix_ids), len(document.context_ids)
        rest = context - (chunk.stop - chunk.start)
        if sparse_rows:
            place = (prefix + chunk.start, prefix + chunk.stop)
            rest = sum(map(len, sparse_rest(prefix, place, prefix + context)))
        return cls(len(chunk.repeat_ids), chunk.stop - chunk.start, rest)


def count(shape: DecoderShape, prefix: int, context: int, repeats: Iterable[Repeat]) -> Work:
    """The work of one document: prefix and context tokens, and its repeats.

    Of the last layer that is scored, reading the context needs the keys alone, and a repeat queries, keys and logits.
    Later layers are not needed at all.
    """
    geometry = shape.geometry
    last = max(geometry.profiled_layers)
    full = len(geometry.profiled_layers) - 1
    sliding = geometry.layer_types[:last].count(SLIDING_ATTENTION)
    length = prefix + context
    pair = geometry.attention_heads * geometry.head_size  # multiply-adds of one row and one key, once
    linear = (full + sliding) * shape.projections("qkvo") + last * shape.mlp

    prefill = length * (linear + shape.projections("k"))
    prefill += 2 * pair * (full * _causal(length, 0) + sliding * _causal(length, 0, shape.window))
    scoring = 0
    for repeat in repeats:
        rows = repeat.rows
        scored = rows * (prefix + repeat.chunk) + _causal(rows, 0)
        seen = scored + rows * repeat.rest
        scoring += rows * (linear + shape.projections("qk"))
        scoring += pair * (full * (2 * seen + rows * repeat.chunk) + scored)
        scoring += 2 * pair * sliding * _causal(rows, length, shape.window)
    return Work(prefill, scoring)


def _causal(rows: int, before: int, window: int | None = None) -> int:
    """Pairs of rows and the keys they see: each row itself, those before it and ``before`` others, or a window's."""
    whole = rows if window is None else min(rows, max(0, window - before))
    return whole * before + whole * (whole + 1) // 2 + (rows - whole) * (window or 0)


def matrix_rate(device: str, dtype: str, size: int = 2048, seconds: float = 0.5) -> float:
    """Multiply-adds a second of large square products on this machine, the best of those tried in ``seconds``."""
    kind = getattr(torch, dtype)
    left, right = (torch.randn(size, size, device=device).to(kind) for _ in range(2))
    best, begun = 0.0, time.perf_counter()
    _finish(torch.matmul(left, right))
    while time.perf_counter() - begun < seconds or not best:
        started = time.perf_counter()
        _finish(torch.matmul(left, right))
        best = max(best, size**3 / (time.perf_counter() - started))
    return best


def _finish(product: torch.Tensor) -> None:
    """Wait until a device has computed it."""
    if product.device.type == "cuda":
        torch.cuda.synchronize(product.device)
