"""What a runtime is given: the budgets of one model at one retention, from a budget file or a runtime file."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from kvprofile.budget import choice, runtime_file, store
from kvprofile.budget.allocate import UNCONSTRAINED, Constraints
from kvprofile.budget.choice import choose, choose_whole
from kvprofile.budget.profile import Matrix, ModelIdentity, Profile
from kvprofile.budget.runtime_file import RuntimeFile
from kvprofile.budget.trim import GRADED, WHOLE
from kvprofile.files import read_bytes


@dataclass(frozen=True)
class ServableBudget:
    """Shares [L][G], 1.0 and 0.0 of whole heads, null in layers without; ``reason`` as in ``allocate.Allocation``."""

    model: ModelIdentity
    heads: Matrix
    sink_tokens: int
    recent_tokens: int
    retention_asked: float
    retention_realised: float
    method: str
    statistic: str
    reason: str | None

    @property
    def full_heads(self) -> tuple[tuple[int, ...] | None, ...]:
        """The full KV heads of each layer in rising order, null in layers without budgets."""
        return tuple(
            None if row[0] is None else tuple(head for head, value in enumerate(row) if value == 1.0)
            for row in self.heads
        )


def read(path: Path) -> Profile | RuntimeFile:
    """A budget file or a runtime file. Raises InputError with everything wrong with it in one line."""
    content = read_bytes(path)  # refuses pipes and devices, which would be read for ever
    try:
        raw = json.loads(content)
    except (ValueError, RecursionError):
        raw = None  # both readers say what is wrong, and the budget file's says it in general words
    if isinstance(raw, dict) and "format" in raw:
        return runtime_file.load(path)
    return store.load(path)


def default_kind(found: Profile | RuntimeFile) -> str:
    """The kind of a file's budgets unless one is asked for; runtime files hold whole heads."""
    return choice.default_kind(found) if isinstance(found, Profile) else WHOLE


def of_profile(
    profile: Profile, retention: float, constraints: Constraints = UNCONSTRAINED, kind: str = WHOLE
) -> ServableBudget:
    """What a profile keeps at a retention. Raises InputError as ``choice.choose`` and ``choice.choose_whole``."""
    if kind == GRADED:
        chosen = choose(profile, retention, constraints, kind=GRADED)
    else:
        chosen = choose_whole(profile, retention, constraints)
    return ServableBudget(
        model=profile.model,
        heads=chosen.heads,
        sink_tokens=profile.runtime.sink_tokens,
        recent_tokens=profile.runtime.recent_tokens,
        retention_asked=retention,
        retention_realised=chosen.retention_realised,
        method=profile.scoring.method,
        statistic=profile.scoring.statistic,
        reason=chosen.allocation.reason,
    )


def of_runtime_file(found: RuntimeFile) -> ServableBudget:
    """What a runtime file keeps, as it stands."""
    return ServableBudget(
        model=found.model.identity(),
        heads=found.budgets(),
        sink_tokens=found.sink_tokens,
        recent_tokens=found.recent_tokens,
        retention_asked=found.provenance.retention_asked,
        retention_realised=found.provenance.retention_realised,
        method=found.provenance.method,
        statistic=found.provenance.statistic,
        reason=found.provenance.reason,
    )
