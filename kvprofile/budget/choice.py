"""Which heads a profile keeps at a retention, and how much of each: the one answer that every command and vLLM get.

Budgets are of two kinds. *Whole* heads keep everything or nothing between sinks and window; they are ranked by score.
*Graded* heads keep shares of it, which the file states at its presets, rounded to a few classes; which tokens those are
is the probe's to say, so a file without a probe has no graded budgets.

A budget that the file states goes before a choice by score: somebody may have edited it, or it came from elsewhere.
``choose`` gives what the file says, fractions of heads included. ``choose_whole`` is for whoever serves or simulates
whole heads, and is the one place that refuses anything else.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from kvprofile.budget.allocate import (
    UNCONSTRAINED,
    Allocation,
    Constraints,
    allocate,
    allocate_within,
    as_given,
    heads_that_differ,
    require_retention,
    satisfies,
)
from kvprofile.budget.graded import allocate_graded
from kvprofile.budget.profile import Matrix, Profile, retention_key
from kvprofile.budget.trim import GRADED, KINDS, WHOLE
from kvprofile.errors import InputError

_BUDGET_FORMATS = ("csv", "lu-kv")
"""Foreign formats whose imports bring budgets that were not chosen by score here."""


@dataclass(frozen=True)
class Choice:
    """The budgets at a retention. ``stated``: they stand in the file; otherwise they were ranked by ``statistic``.

    Graded ones that do not stand in the file lie ``between`` two retentions that do.
    """

    allocation: Allocation
    stated: bool
    statistic: str
    kind: str = WHOLE
    between: tuple[float, float] | None = None

    @property
    def heads(self) -> Matrix:
        """Share of the context between sinks and window that each KV head keeps, [L][G]; null unprofiled."""
        return self.allocation.budgets.heads

    @property
    def retention_realised(self) -> float:
        """Mean of the budgets over profiled heads."""
        return self.allocation.budgets.retention_realised

    @property
    def origin(self) -> str:
        """Where the budgets come from, in words."""
        if self.kind == GRADED and self.between is not None:
            return f"shares between those stored at {self.between[0]:g} and {self.between[1]:g}, in classes"
        if self.kind == GRADED:
            return "shares stored in the file, in classes" if self.stated else "everything"
        return "stored in the file" if self.stated else f"preview, ranked now by {self.statistic}"

    @property
    def first_fraction(self) -> tuple[int, int, float] | None:
        """(layer, KV head, share) of the first head that keeps a part of the context; null where all are whole."""
        return _first_fraction(self.heads)


def choose(
    profile: Profile,
    retention: float,
    constraints: Constraints = UNCONSTRAINED,
    statistic: str | None = None,
    kind: str | None = None,
) -> Choice:
    """The budgets of a profile at a retention, fractions included where the file states them.

    ``kind`` is graded where the file has a probe, and whole otherwise or where a ``statistic`` is given. The file's own
    budget is taken where it states one of the kind that keeps to the constraints; otherwise heads are ranked by the
    file's statistic, ties broken by its others, and the reason says that the stated budget was left. Another
    ``statistic`` than the file's ranks anew in any case. Raises InputError unless 0 < retention <= 1, for an unknown
    statistic or kind, for constraints that no retention can meet, where fractions cannot be made to fit constraints,
    where heads have to be ranked and the profile has no scores, and for graded budgets of a file without a probe.
    """
    require_retention(retention)
    own = profile.scoring.statistic
    name = own if statistic is None else statistic
    scores, others = ranking_scores(profile, name), tie_breaks(profile, name)
    if kind is None:
        kind = WHOLE if statistic is not None else default_kind(profile)
    if require_kind(kind) == GRADED and statistic is not None:
        raise InputError("a statistic ranks whole heads; leave it out, or ask for --kind whole")
    if kind == GRADED:
        allocation, between = allocate_graded(profile, retention, constraints, scores)
        return Choice(allocation, retention_key(retention) in profile.budgets, own, GRADED, between)
    stated = profile.budgets.get(retention_key(retention)) if name == own else None
    if stated is not None and profile.probe is not None and _first_fraction(stated.heads) is not None:
        stated = None  # the file's budgets are graded

    # what the file states, as long as it keeps to the constraints
    if stated is not None and constraints == UNCONSTRAINED:
        return Choice(as_given(scores, retention, stated, others, _origin(profile, retention)), True, name)
    if stated is not None and (fraction := _first_fraction(stated.heads)) is not None:
        raise InputError(_fraction_words(profile, retention, fraction, "constraints choose whole heads"))
    if stated is not None and not constraints.pipeline_stages and satisfies(stated.heads, constraints):
        return Choice(as_given(scores, retention, stated, others, _origin(profile, retention)), True, name)

    # otherwise the best heads by score
    require_scores(profile)
    chosen = allocate_within(scores, retention, constraints, others)
    if stated is not None and stated.heads != allocate(scores, retention, others).heads:
        left = "the file's own budget was left for the constraints, so heads were chosen by score"
        chosen = replace(chosen, reason="; ".join(filter(None, [chosen.reason, left])))
    return Choice(chosen, False, name)


def choose_whole(
    profile: Profile,
    retention: float,
    constraints: Constraints = UNCONSTRAINED,
    statistic: str | None = None,
) -> Choice:
    """As ``choose``, for whoever acts on whole heads only.

    Raises InputError where the file states fractions and has no probe, so that they are all it says.
    """
    found = choose(profile, retention, constraints, statistic, WHOLE)
    if found.first_fraction is not None:
        raise InputError(_fraction_words(profile, retention, found.first_fraction, "only whole heads can be served"))
    return found


def default_kind(profile: Profile) -> str:
    """The kind of a profile's budgets unless one is asked for: graded where it has what they need."""
    return WHOLE if profile.probe is None else GRADED


