"""Intervals for shares, means, differences and ratios over questions of which several share a context, and over runs.

All intervals are 95 %. Questions about one context are not independent, so the bootstrap draws whole exercises, within
strata, and compares two variants on the same draws. An interval of a share or of a comparison of shares is never
narrower than that of as many independent questions: the bootstrap alone would call ten right answers of ten a
certainty. What is counted, and for whom, is decided elsewhere.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

Z = 1.959963984540054
"""Quantile of the normal distribution that leaves 2.5 % above it."""

DRAWS = 2000

Values: TypeAlias = Sequence[float] | Sequence[Sequence[float]] | npt.NDArray[np.float64]
"""One number for each question, or one such row for each seed of a variant that was drawn several times."""


class Interval(NamedTuple):
    """The bounds of a 95 % interval."""

    low: float
    high: float


_UNBOUNDED = Interval(-math.inf, math.inf)


@dataclass(frozen=True)
class Estimate:
    """A value and its 95 % interval; None where it cannot be known: nothing to divide by, or a single exercise."""

    value: float | None
    low: float | None
    high: float | None


def wilson(successes: float, count: int) -> Interval:
    """Score interval of a share of ``count`` independent trials (Wilson 1927); [0, 1] of none.

    ``successes`` may be a sum of values in [0, 1], which vary less than yes and no: the interval then is too wide.
    Raises ValueError for more successes than trials.
    """
    if not 0 <= successes <= count:
        raise ValueError(f"{successes} successes of {count}")
    if count == 0:
        return Interval(0.0, 1.0)
    share = successes / count
    middle = share + Z * Z / (2 * count)
    reach = Z * math.sqrt(share * (1 - share) / count + Z * Z / (4 * count * count))
    low, high = (middle - reach) / (1 + Z * Z / count), (middle + reach) / (1 + Z * Z / count)
    return Interval(0.0 if successes == 0 else max(0.0, low), 1.0 if successes == count else min(1.0, high))


def paired_difference(gained: float, lost: float, count: int) -> Interval:
    """Interval of a difference of two shares over the same ``count`` independent questions (Bonett and Price 2012).

    ``gained`` and ``lost`` count questions that only one of the two has right; sums of differences will do. With no
    such question it still is as wide as ``count`` allows. Raises ValueError for more than ``count`` of them.
    """
    if gained < 0 or lost < 0 or gained + lost > count:
        raise ValueError(f"{gained} gained and {lost} lost of {count}")
    up, down = (gained + 1) / (count + 2), (lost + 1) / (count + 2)
    reach = Z * math.sqrt((up + down - (up - down) ** 2) / (count + 2))
    return Interval(max(-1.0, up - down - reach), min(1.0, up - down + reach))


def student_mean(values: Sequence[float]) -> Estimate:
    """The mean of independent runs with Student's interval; none for fewer than two, which show no spread."""
    if not values:
        return Estimate(None, None, None)
    mean = math.fsum(values) / len(values)
    if len(values) < 2:
        return Estimate(mean, None, None)
    variance = math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1)
    reach = _student(len(values) - 1) * math.sqrt(variance / len(values))
    return Estimate(mean, mean - reach, mean + reach)


def _student(freedom: int) -> float:
    """The 97.5 % quantile of Student's t: exact for one and two degrees of freedom, within 0.5 % beyond."""
    if freedom == 1:
        return math.tan(0.475 * math.pi)
    if freedom == 2:
        return 0.95 * math.sqrt(2 / 0.0975)
    return _expansion(freedom)


def bootstrap_mean(exercises: Sequence[Sequence[float]]) -> Interval | None:
    """Interval of the mean over all values in [0, 1], given by exercise; None for fewer than two exercises."""
    names = [index for index, values in enumerate(exercises) for _ in values]
    found = Bootstrap(names).share([value for values in exercises for value in values])
    return None if found.low is None or found.high is None else Interval(found.low, found.high)


