"""Allocation: exact counts, order, ties, every constraint, and the reported cost; checked against brute force."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvprofile.budget.allocate import (
    Constraints,
    allocate,
    allocate_within,
    effective_retention,
    full_head_count,
    pipeline_split,
    satisfies,
)
from kvprofile.budget.profile import Matrix
from kvprofile.errors import InputError

RETENTIONS = st.floats(0.001, 1.0)
quick = settings(max_examples=80, deadline=None)


@st.composite
def matrices(draw, max_layers=5, sizes=(1, 2, 4, 8)) -> Matrix:
    """Scores with many ties, some layers sliding."""
    layers, kv_heads = draw(st.integers(1, max_layers)), draw(st.sampled_from(sizes))
    sliding = draw(st.sets(st.integers(0, layers - 1), max_size=layers - 1))
    value = st.sampled_from([0.0, 0.1, 0.25, 0.7, 1.0])
    row = st.lists(value, min_size=kv_heads, max_size=kv_heads)
    return [[None] * kv_heads if layer in sliding else draw(row) for layer in range(layers)]


@st.composite
def cases(draw, max_layers=5, sizes=(1, 2, 4, 8)) -> tuple[Matrix, Constraints]:
    scores = draw(matrices(max_layers, sizes))
    kv_heads, layers = len(scores[0]), len(scores)
    ranks = draw(st.sampled_from([1, 2, 4, 8]))
    cuts = draw(st.sets(st.integers(1, layers - 1), max_size=3)) if layers > 1 else set()
    edges = [0, *sorted(cuts), layers]
    return scores, Constraints(
        floor=draw(st.integers(0, kv_heads)),
        tensor_parallel_size=ranks,
        pipeline_stages=tuple(b - a for a, b in itertools.pairwise(edges)) if cuts else (),
    )


def full(heads: Matrix) -> set[tuple[int, int]]:
    return {(layer, head) for layer, row in enumerate(heads) for head, value in enumerate(row) if value == 1.0}


def profiled(scores: Matrix) -> list[int]:
    return [layer for layer, row in enumerate(scores) if row[0] is not None]


def unit_size(kv_heads: int, constraints: Constraints) -> int:
    """The smallest step of a layer's count: one head on every rank."""
    return min(constraints.tensor_parallel_size, kv_heads)


@quick
@given(matrices(), RETENTIONS)
def test_without_constraints_the_count_is_exact_and_nothing_is_lost(scores, retention):
    found = allocate_within(scores, retention)
    assert found.budgets == allocate(scores, retention)
    assert found.full_heads == full_head_count(retention, found.heads) == len(full(found.budgets.heads))
    assert (found.reason, found.heads_exchanged, found.score_share) == (None, 0, 1.0)
    assert all((row[0] is None) == (score[0] is None) for row, score in zip(found.budgets.heads, scores, strict=True))


@quick
@given(cases(), RETENTIONS)
def test_every_constraint_holds_and_the_nearest_feasible_count_is_taken(case, retention):
    scores, constraints = case
    found = allocate_within(scores, retention, constraints)
    kv_heads, layers = len(scores[0]), profiled(scores)
    ranks = min(constraints.tensor_parallel_size, kv_heads)
    share = kv_heads // ranks
    for layer in layers:
        row = found.budgets.heads[layer]
        assert sum(row) >= constraints.floor
        assert len({sum(row[first : first + share]) for first in range(0, kv_heads, share)}) == 1
    assert satisfies(found.budgets.heads, constraints)

    unit = unit_size(kv_heads, constraints)
    least = len(layers) * math.ceil(constraints.floor / unit) * unit
    feasible = range(least, len(layers) * kv_heads + 1, unit)
    wanted = retention * found.heads
    assert found.full_heads in feasible
    assert abs(found.full_heads - wanted) <= min(abs(count - wanted) for count in feasible) + 1e-6
    assert (found.reason is None) == (found.full_heads == full_head_count(retention, found.heads))
    assert found.budgets.retention_realised == pytest.approx(found.full_heads / found.heads)
    assert 0.0 <= found.score_share <= 1.0 + 1e-12
    assert sum(found.stage_full_heads) == found.full_heads


@quick
@given(cases(), RETENTIONS, RETENTIONS)
def test_a_head_that_is_full_stays_full_at_a_higher_retention(case, one, other):
    scores, constraints = case
    low, high = (full(allocate_within(scores, r, constraints).budgets.heads) for r in sorted((one, other)))
    assert low <= high


@quick
@given(cases(), RETENTIONS)
def test_stages_are_balanced_as_far_as_their_layers_allow(case, retention):
    scores, constraints = case
    found = allocate_within(scores, retention, constraints)
    unit = unit_size(len(scores[0]), constraints)
    sizes = constraints.pipeline_stages or (len(scores),)
    firsts = [sum(sizes[:i]) for i in range(len(sizes))]
    layers = [[x for x in profiled(scores) if a <= x < a + size] for a, size in zip(firsts, sizes, strict=True)]
    floor = math.ceil(constraints.floor / unit) * unit
    for count, own in zip(found.stage_full_heads, layers, strict=True):
        above_floor = count > floor * len(own)
        others = zip(found.stage_full_heads, layers, strict=True)
        open_elsewhere = [n for n, theirs in others if n < len(theirs) * len(scores[0])]
        if above_floor and open_elsewhere:  # it took a unit that the emptiest open stage had a right to
            assert count - min(open_elsewhere) <= unit


