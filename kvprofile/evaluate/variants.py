"""Which budgets are compared: the full cache, the profiles, and the controls that say what a ranking is worth.

A variant is a name, a retention, the share of the context that each head keeps and, where heads keep a part of it, how
tokens are chosen. Controls of whole heads keep exactly as many heads full as the first profile does; controls of graded
heads keep its shares and choose other tokens, or choose its tokens with shares that are not its own. How variants are
measured is not decided here.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from kvprofile.budget.allocate import Place, ranking
from kvprofile.budget.choice import (
    choose,
    choose_whole,
    default_kind,
    has_scores,
    ranking_scores,
    require_scores,
    tie_breaks,
)
from kvprofile.budget.dtypes import PLAIN
from kvprofile.budget.probe import path_of as probe_path
from kvprofile.budget.profile import Geometry, Matrix, Profile
from kvprofile.budget.trim import GRADED, WHOLE
from kvprofile.errors import InputError, plain
from kvprofile.evaluate.token_choice import ANY_TOKENS, KEY_NORMS, OWN_SCORES, PROBE, REVERSED

FULL, STREAMING, RANDOM, INVERTED, UNIFORM, PROFILE = "full", "streaming", "random", "inverted", "uniform", "profile"
SHUFFLED, EQUAL = "shuffled", "equal"
ROUNDED = "rounded"
"""The full cache, in numbers of 8 bits."""

CONTROLS = (RANDOM, INVERTED, UNIFORM, STREAMING)
"""Of whole heads."""

GRADED_CONTROLS = (ANY_TOKENS, REVERSED, KEY_NORMS, SHUFFLED, EQUAL)


@dataclass(frozen=True)
class Contender:
    """A profile under test, the label it has in tables, and the statistic that ranks its heads (None: its own).

    ``probe`` is the file of the probe, which graded budgets need.
    """

    label: str
    profile: Profile
    statistic: str | None = None
    kind: str = WHOLE
    probe: Path | None = None

    def order(self) -> list[Place]:
        """Profiled heads, most important first. Raises InputError where the profile lacks scores or the statistic."""
        require_scores(self.profile)
        name = self.statistic or self.profile.scoring.statistic
        return ranking(ranking_scores(self.profile, name), tie_breaks(self.profile, name))

    def heads(self, retention: float) -> Matrix:
        """Shares [L][G] of its kind at a retention. Raises InputError as ``choice.choose``."""
        if self.kind == GRADED:
            return choose(self.profile, retention, kind=GRADED).heads
        return choose_whole(self.profile, retention, statistic=self.statistic).heads


@dataclass(frozen=True)
class Variant:
    """A budget to measure. ``name`` is a contender's label or the kind of a control; ``seed`` only of random ones.

    ``tokens`` says how graded heads choose theirs (``token_choice.CHOICES``), ``probe`` whose probe, by its label;
    ``cache`` is the dtype of the cache.
    """

    name: str
    kind: str
    retention: float | None
    heads: Matrix
    seed: int | None = None
    tokens: str | None = None
    probe: str | None = None
    cache: str = PLAIN

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
    def budget(self) -> tuple[object, ...]:
        """What decides which tokens are kept, and how, in a form that can be compared and hashed."""
        seed = self.seed if self.tokens == ANY_TOKENS else None
        kept = (self.tokens, self.probe, seed, *(tuple(row) for row in self.heads))
        return kept if self.cache == PLAIN else (self.cache, *kept)


def contenders(
    found: Sequence[tuple[Path, Profile]], statistic: str | None = None, kinds: Sequence[str] | None = None
) -> list[Contender]:
    """Label profiles by their scoring method or, where that names no single one, by their files; then by number.

    Each profile is there once for each of ``kinds``: its default one unless given. Where graded budgets are asked of
    several profiles, or next to whole ones, their labels say so.
    """
    reserved = {FULL, *CONTROLS, *GRADED_CONTROLS, OWN_SCORES, GRADED}
    methods = [profile.scoring.method for _, profile in found]
    stems = [plain(path.stem) for path, _ in found]
    numbered = [f"{stem} {number}" for number, stem in enumerate(stems, 1)]
    choices = (names for names in (methods, stems, numbered) if len({*names} - reserved) == len(found))
    made = []
    for label, (path, profile) in zip(next(choices), found, strict=True):
        for kind in dict.fromkeys(kinds or [WHOLE if statistic else default_kind(profile)]):
            own = label if kind == WHOLE else GRADED if len(found) == 1 else f"{label} {GRADED}"
            made.append(Contender(own, profile, statistic, kind, probe_path(path) if kind == GRADED else None))
    return made


def build(
    under_test: Sequence[Contender],
    geometry: Geometry,
    retentions: Sequence[float],
    *,
    controls: bool = True,
    random_seeds: int = 3,
    seed: int = 0,
    own_scores: bool = False,
    caches: Sequence[str] = (PLAIN,),
) -> list[Variant]:
    """All variants, the full cache first. Controls are made from the first contender of each kind.

    For each other dtype of ``caches`` the full cache and the contenders are there once more.

    With ``own_scores`` there is a ceiling for graded heads too: the tokens that KVzip's scores of the very context
    choose. Raises InputError for a profile of another geometry, or without what its kind of budget needs.
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
    whole = next((each for each in under_test if each.kind == WHOLE), None)
    graded = next((each for each in under_test if each.kind == GRADED), None)

    def keep(full: Sequence[Place]) -> Matrix:
        chosen = set(full)
        return [
            [float((layer, head) in chosen) if layer in profiled else None for head in range(geometry.kv_heads)]
            for layer in range(geometry.layers)
        ]

    others = [cache for cache in dict.fromkeys(caches) if cache != PLAIN]
    found = [Variant(FULL, FULL, None, keep(places))]
    found += [Variant(f"{FULL} {cache}", ROUNDED, None, keep(places), cache=cache) for cache in others]
    for retention in sorted({round(each, 6) for each in retentions}, reverse=True):
        found += [
            Variant(each.label, PROFILE, retention, each.heads(retention), None, *_tokens_of(each))
            for each in under_test
        ]
        found += [
            Variant(f"{each.label} {cache}", PROFILE, retention, each.heads(retention), None, *_tokens_of(each), cache)
            for cache in others
            for each in under_test
        ]
        if controls and whole is not None:
            count = sum(value == 1.0 for row in whole.heads(retention) for value in row)
            for number in range(random_seeds):
                found.append(Variant(RANDOM, RANDOM, retention, keep(_shuffled(places, seed, number)[:count]), number))
            if has_scores(whole.profile):
                order = whole.order()
                found.append(Variant(INVERTED, INVERTED, retention, keep(order[::-1][:count])))
                found.append(Variant(UNIFORM, UNIFORM, retention, keep(_evenly(order)[:count])))
        if graded is not None:
            found += _graded_controls(graded, retention, random_seeds if controls else 0, seed, own_scores, controls)
    if controls:
        found.append(Variant(STREAMING, STREAMING, None, keep(())))
    return found


