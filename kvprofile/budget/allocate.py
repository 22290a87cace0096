"""From head scores to per-head budgets at a retention: the arithmetic behind ``budget.choice``, on matrices alone.

Retention r of n profiled heads gives exactly round(r * n) full heads, halves rounded up. Heads are ranked by score,
then by tie-break statistics in the order given, then by (layer, head), so equal scores never make the result depend
on chance. ``allocate`` knows no constraints; ``allocate_within`` keeps to those of an engine's layout and says what
they cost.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable, Sequence, Set
from dataclasses import dataclass, replace
from typing import TypeAlias

from kvprofile.budget.classes import DEFAULT_CLASSES
from kvprofile.budget.profile import PRESETS, HeadBudgets, Matrix, Scores, mean_budget, retention_key
from kvprofile.errors import InputError

Place: TypeAlias = tuple[int, int]
"""(layer, KV head)."""

Unit: TypeAlias = tuple[Place, ...]
"""Heads of one layer that become full together."""


def ranking(scores: Matrix, tie_breaks: Sequence[Matrix] = ()) -> list[Place]:
    """Profiled heads as (layer, KV head), most important first."""
    heads = [(layer, head) for layer, row in enumerate(scores) for head, score in enumerate(row) if score is not None]

    def key(place: Place) -> tuple[float, ...]:
        layer, head = place
        return tuple(-(matrix[layer][head] or 0.0) for matrix in (scores, *tie_breaks))

    return sorted(heads, key=lambda place: (key(place), place))


def require_retention(retention: float) -> None:
    """Raise InputError unless 0 < retention <= 1; NaN is refused too."""
    if not 0.0 < retention <= 1.0:
        raise InputError(f"retention {retention:g} is outside (0, 1]; 0.5 keeps half of the heads full")


def full_head_count(retention: float, heads: int) -> int:
    """round(retention * heads), halves up. Raises InputError unless 0 < retention <= 1."""
    require_retention(retention)
    return math.floor(round(retention * heads, 9) + 0.5)


def allocate(scores: Matrix, retention: float, tie_breaks: Sequence[Matrix] = ()) -> HeadBudgets:
    """Binary budgets [L][G] at a retention: 1.0 for the most important heads, 0.0 for the others, null unprofiled."""
    ranked = ranking(scores, tie_breaks)
    full = set(ranked[: full_head_count(retention, len(ranked))])
    heads = _binary(scores, full)
    return HeadBudgets(heads=heads, retention_realised=mean_budget(heads))


def preset_budgets(scores: Scores, statistic: str) -> dict[str, HeadBudgets]:
    """Budgets at every preset, ranked by one statistic, ties broken by the other statistics."""
    present = scores.statistics()
    others = [matrix for name, matrix in present.items() if name != statistic]
    return {retention_key(r): allocate(present[statistic], r, others) for r in PRESETS}


def effective_retention(
    retention: float, sink_tokens: int, recent_tokens: int, context_tokens: int, output_tokens: float = 0
) -> float:
    """Share of the cache kept at a context length, what trimmed heads keep counted.

    r + (1 - r) * min(1, (sink + recent + output) / n): trimmed heads hold sinks, window and, where the window is
    anchored, the ``output_tokens`` among the n, however long the prompt is. Raises InputError for a context of no
    tokens, or of less than its output.
    """
    if context_tokens < 1:
        raise InputError(f"context of {context_tokens} tokens; give at least 1")
    if not 0 <= output_tokens < context_tokens:
        raise InputError(f"{output_tokens:g} of {context_tokens} tokens are output; give fewer, but at least 0")
    kept = sink_tokens + recent_tokens + output_tokens
    return retention + (1.0 - retention) * min(1.0, kept / context_tokens)


@dataclass(frozen=True)
class Constraints:
    """What an engine's layout asks of the choice of full heads. The default asks nothing.

    floor: full heads that every profiled layer keeps at least.
    tensor_parallel_size: t ranks; KV heads are dealt to them in order, G/t each. Every rank builds the same cache
        layout, so every rank must hold the same number of full heads of a layer. With t > G each rank holds one
        replicated head, so a layer is full or trimmed as a whole; t = G comes to the same.
    pipeline_stages: layers of each pipeline stage. A stage holds whole layers and has its own pool, and the tightest
        pool bounds all, so the stages' numbers of full heads are kept as near to equal as their layers allow.
    classes: different shares that graded heads may keep; each is a cache group of its own.
    """

    floor: int = 0
    tensor_parallel_size: int = 1
    pipeline_stages: tuple[int, ...] = ()
    classes: int = DEFAULT_CLASSES


UNCONSTRAINED = Constraints()


@dataclass(frozen=True)
class Allocation:
    """Budgets under constraints, and what the constraints cost.

    The cost is counted against the unconstrained choice of as many heads: ``heads_exchanged`` of its heads had to
    be exchanged, and ``score_share`` of its summed score is kept. ``reason`` says why the choice is not simply the
    best heads at the asked retention; null where it is.
    """

    budgets: HeadBudgets
    retention_asked: float
    full_heads: int
    heads: int
    reason: str | None
    heads_exchanged: int
    score_share: float
    stage_full_heads: tuple[int, ...]


def pipeline_split(layers: int, stages: int) -> tuple[int, ...]:
    """Layers of each stage as vLLM splits them: evenly, the remainder to the stages before the last one.

    Source: vllm.distributed.utils.get_pp_indices, without VLLM_PP_LAYER_PARTITION. Raises InputError.
    """
    if not 1 <= stages <= layers:
        raise InputError(f"{stages} pipeline stages for {layers} layers; give 1 to {layers}")
    share, remainder = divmod(layers, stages)
    first = stages - 1 - remainder
    return tuple(share + (first <= stage < stages - 1) for stage in range(stages))


def allocate_within(
    scores: Matrix, retention: float, constraints: Constraints = UNCONSTRAINED, tie_breaks: Sequence[Matrix] = ()
) -> Allocation:
    """Budgets at the feasible retention nearest to the asked one (the higher of two equally near).

    Heads are admitted in units, the smallest steps that keep the ranks of a layer equal, best summed score first, and
    a retention takes the first units of that order. So a head that is full at some retention is full at every higher
    one, and without pipeline stages the summed score is the highest that the constraints allow. Stages take turns:
    the one with the fewest full heads admits next. Raises InputError for constraints that no retention can meet.
    """
    ranked = ranking(scores, tie_breaks)
    if not ranked:
        raise InputError("no layer is profiled, so there is nothing to allocate")
    asked_heads = full_head_count(retention, len(ranked))
    units = _units(scores, constraints, tie_breaks)
    unit_heads = len(next(iter(units.values()))[0])
    floor_units = _floor_units(constraints, units)
    stages = _stages(constraints, len(scores))
    order = _admission_order(units, floor_units, stages, (scores, *tie_breaks))

    nearest = math.floor(round(retention * len(ranked) / unit_heads, 9) + 0.5)
    least = floor_units * len(units)
    taken = min(max(nearest, least), len(order))
    full = {place for unit in order[:taken] for place in unit}
    reason = _reason(asked_heads, len(full), unit_heads, constraints, at_floor=taken == least and nearest < least)
    return _costed(scores, retention, full, ranked, stages, reason)


def as_given(
    scores: Matrix, retention: float, given: HeadBudgets, tie_breaks: Sequence[Matrix] = (), reason: str | None = None
) -> Allocation:
    """Budgets that were chosen elsewhere, kept as they are, with their cost against the choice by score."""
    full = full_places(given.heads)
    found = _costed(scores, retention, full, ranking(scores, tie_breaks), [range(len(scores))], reason)
    return replace(found, budgets=given)


def satisfies(heads: Matrix, constraints: Constraints) -> bool:
    """Whether whole heads [L][G] keep to the floor and give every rank equally many full heads of each layer.

    The balance of pipeline stages is a preference of ``allocate_within`` and not asked here. Raises InputError for
    ranks that the heads cannot be dealt to.
    """
    share = len(heads[0]) // ranks(constraints, len(heads[0]))
    for row in heads:
        if row[0] is None:
            continue
        full = [value == 1.0 for value in row]
        per_rank = {sum(full[first : first + share]) for first in range(0, len(full), share)}
        if len(per_rank) > 1 or sum(full) < constraints.floor:
            return False
    return True


def heads_that_differ(one: Matrix, other: Matrix) -> int:
    """How many heads are full in one choice only; two heads that changed places count once."""
    first, second = full_places(one), full_places(other)
    return max(len(first - second), len(second - first))


def full_places(heads: Matrix) -> set[Place]:
    """Heads of [L][G] that keep the whole context."""
    return {(layer, head) for layer, row in enumerate(heads) for head, value in enumerate(row) if value == 1.0}


def _costed(
    scores: Matrix, retention: float, full: set[Place], ranked: list[Place], stages: list[range], reason: str | None
) -> Allocation:
    """The allocation that makes these heads full, compared with the best-ranked heads of the same number."""
    free_choice = ranked[: len(full)]
    best = _score_sum(scores, free_choice)
    heads = _binary(scores, full)
    return Allocation(
        budgets=HeadBudgets(heads=heads, retention_realised=mean_budget(heads)),
        retention_asked=retention,
        full_heads=len(full),
        heads=len(ranked),
        reason=reason,
        heads_exchanged=len(full.difference(free_choice)),
        score_share=_score_sum(scores, full) / best if best > 0 else 1.0,
        stage_full_heads=tuple(sum(layer in stage for layer, _ in full) for stage in stages),
    )


def _binary(scores: Matrix, full: Set[Place]) -> Matrix:
    return [
        [None if score is None else float((layer, head) in full) for head, score in enumerate(row)]
        for layer, row in enumerate(scores)
    ]


def _score_sum(scores: Matrix, places: Iterable[Place]) -> float:
    return math.fsum(scores[layer][head] or 0.0 for layer, head in places)


def ranks(constraints: Constraints, kv_heads: int) -> int:
    """Ranks that hold different heads, min(t, G). Raises InputError where t ranks cannot share G heads evenly."""
    size = constraints.tensor_parallel_size
    if size < 1 or (kv_heads % size and size % kv_heads):
        raise InputError(
            f"tensor-parallel size {size} does not deal {kv_heads} KV heads evenly; use a divisor or a multiple"
        )
    return min(size, kv_heads)


def _units(scores: Matrix, constraints: Constraints, tie_breaks: Sequence[Matrix]) -> dict[int, list[Unit]]:
    """By profiled layer, the steps in which it can gain full heads, best first: one head on every rank."""
    kv_heads = len(scores[0])
    share = kv_heads // ranks(constraints, kv_heads)
    matrices = (scores, *tie_breaks)
    found: dict[int, list[Unit]] = {}
    for layer, row in enumerate(scores):
        if row[0] is None:
            continue
        # each rank's heads of this layer, its best first; a step takes the next one of every rank
        dealt = [[(layer, head) for head in range(first, first + share)] for first in range(0, kv_heads, share)]
        dealt = [sorted(own, key=lambda place: (_key(matrices, (place,)), place)) for own in dealt]
        found[layer] = [tuple(step) for step in zip(*dealt, strict=True)]
    return found


def _floor_units(constraints: Constraints, units: dict[int, list[Unit]]) -> int:
    some_layer = next(iter(units.values()))
    unit_heads = len(some_layer[0])
    if not 0 <= constraints.floor <= unit_heads * len(some_layer):
        raise InputError(
            f"a floor of {constraints.floor} full heads in layers of {unit_heads * len(some_layer)} KV heads"
        )
    return math.ceil(constraints.floor / unit_heads)


def _stages(constraints: Constraints, layers: int) -> list[range]:
    sizes = constraints.pipeline_stages or (layers,)
    if min(sizes) < 1 or sum(sizes) != layers:
        raise InputError(f"pipeline stages of {', '.join(map(str, sizes))} layers do not add up to {layers} layers")
    return [range(sum(sizes[:i]), sum(sizes[: i + 1])) for i in range(len(sizes))]


def _admission_order(
    units: dict[int, list[Unit]], floor_units: int, stages: list[range], matrices: Sequence[Matrix]
) -> list[Unit]:
    """All units in the order in which a rising retention admits them; each layer's floor comes first."""
    # every layer's floor comes first, whatever its scores
    order = [unit for steps in units.values() for unit in steps[:floor_units]]
    admitted = [floor_units * sum(layer in units for layer in stage) for stage in stages]
    # one heap for each stage: the next unit of each of its layers, best score first
    waiting: list[list[tuple[tuple[float, ...], int, int]]] = [
        [
            (_key(matrices, units[layer][floor_units]), layer, floor_units)
            for layer in stage
            if floor_units < len(units.get(layer, ()))
        ]
        for stage in stages
    ]
    for heap in waiting:
        heapq.heapify(heap)
    while any(waiting):
        # the stage with the fewest full heads admits next; its layer then offers its following unit
        stage = min((i for i, heap in enumerate(waiting) if heap), key=lambda i: (admitted[i], waiting[i][0]))
        _, layer, step = heapq.heappop(waiting[stage])
        order.append(units[layer][step])
        admitted[stage] += 1
        if step + 1 < len(units[layer]):
            heapq.heappush(waiting[stage], (_key(matrices, units[layer][step + 1]), layer, step + 1))
    return order


def _reason(asked: int, full: int, unit_heads: int, constraints: Constraints, *, at_floor: bool) -> str | None:
    """Why the number of full heads is not the asked one, as one phrase; None where it is."""
    if full == asked:
        return None
    if at_floor:
        return f"{constraints.floor} full heads in every layer need {full} heads, {asked} were asked for"
    return (
        f"tensor-parallel size {constraints.tensor_parallel_size} makes a layer's heads full {unit_heads} at a time; "
        f"{full} heads are nearest to the {asked} asked for"
    )


def _key(matrices: Sequence[Matrix], places: Iterable[Place]) -> tuple[float, ...]:
    """Sort key of heads taken together: smaller is more important."""
    places = list(places)
    return tuple(-_score_sum(matrix, places) for matrix in matrices)