def require_kind(kind: str) -> str:
    """A kind. Raises InputError for an unknown one."""
    if kind not in KINDS:
        raise InputError(f"a budget is {' or '.join(KINDS)}, not {kind!r}")
    return kind


def has_scores(profile: Profile) -> bool:
    """Whether the numbers of a profile rank heads. Those of an imported runtime file are 1 for full, 0 for trimmed."""
    source = profile.scoring.imported_from
    return source is None or source.format != "vllm"


def require_scores(profile: Profile) -> None:
    """Raise InputError where heads would be chosen by score and the profile has none."""
    if not has_scores(profile):
        raise InputError(
            f"{profile.model.name} was imported from a runtime file, which holds no scores; "
            f"only retention {', '.join(profile.budgets)} is known, and only as it stands"
        )


def ranking_scores(profile: Profile, statistic: str | None = None) -> Matrix:
    """The scores [L][G] that rank the heads of a profile. Raises InputError for a statistic that it does not hold."""
    name = profile.scoring.statistic if statistic is None else statistic
    present = profile.scores.statistics()
    if name not in present:
        raise InputError(f"the profile of {profile.model.name} has no statistic {name}; it has {', '.join(present)}")
    return present[name]


def tie_breaks(profile: Profile, statistic: str) -> list[Matrix]:
    """The other statistics of a profile, [L][G] each, which order heads whose scores are equal."""
    return [matrix for name, matrix in profile.scores.statistics().items() if name != statistic]


def _origin(profile: Profile, retention: float) -> str | None:
    """Why a stated budget of whole heads is not the choice by score; null where it is, or where there is none."""
    stated = profile.budgets[retention_key(retention)].heads
    if _first_fraction(stated) is not None:
        return "the file's own budget holds fractions of heads"
    if not has_scores(profile):
        return None
    by_score = allocate(ranking_scores(profile), retention, tie_breaks(profile, profile.scoring.statistic))
    differ = heads_that_differ(stated, by_score.heads)
    if not differ:
        return None
    source = profile.scoring.imported_from
    how = "was imported" if source and source.format in _BUDGET_FORMATS else "was edited"
    heads = f"{differ} {'head' if differ == 1 else 'heads'}"
    return f"the file's budget at {retention_key(retention)} {how}: it differs from the choice by score in {heads}"


def _first_fraction(heads: Sequence[Sequence[float | None]]) -> tuple[int, int, float] | None:
    found = (
        (layer, head, value)
        for layer, row in enumerate(heads)
        for head, value in enumerate(row)
        if value is not None and value not in (0.0, 1.0)
    )
    return next(found, None)


def _fraction_words(profile: Profile, retention: float, fraction: tuple[int, int, float], why: str) -> str:
    layer, head, value = fraction
    key = retention_key(retention)
    return (
        f"the budget of {profile.model.name} at retention {key} keeps {value:.3g} of layer {layer}, KV head {head}, "
        f"but {why}; choose another retention, or remove budgets[{key!r}] from the file to rank heads by score"
    )
