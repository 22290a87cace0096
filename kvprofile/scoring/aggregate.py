"""From token scores to head scores: statistics of a chunk, of a document, and over documents.

Statistics of chunks add up, so the memory they take does not grow with the context: a maximum, a sum and a
histogram for each head.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from kvprofile.budget.profile import Geometry, Matrix, Scores, round_significant
from kvprofile.scoring.shares import preset_shares

SIGNIFICANT_DIGITS = 5
BINS = 1024
SMALLEST = 1e-9
"""The histogram has BINS equal steps of log(score) from SMALLEST to 1: 2 % a step."""

QUANTILE = 0.99


@dataclass(frozen=True)
class HeadStatistics:
    """Token scores of some context positions, summed up for each profiled layer and KV head.

    maximum [L', G] float32, total [L', G] float64, histogram [L', G, BINS] int32, positions: how many there were.
    """

    maximum: torch.Tensor
    total: torch.Tensor
    histogram: torch.Tensor
    positions: int

    @classmethod
    def of(cls, token_scores: torch.Tensor) -> HeadStatistics:
        """Statistics of token scores [L', G, m]."""
        positions = token_scores.shape[-1]
        return cls(token_scores.amax(-1), token_scores.double().sum(-1), histogram(token_scores), positions)

    def __add__(self, other: HeadStatistics) -> HeadStatistics:
        return HeadStatistics(
            torch.maximum(self.maximum, other.maximum),
            self.total + other.total,
            self.histogram + other.histogram,
            self.positions + other.positions,
        )

    def mean(self) -> torch.Tensor:
        """Mean over positions [L', G]."""
        return self.total / self.positions

    def quantile(self, q: float = QUANTILE) -> torch.Tensor:
        """Quantile over positions [L', G]: the geometric middle of the bin that holds it."""
        reached = self.histogram.cumsum(-1) >= math.ceil(q * self.positions)
        index = reached.double().argmax(-1)
        middle = torch.exp(((index + 0.5) / BINS - 1.0) * -math.log(SMALLEST))
        return torch.minimum(middle, self.maximum.double())


def histogram(token_scores: torch.Tensor) -> torch.Tensor:
    """How many token scores [L', G, m] of each head fall into each bin: [L', G, BINS] int32."""
    layers, heads, positions = token_scores.shape
    steps = token_scores.double().clamp_min(SMALLEST).log() / -math.log(SMALLEST) + 1.0
    bins = (steps * BINS).long().clamp_(0, BINS - 1)
    flat = torch.arange(layers * heads)[:, None] * BINS + bins.reshape(layers * heads, positions)
    return torch.bincount(flat.flatten(), minlength=layers * heads * BINS).view(layers, heads, BINS).int()


@dataclass(frozen=True)
class DocumentScores:
    """What of a scored document of so many context ``tokens`` enters a profile.

    maximum [L', G] float32; mean and p99 [L', G] float64; shares [P, L', G] of its tokens between sinks and window at
    the presets, None without such tokens; loss [L', G], None where the method knows none.
    """

    maximum: torch.Tensor
    mean: torch.Tensor
    p99: torch.Tensor
    shares: torch.Tensor | None
    loss: torch.Tensor | None
    tokens: int

    @classmethod
    def of(
        cls, statistics: HeadStatistics, middle: torch.Tensor | None, loss: torch.Tensor | None, tokens: int
    ) -> DocumentScores:
        """From the statistics of all its tokens, and the histogram of those between sinks and window."""
        shares = preset_shares(middle) if middle is not None and middle.any() else None
        return cls(statistics.maximum, statistics.mean(), statistics.quantile(), shares, loss, tokens)


def merge_documents(documents: Sequence[DocumentScores], geometry: Geometry) -> Scores:
    """Scores [L][G] over documents: the maximum of maxima, the mean of means and of quantiles, and the spread.

    Of loss-aware scores the mean over tokens is taken.
    """
    losses = [d.loss for d in documents]
    maxima = torch.stack([d.maximum.double() for d in documents])
    spread = maxima.std(0, correction=0) if len(documents) > 1 else None
    return Scores(
        significant_digits=SIGNIFICANT_DIGITS,
        max=_matrix(maxima.amax(0), geometry),
        mean=_matrix(torch.stack([d.mean for d in documents]).mean(0), geometry),
        p99=_matrix(torch.stack([d.p99 for d in documents]).mean(0), geometry),
        spread=None if spread is None else _matrix(spread, geometry),
        loss=_matrix(_weighted(losses, [d.tokens for d in documents]), geometry)
        if any(loss is not None for loss in losses)
        else None,
    )


def _weighted(losses: Sequence[torch.Tensor | None], tokens: Sequence[int]) -> torch.Tensor:
    """Mean [L', G] over documents, each counted by its tokens."""
    found = [loss.double() * count for loss, count in zip(losses, tokens, strict=True) if loss is not None]
    return torch.stack(found).sum(0) / sum(tokens)


def _matrix(values: torch.Tensor, geometry: Geometry) -> Matrix:
    """Rows for all layers, null for those not profiled, rounded as the file states."""
    rows = iter(values.tolist())
    profiled = set(geometry.profiled_layers)
    return [
        [round_significant(value, SIGNIFICANT_DIGITS) for value in next(rows)]
        if layer in profiled
        else [None] * geometry.kv_heads
        for layer in range(geometry.layers)
    ]