def _tokens_of(contender: Contender) -> tuple[str | None, str | None]:
    return (PROBE, contender.label) if contender.kind == GRADED else (None, None)


def _graded_controls(
    graded: Contender, retention: float, random_seeds: int, seed: int, own_scores: bool, controls: bool
) -> list[Variant]:
    """Its shares with other tokens, and its tokens with other shares."""
    heads, label = graded.heads(retention), graded.label
    found = [Variant(ANY_TOKENS, ANY_TOKENS, retention, heads, number, ANY_TOKENS) for number in range(random_seeds)]
    if controls:
        kept = [value for row in heads for value in row if value is not None]
        mixed = iter(random.Random(f"shuffled counts:{seed}").sample(kept, len(kept)))
        level = sum(kept) / len(kept)
        shuffled = [[None if value is None else next(mixed) for value in row] for row in heads]
        equal = [[None if value is None else level for value in row] for row in heads]
        found += [
            Variant(REVERSED, REVERSED, retention, heads, None, REVERSED, label),
            Variant(KEY_NORMS, KEY_NORMS, retention, heads, None, KEY_NORMS),
            Variant(SHUFFLED, SHUFFLED, retention, shuffled, None, PROBE, label),
            Variant(EQUAL, EQUAL, retention, equal, None, PROBE, label),
        ]
    if own_scores:
        found.append(Variant(OWN_SCORES, OWN_SCORES, retention, heads, None, OWN_SCORES))
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
