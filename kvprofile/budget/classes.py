"""Classes of heads: shares rounded to a few values, so that heads of a class can share one cache group of an engine.

The classes are the ones that move shares least (optimal one-dimensional k-means; Wang and Song, The R Journal 3/2,
2011) among those whose sizes fill an engine's cache groups, and a class has the mean of its heads, so the bytes held
stay what the shares say. Standard library only.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

from kvprofile.budget.profile import Matrix

DEFAULT_CLASSES = 4
"""Classes unless told otherwise: docs/studies/graded-budgets.md."""

GROUPS = 16
"""Cache groups that all heads fill, about: more cost time in every step, fewer leave classes less choice."""


def classed(shares: Matrix, count: int = DEFAULT_CLASSES, ranks: int = 1) -> Matrix:
    """Shares [L][G] with at most ``count`` different values and the same mean; null stays null.

    A class has a multiple of :func:`unit` heads. With ``ranks`` that hold G/ranks heads of every layer each, all ranks
    get equally many heads of a class in every layer: heads of one place in their rank's order share their mean first.
    Raises ValueError for no class, or ranks that do not divide G.
    """
    if count < 1:
        raise ValueError(f"{count} classes of heads; at least one is needed")
    levelled = _levelled(shares, ranks)
    # heads of one layer and share stand together, one of each rank in turn, so that all ranks have them or none
    each = len(shares[0]) // ranks
    places = [
        (layer, head) for layer, row in enumerate(levelled) for head, value in enumerate(row) if value is not None
    ]
    order = sorted((levelled[layer][head] or 0.0, layer, head % each, head) for layer, head in places)
    values = [value for value, *_ in order]
    if len(set(values)) <= count:
        return levelled
    found = [list(row) for row in levelled]
    for start, stop in itertools.pairwise(_borders(values, count, unit(len(values), ranks))):
        mean = math.fsum(values[start:stop]) / (stop - start)
        for _, layer, _, head in order[start:stop]:
            found[layer][head] = mean
    return found


def unit(heads: int, ranks: int = 1) -> int:
    """Heads that a class has a multiple of: about a sixteenth of them all, of every rank equally many.

    An engine's cache groups are of one width, so classes whose sizes are multiples of one number fill theirs.
    """
    each = heads // ranks
    divisors = (number for number in range(1, each + 1) if each % number == 0)
    return ranks * min(divisors, key=lambda number: (abs(number - each / GROUPS), -number))


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


def _borders(values: Sequence[float], count: int, unit: int) -> list[int]:
    """Where the classes of sorted values begin, and where the last ends: at multiples of ``unit``.

    Dynamic programming over how many units the first k classes take.
    """
    first, second = ([0.0, *itertools.accumulate(v**power for v in values)] for power in (1, 2))

    def cost(start: int, stop: int) -> float:
        """Squared distance of units [start, stop) to their mean."""
        low, high = start * unit, stop * unit
        total = first[high] - first[low]
        return second[high] - second[low] - total * total / (high - low)

    units = len(values) // unit
    best = [0.0, *(cost(0, stop) for stop in range(1, units + 1))]
    cuts = []
    for _ in range(1, count):
        # the least cost of the first units with one class more, and where that class begins; one may be empty
        chosen = [
            min((best[start] + (cost(start, stop) if start < stop else 0.0), start) for start in range(stop + 1))
            for stop in range(units + 1)
        ]
        best = [cost_of for cost_of, _ in chosen]
        cuts.append([start for _, start in chosen])
    borders = [units]
    for cut in reversed(cuts):
        borders.append(cut[borders[-1]])
    return sorted({border * unit for border in (*borders, 0)})
