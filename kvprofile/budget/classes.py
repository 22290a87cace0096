"""Classes of heads: shares rounded to a few values, so that heads of a class can share one cache group of an engine.

The classes are the ones that move shares least (optimal one-dimensional k-means; Wang and Song, The R Journal 3/2,
2011), and a class has the mean of its heads, so the bytes held stay what the shares say. Standard library only.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

from kvprofile.budget.profile import Matrix

DEFAULT_CLASSES = 4
"""Classes unless told otherwise: docs/studies/graded-budgets.md."""


def classed(shares: Matrix, count: int = DEFAULT_CLASSES, ranks: int = 1) -> Matrix:
    """Shares [L][G] with at most ``count`` different values and the same mean; null stays null.

    With ``ranks`` that hold G/ranks heads of every layer each, all ranks get equally many heads of a class in every
    layer: heads of one place in their rank's order share their mean first. Raises ValueError for no class, or ranks
    that do not divide G.
    """
    if count < 1:
        raise ValueError(f"{count} classes of heads; at least one is needed")
    levelled = _levelled(shares, ranks)
    values = sorted(value for row in levelled for value in row if value is not None)
    if len(set(values)) <= count:
        return levelled
    class_of: dict[float, float] = {}
    for start, stop in itertools.pairwise(_borders(values, count)):
        mean = math.fsum(values[start:stop]) / (stop - start)
        class_of |= dict.fromkeys(values[start:stop], mean)
    return [[None if value is None else class_of[value] for value in row] for row in levelled]


def _levelled(shares: Matrix, ranks: int) -> Matrix:
    """Shares of which every rank holds the same in each layer."""
    if ranks == 1:
        return [list(row) for row in shares]
    found: Matrix = []
    for row in shares:
        if len(row) % ranks:
            raise ValueError(f"{ranks} ranks do not share {len(row)} heads evenly")
        if row[0] is None:
            found.append(list(row))
            continue
        each = len(row) // ranks
        held = [sorted(range(first, first + each), key=lambda head: -(row[head] or 0.0))
                for first in range(0, len(row), each)]  # fmt: skip
        level = list(row)
        for heads in zip(*held, strict=True):
            mean = math.fsum(row[head] or 0.0 for head in heads) / ranks
            for head in heads:
                level[head] = mean
        found.append(level)
    return found


def _borders(values: Sequence[float], count: int) -> list[int]:
    """Where the classes of sorted values begin, and where the last ends; equal values stay together.

    Dynamic programming over how many values the first k classes take.
    """
    points = [(value, len(list(group))) for value, group in itertools.groupby(values)]
    weight, first, second = [0.0], [0.0], [0.0]  # running sums of 1, x and x^2
    for value, times in points:
        weight.append(weight[-1] + times)
        first.append(first[-1] + times * value)
        second.append(second[-1] + times * value * value)

    def cost(start: int, stop: int) -> float:
        """Squared distance of points [start, stop) to their mean."""
        total = first[stop] - first[start]
        return second[stop] - second[start] - total * total / (weight[stop] - weight[start])

    size = len(points)
    best = [0.0, *(cost(0, stop) for stop in range(1, size + 1))]
    cuts: list[list[int]] = []
    for _ in range(1, count):
        following, cut = [0.0] * (size + 1), [0] * (size + 1)

        def solve(low: int, high: int, left: int, right: int) -> None:
            """The best last border of every stop in [low, high], which lies in [left, right]: borders only rise."""
            if low > high:
                return
            stop = (low + high) // 2
            lowest, where = min(
                (best[start] + cost(start, stop), start)  # noqa: B023 - used at once
                for start in range(left, min(stop - 1, right) + 1)
            )
            following[stop], cut[stop] = lowest, where  # noqa: B023 - used at once
            solve(low, stop - 1, left, where)
            solve(stop + 1, high, where, right)

        solve(1, size, 0, size)
        best = following
        cuts.append(cut)
    borders = [size]
    for cut in reversed(cuts):
        borders.append(cut[borders[-1]])
    # from points to values, an empty class left out
    taken = list(itertools.accumulate((times for _, times in points), initial=0))
    return sorted({taken[border] for border in (*borders, 0)})
