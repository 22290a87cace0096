"""Intervals: exact cases, cases at the edge, and how often they hold the truth in simulated evaluations."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest

from kvprofile.statistics import Bootstrap, Estimate, bootstrap_mean, paired_difference, wilson

SHARES = st.floats(0, 1).map(lambda value: round(value, 3))


def surely_above_zero(estimate):
    return estimate.low is not None and estimate.low > 0


@pytest.mark.parametrize(("hits", "count"), [(0, 7), (7, 7), (8, 10), (1, 1000), (999, 1000), (500, 1000)])
def test_wilson_equals_scipy(hits, count):
    expected = binomtest(hits, count).proportion_ci(method="wilson")
    assert wilson(hits, count) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_wilson_at_the_edges():
    assert wilson(0, 0) == (0.0, 1.0)
    assert wilson(0, 5).low == 0.0
    assert wilson(5, 5).high == 1.0
    assert json.dumps(wilson(0, 0)) == "[0.0, 1.0]"
    with pytest.raises(ValueError, match="6 successes of 5"):
        wilson(6, 5)


@pytest.mark.parametrize("probability", [0.02, 0.5, 0.97])
def test_wilson_holds_the_truth(probability):
    count = 60
    weights = [math.comb(count, k) * probability**k * (1 - probability) ** (count - k) for k in range(count + 1)]
    holds = [wilson(k, count).low <= probability <= wilson(k, count).high for k in range(count + 1)]
    assert sum(weight for weight, held in zip(weights, holds, strict=True) if held) > 0.93


def test_paired_difference():
    assert paired_difference(0, 0, 100) == pytest.approx((-0.0272, 0.0272), abs=1e-3)
    low, high = paired_difference(30, 5, 100)
    assert (low, high) == pytest.approx(tuple(-bound for bound in reversed(paired_difference(5, 30, 100))))
    # by hand: (31 - 6)/102 -+ 1.96 sqrt((37/102 - (25/102)^2)/102)
    reach = 1.959964 * math.sqrt((37 / 102 - (25 / 102) ** 2) / 102)
    assert (low, high) == pytest.approx((25 / 102 - reach, 25 / 102 + reach), abs=1e-6)
    assert paired_difference(2, 0, 2).low < 0, "two questions prove nothing"
    assert paired_difference(8, 0, 8).low > 0
    with pytest.raises(ValueError, match="lost of 3"):
        paired_difference(2, 2, 3)


@given(st.floats(0, 20), st.floats(0, 20))
def test_paired_difference_lies_within_bounds(gained, lost):
    low, high = paired_difference(gained, lost, 40)
    assert -1 <= low <= (gained - lost) / 42 <= high <= 1


# the bootstrap


def questions(exercises, each):
    return [number for number in range(exercises) for _ in range(each)]


@given(st.lists(st.lists(SHARES, min_size=1, max_size=5), min_size=2, max_size=8))
def test_a_share_holds_its_value_and_stays_in_bounds(exercises):
    names = [number for number, values in enumerate(exercises) for _ in values]
    flat = [value for values in exercises for value in values]
    found = Bootstrap(names, draws=200).share(flat)
    assert found.value == pytest.approx(sum(flat) / len(flat))
    assert -1e-9 <= found.low <= found.value + 1e-9
    assert found.value - 1e-9 <= found.high <= 1 + 1e-9
    floor = wilson(sum(flat), len(flat))
    assert found.low <= floor.low + 1e-9
    assert found.high >= floor.high - 1e-9


@given(st.lists(st.tuples(SHARES, SHARES), min_size=6, max_size=6))
def test_differences_turn_around(pairs):
    bootstrap = Bootstrap(questions(3, 2), draws=200)
    ours, theirs = ([pair[side] for pair in pairs] for side in (0, 1))
    one, other = bootstrap.difference(ours, theirs), bootstrap.difference(theirs, ours)
    assert (one.value, one.low, one.high) == pytest.approx((-other.value, -other.high, -other.low))


def test_the_same_again_and_in_any_order():
    values = np.random.default_rng(1).random(40)
    first = Bootstrap(questions(10, 4))
    one = (first.share(values), first.difference(values, values**2), first.mean(values * 3))
    second = Bootstrap(questions(10, 4))
    assert (second.mean(values * 3), second.difference(values, values**2), second.share(values)) == tuple(one[::-1])


def test_all_answers_right_is_not_certainty():
    found = Bootstrap(questions(5, 2)).share([1.0] * 10)
    assert found == Estimate(1.0, pytest.approx(wilson(10, 10).low), 1.0)
    ratio = Bootstrap(questions(5, 2)).ratio([1.0] * 10, [1.0] * 10)
    assert ratio.value == 1.0
    assert ratio.low < 0.9 < 1.1 < ratio.high
    many = Bootstrap(questions(500, 2)).ratio([1.0] * 1000, [1.0] * 1000)
    assert many.low > 0.99, "a thousand questions can show what 99 % means"


def test_a_share_of_many_tokens_is_as_sure_as_the_tokens_allow():
    answers, all_right = Bootstrap(questions(5, 2)), [1.0] * 10
    assert answers.share(all_right, trials=5000).low == pytest.approx(wilson(5000, 5000).low)
    assert answers.share(all_right).low == pytest.approx(wilson(10, 10).low)
    # where contexts differ, the bootstrap over contexts decides, however many tokens they have
    uneven = [0.2, 0.2, 0.9, 0.9, 0.4, 0.4, 1.0, 1.0, 0.1, 0.1]
    assert answers.share(uneven, trials=5000).low < wilson(0.52 * 5000, 5000).low - 0.1


def test_none_right():
    found = Bootstrap(questions(5, 2)).share([0.0] * 10)
    assert (found.value, found.low) == (0.0, 0.0)
    assert found.high == pytest.approx(wilson(0, 10).high)
    assert Bootstrap(questions(5, 2)).ratio([0.0] * 10, [0.0] * 10) == Estimate(None, None, None)


def test_a_denominator_that_may_be_zero_has_no_interval():
    ours, theirs = [1.0] * 6, [1.0, 0.0, 0.0, 0.0, 0.0, 0.0]
    assert Bootstrap(questions(3, 2)).ratio(ours, theirs) == Estimate(6.0, None, None)


def test_one_exercise_has_no_interval():
    alone = Bootstrap(questions(1, 8))
    assert alone.share([1.0] * 8) == Estimate(1.0, None, None)
    assert alone.mean([2.0] * 8) == Estimate(2.0, None, None)
    assert alone.ratio([1.0] * 8, [1.0] * 8) == Estimate(1.0, None, None)
    assert alone.difference([1.0] * 8, [0.0] * 8) == Estimate(1.0, None, None)
    assert not surely_above_zero(alone.difference([1.0] * 8, [0.0] * 8))
    assert bootstrap_mean([[1.0, 0.0]]) is None


def test_misuse():
    with pytest.raises(ValueError, match="nothing to resample"):
        Bootstrap([])
    with pytest.raises(ValueError, match="3 values for 4 questions"):
        Bootstrap(questions(2, 2)).share([1.0] * 3)


def test_questions_of_one_context_count_less_than_independent_ones():
    values = [1.0, 0.0] * 10
    together = Bootstrap(questions(20, 10)).share([value for value in values for _ in range(10)])
    apart = Bootstrap(range(200)).share([value for value in values for _ in range(10)])
    assert together.high - together.low > 2.5 * (apart.high - apart.low)


def test_strata_are_fixed_by_design():
    names = questions(20, 1)
    values = [1.0] * 10 + [0.0] * 10
    tasks = ["easy"] * 10 + ["hard"] * 10
    mean = Bootstrap(names, tasks).mean(values)
    assert (mean.low, mean.high) == pytest.approx((0.5, 0.5))
    loose = Bootstrap(names).mean(values)
    assert loose.high - loose.low > 0.3


@pytest.mark.parametrize("tasks", [["a", "b", "c"], ["a", "a", "b"], ["a", "b", "b"]])
def test_strata_of_one_are_put_together(tasks):
    found = Bootstrap(range(3), tasks).mean([0.0, 1.0, 2.0])
    assert found.low < 1 < found.high


def test_seeds_carry_an_error_of_their_own():
    bootstrap = Bootstrap(questions(40, 2))
    good, bad = [1.0] * 80, [0.0] * 80
    fixed, drawn = bootstrap.share([good]), bootstrap.share([good, bad, good])
    assert drawn.value == pytest.approx(2 / 3)
    assert (drawn.low, drawn.high) == (0.0, 1.0), "three such seeds say nothing"
    assert fixed.high - fixed.low < 0.1
    against = bootstrap.difference(good, [good, bad, good])
    assert against.value == pytest.approx(1 / 3)
    assert not surely_above_zero(against)
    assert surely_above_zero(bootstrap.difference(good, [bad, bad, bad]))


@pytest.mark.parametrize("seeds", [2, 3, 10])
def test_intervals_over_seeds_hold_the_truth(seeds):
    """Each seed draws its own mean around 0.6; what is asked for is 0.6, not the mean of these seeds."""
    held, runs = 0, 200
    for run in range(runs):
        generator = np.random.default_rng((run, seeds))
        levels = generator.normal(0.6, 0.08, size=seeds)
        values = generator.random((seeds, 100)) < levels[:, None]
        found = Bootstrap(questions(25, 4), draws=300, seed=run).share(values.astype(float))
        held += found.low <= 0.6 <= found.high
    assert held >= 0.91 * runs


def simulated(seed, exercises=24, each=6, shift=0.0):
    """Right answers of two variants: contexts differ in how hard they are, and the second variant is worse."""
    generator = np.random.default_rng(seed)
    hardness = generator.beta(6, 2, size=exercises).repeat(each)
    luck = generator.random(exercises * each)
    return (luck < hardness).astype(float), (luck < hardness * (1 - shift)).astype(float)


def test_the_intervals_hold_the_truth():
    """Over 250 evaluations of which the truth is known: means 0.75 and 0.6, difference 0.15, ratio 0.8."""
    truths = {"share": 0.75, "difference": 0.15, "ratio": 0.8, "mean": 0.6}
    held = dict.fromkeys(truths, 0)
    runs = 250
    for run in range(runs):
        full, trimmed = simulated(50_000 + run, shift=0.2)
        bootstrap = Bootstrap(questions(24, 6), draws=300, seed=run)
        found = {
            "share": bootstrap.share(full),
            "difference": bootstrap.difference(full, trimmed),
            "ratio": bootstrap.ratio(trimmed, full),
            "mean": bootstrap.mean(trimmed),
        }
        for name, estimate in found.items():
            held[name] += estimate.low <= truths[name] <= estimate.high
    print({name: count / runs for name, count in held.items()})
    assert all(0.91 * runs <= count for count in held.values()), held


def test_a_difference_of_nothing_is_rarely_claimed():
    claims = 0
    for run in range(200):
        one, other = simulated(run)[0], simulated(run + 10_000)[0]
        claims += surely_above_zero(Bootstrap(questions(24, 6), draws=300).difference(one, other))
    assert claims <= 12  # 2.5 % expected


def test_bootstrap_mean_is_the_share_by_exercise():
    exercises = [[1.0, 0.0, 1.0], [1.0], [0.0, 0.0]]
    found = Bootstrap([0, 0, 0, 1, 2, 2]).share([value for values in exercises for value in values])
    assert bootstrap_mean(exercises) == (found.low, found.high)


def test_a_quotient_of_what_has_no_bound_holds_the_truth():
    """Theirs is exponential, ours about a fifth of it; 95 % of the intervals should hold the fifth."""
    rng = np.random.default_rng(3)
    held = 0
    for _ in range(200):
        context = rng.exponential(1.0, 30).repeat(4)
        theirs = context * rng.uniform(0.5, 1.5, 120)
        ours = 0.2 * theirs * rng.uniform(0.5, 1.5, 120)
        found = Bootstrap(questions(30, 4)).quotient(ours, theirs)
        assert found.low < found.value < found.high
        assert found.high - found.low < 0.1, "a floor for shares would be wider"
        held += found.low <= 0.2 <= found.high
    assert 180 <= held <= 198
    assert Bootstrap(questions(3, 2)).quotient([1.0] * 6, [0.0] * 6) == Estimate(None, None, None)
    assert Bootstrap([0, 0]).quotient([1.0, 1.0], [2.0, 2.0]) == Estimate(0.5, None, None)
