"""From head scores to per-head budgets at a retention: which KV heads keep the whole context.

Retention r of n profiled heads gives exactly round(r * n) full heads, halves rounded up. Heads are ranked by score, then
by tie-break statistics in the order given, then by (layer, head), so equal scores never make the result depend
on chance.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from kvprofile.budget.profile import PRESETS, HeadBudgets, Matrix, Scores, mean_budget, retention_key
from kvprofile.errors import InputError


def ranking(scores: Matrix, tie_breaks: Sequence[Matrix] = ()) -> list[tuple[int, int]]:
    """Profiled heads as (layer, KV head), most important first."""
    heads = [(layer, head) for layer, row in enumerate(scores) for head, score in enumerate(row) if score is not None]

    def key(place: tuple[int, int]) -> tuple[float, ...]:
        layer, head = place
        return tuple(-(matrix[layer][head] or 0.0) for matrix in (scores, *tie_breaks))

    return sorted(heads, key=lambda place: (key(place), place))


def full_head_count(retention: float, heads: int) -> int:
    """round(retention * heads), halves up. Raises InputError unless 0 < retention <= 1."""
    if not 0.0 < retention <= 1.0:
        raise InputError(f"retention {retention:g} is outside (0, 1]; 0.5 keeps half of the heads full")
    return math.floor(round(retention * heads, 9) + 0.5)


def allocate(scores: Matrix, retention: float, tie_breaks: Sequence[Matrix] = ()) -> HeadBudgets:
    """Binary budgets [L][G] at a retention: 1.0 for the most important heads, 0.0 for the others, null unprofiled."""
    ranked = ranking(scores, tie_breaks)
    full = set(ranked[: full_head_count(retention, len(ranked))])
    heads: Matrix = [
        [None if score is None else float((layer, head) in full) for head, score in enumerate(row)]
        for layer, row in enumerate(scores)
    ]
    return HeadBudgets(heads=heads, retention_realised=mean_budget(heads))


def preset_budgets(scores: Scores, statistic: str) -> dict[str, HeadBudgets]:
    """Budgets at every preset, ranked by one statistic, ties broken by the other statistics."""
    present = scores.statistics()
    others = [matrix for name, matrix in present.items() if name != statistic]
    return {retention_key(r): allocate(present[statistic], r, others) for r in PRESETS}


def effective_retention(retention: float, sink_tokens: int, recent_tokens: int, context_tokens: int) -> float:
    """Share of the cache kept at a context length, sinks and window of the trimmed heads counted.

    r + (1 - r) * min(1, (sink + recent) / n): the trimmed heads hold that many tokens however long the context is.
    """
    if context_tokens < 1:
        raise InputError(f"context of {context_tokens} tokens; give at least 1")
    return retention + (1.0 - retention) * min(1.0, (sink_tokens + recent_tokens) / context_tokens)
