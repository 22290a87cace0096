"""Graded budgets of a profile: shares of heads at any retention, in classes that an engine's cache groups can hold."""

from __future__ import annotations

import math

from kvprofile.budget.allocate import Allocation, Constraints, ranks
from kvprofile.budget.classes import classed
from kvprofile.budget.profile import HeadBudgets, Matrix, Profile, mean_budget, retention_key
from kvprofile.errors import InputError


def shares(profile: Profile, retention: float) -> tuple[Matrix, tuple[float, float] | None]:
    """The shares [L][G] of a profile's heads at a retention, before they are rounded to classes.

    At retentions that the file does not state they lie on the line between its neighbours, which are given too; nothing
    is kept at 0, and everything at 1. Raises InputError for a file without a probe.
    """
    if profile.probe is None:
        raise InputError(
            f"the budget file of {profile.model.name} has no graded budgets, which need a probe; make them with "
            "'kvprofile score', or ask for whole heads (--kind whole, or LLM_KVZIP_KIND=whole where vLLM serves)"
        )
    stated = profile.budgets.get(retention_key(retention))
    if stated is not None:
        return stated.heads, None
    known = {float(key): budgets.heads for key, budgets in profile.budgets.items()}
    for end in (0.0, 1.0):
        known[end] = [[None if value is None else end for value in row] for row in profile.scores.max]
    if retention in known:
        return known[retention], None
    low, high = max(each for each in known if each < retention), min(each for each in known if each > retention)
    weight = (retention - low) / (high - low)

    def between(below: float | None, above: float | None) -> float | None:
        return None if below is None or above is None else below + weight * (above - below)

    found = [[between(*pair) for pair in zip(*rows, strict=True)] for rows in zip(known[low], known[high], strict=True)]
    return found, (low, high)


def allocate_graded(
    profile: Profile, retention: float, constraints: Constraints, scores: Matrix
) -> tuple[Allocation, tuple[float, float] | None]:
    """Shares in classes, and the stated retentions that they lie between, if they are not stated.

    Of the constraints ranks and classes count. ``scores`` [L][G] say what the rounding costs. Raises InputError as
    ``shares``, for ranks that the heads cannot be dealt to, and for a floor or pipeline stages.
    """
    exact, between = shares(profile, retention)
    if constraints.floor:
        raise InputError("a floor of full heads is for whole heads; leave it out, or ask for --kind whole")
    if constraints.pipeline_stages:
        raise InputError("full heads are balanced over pipeline stages, graded ones are not; ask for --kind whole")
    if constraints.classes < 1:
        raise InputError(f"{constraints.classes} classes of heads; give at least 1")
    heads = classed(exact, constraints.classes, ranks(constraints, profile.model.geometry.kv_heads))
    kept = [value for row in heads for value in row if value is not None]
    before, after = _weighed(scores, exact), _weighed(scores, heads)
    allocation = Allocation(
        budgets=HeadBudgets(heads=heads, retention_realised=round(mean_budget(heads), 9)),
        retention_asked=retention,
        full_heads=sum(value == 1.0 for value in kept),
        heads=len(kept),
        reason=None,
        heads_exchanged=0,
        score_share=after / before if before > 0 else 1.0,
        stage_full_heads=(sum(value == 1.0 for value in kept),),
    )
    return allocation, between


def _weighed(scores: Matrix, heads: Matrix) -> float:
    """The summed score of what heads keep."""
    pairs = (pair for rows in zip(scores, heads, strict=True) for pair in zip(*rows, strict=True))
    return math.fsum((score or 0.0) * (share or 0.0) for score, share in pairs)
