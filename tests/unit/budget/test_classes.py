"""Shares of heads rounded to classes."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvprofile.budget.classes import classed, unit

shares = st.floats(0, 1).map(lambda value: round(value, 3))
matrices = st.integers(1, 4).flatmap(
    lambda heads: st.lists(st.lists(shares, min_size=heads, max_size=heads), min_size=1, max_size=9)
)


def flat(matrix):
    return [value for row in matrix for value in row if value is not None]


def least_error(values, count):
    """The least squared distance to class means, over every way to cut the sorted values into classes that fill."""
    values = sorted(values)
    if len(set(values)) <= count:
        return 0.0
    best, size = math.inf, unit(len(values))
    for number in range(1, count + 1):
        for cuts in itertools.combinations(range(size, len(values), size), number - 1):
            parts = [values[a:b] for a, b in itertools.pairwise((0, *cuts, len(values)))]
            best = min(best, sum((v - math.fsum(part) / len(part)) ** 2 for part in parts for v in part))
    return best


@given(matrices, st.integers(1, 4))
def test_classes_are_few_keep_the_mean_and_move_shares_least(matrix, count):
    found = classed(matrix, count)
    before, after = flat(matrix), flat(found)
    assert len(set(after)) <= count
    assert math.fsum(after) == pytest.approx(math.fsum(before), abs=1e-9)
    few = len(set(before)) <= count
    assert few or all(after.count(value) % unit(len(after)) == 0 for value in set(after))
    assert sum((a - b) ** 2 for a, b in zip(before, after, strict=True)) == pytest.approx(
        least_error(before, count), abs=1e-9
    )


@given(matrices, st.integers(1, 4))
def test_heads_keep_their_order(matrix, count):
    pairs = sorted(zip(flat(matrix), flat(classed(matrix, count)), strict=True))
    assert all(one[1] <= other[1] + 1e-12 for one, other in itertools.pairwise(pairs))


@pytest.mark.parametrize(
    ("heads", "ranks", "expected"), [(90, 1, 6), (384, 1, 24), (384, 8, 24), (24, 1, 2), (7, 1, 1)]
)
def test_a_unit_is_about_a_sixteenth_of_the_heads_of_every_rank(heads, ranks, expected):
    assert unit(heads, ranks) == expected


@given(st.lists(st.lists(shares, min_size=4, max_size=4), min_size=1, max_size=12), st.sampled_from([1, 2, 4]))
def test_every_rank_has_equally_many_heads_of_a_class_in_each_layer(matrix, ranks):
    found = classed(matrix, 3, ranks)
    for row in found:
        each = len(row) // ranks
        held = [sorted(row[first : first + each]) for first in range(0, len(row), each)]
        assert all(one == held[0] for one in held)
    assert math.fsum(flat(found)) == pytest.approx(math.fsum(flat(matrix)), abs=1e-9)


def test_layers_without_budgets_stay_without():
    assert classed([[None, None], [0.1, 0.9]], 1) == [[None, None], [0.5, 0.5]]


def test_no_class_and_ranks_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match="at least one"):
        classed([[0.5]], 0)
    with pytest.raises(ValueError, match="2 ranks do not share 3 heads"):
        classed([[0.1, 0.2, 0.3]], 2, 2)


def test_heads_of_equal_shares_are_dealt_to_all_ranks():
    """A border falls between four heads of one layer and share, two of each rank."""
    matrix = [[0.5, 0.5, 0.5, 0.5], [0.1, 0.1, 0.1, 0.1], [0.9, 0.9, 0.3, 0.3]] + [[0.5] * 4] * 8
    for row in classed(matrix, 2, 2):
        assert sorted(row[:2]) == sorted(row[2:])