class Bootstrap:
    """Draws of exercises that all estimates of one evaluation share.

    ``exercises`` names the exercise of each question, ``strata`` what is fixed by design (task, length). A stratum of
    n exercises is resampled by n - 1 draws, scaled to n (Rao and Wu 1988), which keeps the variance right where few
    exercises are left; strata of one are put together. Percentiles lie further out with few exercises, as Student's
    t does (Hesterberg 2015). The mean over several seeds carries an error of its own, drawn from Student's t; one
    seed stands for itself.
    """

    def __init__(
        self,
        exercises: Sequence[Hashable],
        strata: Sequence[Hashable] | None = None,
        draws: int = DRAWS,
        seed: int = 0,
    ) -> None:
        if not exercises:
            raise ValueError("nothing to resample")
        order = {name: number for number, name in enumerate(dict.fromkeys(exercises))}
        self.draws, self.seed = draws, seed
        self.index = np.array([order[name] for name in exercises])
        self.counts = np.bincount(self.index).astype(float)
        stratum_of = dict(zip(exercises, strata or [None] * len(exercises), strict=True))
        members: dict[Hashable, list[int]] = {}
        for name, number in order.items():
            members.setdefault(stratum_of[name], []).append(number)
        pooled = _pooled(list(members.values())) if len(order) > 1 else []
        self.weights = self._weights(pooled) if pooled else None
        self.totals = self.weights @ self.counts if self.weights is not None else self.counts
        self.tail = _tail(len(order) - len(pooled)) if pooled else 0.025

    def share(self, values: Values, trials: int | None = None) -> Estimate:
        """Mean of values in [0, 1]; with several seeds, over questions and seeds.

        The interval is never narrower than that of as many independent ``trials``: one for each question, or the tokens
        of their answers where the values are shares of tokens.
        """
        rows = self._rows(values)
        trials = rows.shape[1] if trials is None else trials
        floor = wilson(float(np.clip(rows.mean(0), 0.0, 1.0).mean()) * trials, trials)
        return _estimate(float(rows.mean()), self._draw(rows), self.tail, floor, Interval(0.0, 1.0))

    def mean(self, values: Values) -> Estimate:
        """Mean of any values, by the bootstrap alone."""
        rows = self._rows(values)
        return _estimate(float(rows.mean()), self._draw(rows), self.tail)

    def difference(self, ours: Values, theirs: Values) -> Estimate:
        """Mean of ``ours`` less the mean of ``theirs``, both in [0, 1] and about the same questions."""
        first, second = self._rows(ours), self._rows(theirs)
        floor = self._floor(first, second)
        drawn = None if self.weights is None else self._shares(first) - self._shares(second)
        return _estimate(float(first.mean() - second.mean()), drawn, self.tail, floor, Interval(-1.0, 1.0))

    def ratio(self, ours: Values, theirs: Values) -> Estimate:
        """Mean of ``ours`` as a share of the mean of ``theirs``; unknown where a draw of ``theirs`` has mean zero."""
        first, second = self._rows(ours), self._rows(theirs)
        whole = float(second.mean())
        if whole <= 0:
            return Estimate(None, None, None)
        value = float(first.mean()) / whole
        if self.weights is None:
            return Estimate(value, None, None)
        above, below = self._shares(first), self._shares(second)
        if below.min() <= 0:
            return Estimate(value, None, None)
        floor = self._floor(first, second)
        floor = Interval(1 + floor.low / whole, 1 + floor.high / whole)
        return _estimate(value, above / below, self.tail, floor, Interval(0.0, math.inf))

    def quotient(self, ours: Values, theirs: Values) -> Estimate:
        """Mean of ``ours`` over the mean of ``theirs``, of values that have no upper bound, by the bootstrap alone.

        Unknown where a draw of ``theirs`` has a mean of zero or less.
        """
        first, second = self._rows(ours), self._rows(theirs)
        if second.mean() <= 0:
            return Estimate(None, None, None)
        above, below = self._draw(first), self._draw(second)
        drawn = above / below if above is not None and below is not None and below.min() > 0 else None
        return _estimate(float(first.mean() / second.mean()), drawn, self.tail)

    def _rows(self, values: Values) -> npt.NDArray[np.float64]:
        rows = np.atleast_2d(np.asarray(values, dtype=np.float64))
        if rows.shape[1] != len(self.index):
            raise ValueError(f"{rows.shape[1]} values for {len(self.index)} questions")
        return rows

    @staticmethod
    def _floor(first: npt.NDArray[np.float64], second: npt.NDArray[np.float64]) -> Interval:
        by_question = first.mean(0) - second.mean(0)
        gained, lost = by_question.clip(min=0).sum(), (-by_question).clip(min=0).sum()
        return paired_difference(float(gained), float(lost), len(by_question))

    def _draw(self, rows: npt.NDArray[np.float64]) -> npt.NDArray[np.float64] | None:
        """Means of the draws, [draws], of values [seeds, questions]."""
        if self.weights is None:
            return None
        sums = np.bincount(self.index, weights=rows.mean(0), minlength=len(self.counts))
        drawn = self.weights @ sums / self.totals
        seeds = len(rows)
        if seeds > 1:
            error = float(rows.mean(1).std(ddof=1)) / math.sqrt(seeds)
            drawn = drawn + error * np.random.default_rng((self.seed, seeds)).standard_t(seeds - 1, self.draws)
        return np.asarray(drawn)

    def _shares(self, rows: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """Means of the draws of values in [0, 1]: a seed's error leads no further."""
        drawn = self._draw(rows)
        if drawn is None:
            raise ValueError("there are no draws of a single exercise")
        return drawn.clip(0.0, 1.0)

    def _weights(self, strata: list[list[int]]) -> npt.NDArray[np.float64]:
        """How often each draw takes each exercise, [draws, exercises]."""
        generator = np.random.default_rng(self.seed)
        weights = np.empty((self.draws, len(self.counts)))
        for members in strata:
            weights[:, members] = _multinomial(generator, len(members), self.draws)
        return weights


def _multinomial(generator: np.random.Generator, count: int, draws: int) -> npt.NDArray[np.float64]:
    """[draws, count] weights of ``count - 1`` draws with replacement, scaled so that each row sums to ``count``."""
    drawn = generator.multinomial(count - 1, np.full(count, 1 / count), size=draws)
    return drawn.astype(np.float64) * (count / (count - 1))


def _pooled(strata: list[list[int]]) -> list[list[int]]:
    """Strata of at least two exercises each; those of one are put together, a last one into the largest."""
    large = [members for members in strata if len(members) > 1]
    alone = [number for members in strata if len(members) == 1 for number in members]
    if len(alone) == 1:
        largest = max(large, key=len)
        return [members + alone if members is largest else members for members in large]
    return [*large, alone] if alone else large


def _tail(freedom: int) -> float:
    """Share of the draws to leave out on each side: the normal tail beyond the 97.5 % quantile of Student's t.

    With one degree of freedom the quantile is 11 % too small.
    """
    return math.erfc(_expansion(freedom) / math.sqrt(2)) / 2


def _expansion(freedom: int) -> float:
    """The 97.5 % quantile of Student's t by the expansion in Abramowitz and Stegun, 26.7.5."""
    terms = (
        (Z**3 + Z) / 4,
        (5 * Z**5 + 16 * Z**3 + 3 * Z) / 96,
        (3 * Z**7 + 19 * Z**5 + 17 * Z**3 - 15 * Z) / 384,
        (79 * Z**9 + 776 * Z**7 + 1482 * Z**5 - 1920 * Z**3 - 945 * Z) / 92160,
    )
    return Z + math.fsum(term / freedom**power for power, term in enumerate(terms, 1))


def _estimate(
    value: float,
    drawn: npt.NDArray[np.float64] | None,
    tail: float,
    floor: Interval | None = None,
    bounds: Interval = _UNBOUNDED,
) -> Estimate:
    """The value with the percentiles of its draws, widened to ``floor`` and kept within ``bounds``."""
    if drawn is None:
        return Estimate(value, None, None)
    low, high = (float(bound) for bound in np.quantile(drawn, (tail, 1 - tail)))
    if floor is not None:
        low, high = min(low, floor.low), max(high, floor.high)
    return Estimate(value, max(low, bounds.low), min(high, bounds.high))
