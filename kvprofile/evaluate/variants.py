"""Which budgets are compared: the full cache, the profiles, and the controls that say what a ranking is worth.

A variant is a name, a retention and the heads it keeps full. Controls keep exactly as many heads full as the first
profile does. How variants are measured is not decided here.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from kvprofile.budget.allocate import Place, ranking
from kvprofile.budget.choice import choose_whole, has_scores, ranking_scores, require_scores, tie_breaks
from kvprofile.budget.profile import Geometry, Matrix, Profile
from kvprofile.errors import InputError, plain

FULL, STREAMING, RANDOM, INVERTED, UNIFORM, PROFILE = "full", "streaming", "random", "inverted", "uniform", "profile"
CONTROLS = (RANDOM, INVERTED, UNIFORM, STREAMING)


@dataclass(frozen=True)
class Contender:
    """A profile under test, the label it has in tables, and the statistic that ranks its heads (None: its own)."""

    label: str
    profile: Profile
    statistic: str | None = None

    def order(self) -> list[Place]:
        """Profiled heads, most important first. Raises InputError where the profile lacks scores or the statistic."""
        require_scores(self.profile)
        name = self.statistic or self.profile.scoring.statistic
        return ranking(ranking_scores(self.profile, name), tie_breaks(self.profile, name))

    def heads(self, retention: float) -> Matrix:
        """Whole heads [L][G] at a retention. Raises InputError as ``choice.choose_whole``."""
        return choose_whole(self.profile, retention, statistic=self.statistic).heads


@dataclass(frozen=True)
class Variant:
    """A budget to measure. ``name`` is a contender's label or the kind of a control; ``seed`` only of random heads."""

    name: str
    kind: str
    retention: float | None
    heads: Matrix
    seed: int | None = None

    @property
    def row(self) -> str:
        """What stands in one row of a table: all seeds of random heads together. 'kvzip@0.5', 'random@0.5', 'full'."""
        return self.name if self.retention is None else f"{self.name}@{self.retention:g}"

    @property
    def key(self) -> str:
        """The row and the seed: 'random-2@0.5'."""
        return self.row if self.seed is None else f"{self.name}-{self.seed}@{self.retention:g}"

    @property
    def full_heads(self) -> int:
        """Heads that keep the whole context."""
        return sum(value == 1.0 for row in self.heads for value in row)

    @property
    def budget(self) -> tuple[tuple[float | None, ...], ...]:
        """The heads in a form that can be compared and hashed."""
        return tuple(tuple(row) for row in self.heads)


def contenders(found: Sequence[tuple[Path, Profile]], statistic: str | None = None) -> list[Contender]:
    """Label profiles by their scoring method or, where that names no single one, by their files; then by number."""
    reserved = {FULL, *CONTROLS}
    methods = [profile.scoring.method for _, profile in found]
    stems = [plain(path.stem) for path, _ in found]
    numbered = [f"{stem} {number}" for number, stem in enumerate(stems, 1)]
    choices = (names for names in (methods, stems, numbered) if len({*names} - reserved) == len(found))
    return [Contender(label, profile, statistic) for label, (_, profile) in zip(next(choices), found, strict=True)]


def build(
    under_test: Sequence[Contender],
    geometry: Geometry,
    retentions: Sequence[float],
    *,
    controls: bool = True,
    random_seeds: int = 3,
    seed: int = 0,
) -> list[Variant]:
    """All variants, the full cache first. Inverted and uniform heads are those of the first contender, if it ranks.

    Raises InputError for a profile of another geometry, without scores where they are needed, or with graded budgets.
    """
    for contender in under_test:
        if contender.profile.model.geometry != geometry:
            model = contender.profile.model
            raise InputError(
                f"the profile {contender.label} belongs to {model.name}, {model.geometry.describe()}; the model has "
                f"{geometry.describe()}"
            )
    profiled = set(geometry.profiled_layers)
    places = [(layer, head) for layer in sorted(profiled) for head in range(geometry.kv_heads)]

    def keep(full: Sequence[Place]) -> Matrix:
        chosen = set(full)
        return [
            [float((layer, head) in chosen) if layer in profiled else None for head in range(geometry.kv_heads)]
            for layer in range(geometry.layers)
        ]

    found = [Variant(FULL, FULL, None, keep(places))]
    for retention in sorted({round(each, 6) for each in retentions}, reverse=True):
        at = [Variant(each.label, PROFILE, retention, each.heads(retention)) for each in under_test]
        found += at
        if not controls:
            continue
        count = at[0].full_heads
        for number in range(random_seeds):
            found.append(Variant(RANDOM, RANDOM, retention, keep(_shuffled(places, seed, number)[:count]), number))
        if has_scores(under_test[0].profile):
            order = under_test[0].order()
            found.append(Variant(INVERTED, INVERTED, retention, keep(order[::-1][:count])))
            found.append(Variant(UNIFORM, UNIFORM, retention, keep(_evenly(order)[:count])))
    if controls:
        found.append(Variant(STREAMING, STREAMING, None, keep(())))
    return found


def _shuffled(places: list[Place], seed: int, number: int) -> list[Place]:
    """The order in which random heads become full: one order for all retentions, so that they are nested."""
    return random.Random(f"random heads:{seed}:{number}").sample(places, len(places))


def _evenly(order: list[Place]) -> list[Place]:
    """Heads ordered so that every layer gives its best, then its second best and so on, better layers first."""
    given: dict[int, int] = {}
    ranked = []
    for rank, (layer, head) in enumerate(order):
        given[layer] = given.get(layer, 0) + 1
        ranked.append((given[layer], rank, (layer, head)))
    return [place for *_, place in sorted(ranked)]