@settings(max_examples=60, deadline=None)
@given(cases(max_layers=2, sizes=(1, 2, 4)), RETENTIONS)
def test_no_choice_of_as_many_heads_under_the_constraints_scores_higher(case, retention):
    scores, constraints = case
    if constraints.pipeline_stages:
        constraints = Constraints(**{**vars(constraints), "pipeline_stages": ()})
    found = allocate_within(scores, retention, constraints)
    kv_heads, layers = len(scores[0]), profiled(scores)
    ranks = min(constraints.tensor_parallel_size, kv_heads)
    share = kv_heads // ranks

    def allowed(heads: tuple[int, ...]) -> bool:
        per_rank = {sum(head // share == rank for head in heads) for rank in range(ranks)}
        return len(per_rank) == 1 and len(heads) >= constraints.floor

    subsets = [c for n in range(kv_heads + 1) for c in itertools.combinations(range(kv_heads), n) if allowed(c)]
    best = max(
        math.fsum(scores[layer][head] for layer, heads in zip(layers, choice, strict=True) for head in heads)
        for choice in itertools.product(subsets, repeat=len(layers))
        if sum(map(len, choice)) == found.full_heads
    )
    assert math.fsum(scores[layer][head] for layer, head in full(found.budgets.heads)) == pytest.approx(best)


def test_equal_scores_are_taken_in_order_of_layer_and_head():
    found = allocate([[0.5] * 4 for _ in range(3)], 0.5).heads
    assert found == [[1.0] * 4, [1.0, 1.0, 0.0, 0.0], [0.0] * 4]


@quick
@given(matrices(), RETENTIONS)
def test_a_second_statistic_moves_only_tied_heads(scores, retention):
    reverse = [[None if value is None else float(h) for h, value in enumerate(row)] for row in scores]
    plain, tied = (full(allocate(scores, retention, extra).heads) for extra in ((), (reverse,)))
    assert sorted(scores[a][b] for a, b in plain) == sorted(scores[a][b] for a, b in tied)


def test_a_floor_that_needs_more_heads_than_asked_is_reported():
    found = allocate_within([[0.9, 0.8, 0.7, 0.6]] * 4, 0.1, Constraints(floor=1))
    assert found.full_heads == 4
    assert found.reason == "1 full heads in every layer need 4 heads, 2 were asked for"


def test_one_head_per_rank_makes_layers_full_or_trimmed_as_a_whole_and_so_does_replication():
    scores = [[0.9, 0.1, 0.1, 0.1], [0.5, 0.5, 0.5, 0.5], [0.2, 0.2, 0.2, 0.2]]
    for size in (4, 8, 16):
        found = allocate_within(scores, 0.5, Constraints(tensor_parallel_size=size))
        assert found.budgets.heads == [[1.0] * 4, [1.0] * 4, [0.0] * 4]
        assert "4 at a time" in found.reason


def test_ranks_with_the_best_heads_of_a_layer_give_some_up():
    scores = [[0.9, 0.8, 0.1, 0.1], [0.7, 0.1, 0.1, 0.6]]
    found = allocate_within(scores, 0.5, Constraints(tensor_parallel_size=2))
    assert found.budgets.heads == [[1.0, 0.0, 1.0, 0.0], [1.0, 0.0, 0.0, 1.0]]
    assert found.heads_exchanged == 1
    assert found.score_share == pytest.approx(2.3 / 3.0)


@pytest.mark.parametrize(
    ("layers", "stages", "split"),
    [(28, 1, (28,)), (28, 4, (7, 7, 7, 7)), (32, 3, (11, 11, 10)), (30, 4, (7, 8, 8, 7)), (5, 5, (1,) * 5)],
)
def test_pipeline_split_is_vllms(layers, stages, split):
    assert pipeline_split(layers, stages) == split


@pytest.mark.parametrize(
    ("constraints", "words"),
    [
        (Constraints(tensor_parallel_size=3), "tensor-parallel size 3 does not deal 4 KV heads evenly"),
        (Constraints(tensor_parallel_size=0), "tensor-parallel size 0"),
        (Constraints(floor=5), "floor of 5"),
        (Constraints(floor=-1), "floor of -1"),
        (Constraints(pipeline_stages=(1, 2)), "do not add up to 2 layers"),
    ],
)
def test_constraints_that_nothing_can_meet_are_refused(constraints, words):
    with pytest.raises(InputError, match=words):
        allocate_within([[0.1, 0.2, 0.3, 0.4]] * 2, 0.5, constraints)


@pytest.mark.parametrize("retention", [0.0, -0.1, 1.01, float("nan"), float("inf")])
def test_retentions_outside_the_range_are_refused(retention):
    with pytest.raises(InputError, match=r"outside \(0, 1\]"):
        allocate_within([[0.1, 0.2]], retention)


def test_stages_and_unprofiled_models_are_refused_by_name():
    with pytest.raises(InputError, match="5 pipeline stages for 4 layers"):
        pipeline_split(4, 5)
    with pytest.raises(InputError, match="no layer is profiled"):
        allocate_within([[None, None]], 0.5)


@given(RETENTIONS, st.integers(0, 500), st.integers(1, 500), st.integers(1, 100_000))
def test_effective_retention_lies_between_the_retention_and_one(retention, sink, recent, context):
    found = effective_retention(retention, sink, recent, context)
    assert retention <= found <= 1.0 + 1e-12
    if context <= sink + recent:
        assert found == pytest.approx(1.0)


def test_effective_retention_counts_the_output_that_trimmed_heads_keep():
    assert effective_retention(0.5, 128, 256, 9500, 500) == pytest.approx(0.5 + 0.5 * (384 + 500) / 9500)
    with pytest.raises(InputError, match="9500 of 9500 tokens are output"):
        effective_retention(0.5, 128, 256, 9500, 9500)
