"""What follows from run records: legs side by side, differences with intervals, and what makes them doubtful.

Speeds and bytes are compared between repetitions (Student's t over pairs), answers between questions (bootstrap over
documents). One repetition shows no spread, so such differences have no interval.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from kvprofile.records.foreign import tool_of
from kvprofile.records.record import Leg, Request, RunRecord
from kvprofile.report.comparability import warnings_about
from kvprofile.report.figures import QUALITY, Figure, QualityFigure, Unit, figures, quality_figures
from kvprofile.statistics import Bootstrap, Estimate, student_mean

UNKNOWN = Estimate(None, None, None)


@dataclass(frozen=True)
class Group:
    """Legs of one name: repetitions that worked, and those that did not."""

    name: str
    legs: tuple[Leg, ...]
    failed: tuple[Leg, ...]

    @property
    def first(self) -> Leg:
        """A leg that speaks for what all repetitions share."""
        return (*self.legs, *self.failed)[0]

    @property
    def retention(self) -> float | None:
        """Where the group stands on an axis of retentions: realised, else asked; None for remote legs."""
        leg = self.first
        return leg.retention_asked if leg.retention_realised is None else leg.retention_realised

    @property
    def requests(self) -> list[Request]:
        """All requests of all repetitions."""
        return [request for leg in self.legs for request in leg.requests]


@dataclass(frozen=True)
class Row:
    """One figure for each group, and how it differs from the reference's; a difference may be unknown."""

    key: str
    label: str
    section: str
    unit: Unit
    better: int
    relative: bool
    values: Mapping[str, Estimate]
    differences: Mapping[str, Estimate]


@dataclass(frozen=True)
class Comparison:
    """Groups next to a reference. Groups without any leg that worked are in no row."""

    reference: str | None
    rows: tuple[Row, ...]

    def row(self, key: str) -> Row | None:
        """A row by its figure's key; None where no group has that figure."""
        return next((row for row in self.rows if row.key == key), None)


@dataclass(frozen=True)
class Summary:
    """What a page or a terminal shows of run records. ``warnings`` come first."""

    title: str
    made_up: bool
    warnings: tuple[str, ...]
    groups: tuple[Group, ...]
    against_baseline: Comparison
    against_remote: tuple[Comparison, ...]
    records: tuple[RunRecord, ...]

    def document(self) -> dict[str, Any]:
        """The summary for JSON: without the legs themselves, which the records hold."""
        return {
            "title": self.title,
            "made_up": self.made_up,
            "warnings": list(self.warnings),
            "legs": [_described(group) for group in self.groups],
            "against_baseline": asdict(self.against_baseline),
            "against_remote": [asdict(each) for each in self.against_remote],
        }


def summarise(records: Sequence[RunRecord], notes: Sequence[str] = ()) -> Summary:
    """Put the legs of records side by side. Equal legs of several files count once. ``notes`` join the warnings."""
    # repetitions of a leg become one group, failed ones next to those that worked
    groups = _grouped(records)
    baseline = _baseline(records, groups)
    # remote legs are a second reference, for the local legs alone
    remotes = [group for group in groups if group.legs and group.first.kind == "remote" and group is not baseline]
    locals_ = [group for group in groups if group.first.kind == "local"]
    # the order of all tables: baseline, falling retention, the rest, remote
    ordered = sorted(groups, key=lambda group: _place(group, baseline))
    return Summary(
        title=_title([record.experiment.name for record in records]),
        made_up=any(record.experiment.made_up for record in records),
        warnings=tuple(warnings_about(records, {group.name: group.legs for group in ordered}, notes)),
        groups=tuple(ordered),
        against_baseline=_compared(ordered, baseline),
        against_remote=tuple(_shared(_compared([remote, *locals_], remote)) for remote in remotes if locals_),
        records=tuple(records),
    )


def _title(names: Sequence[str]) -> str:
    found = list(dict.fromkeys(names))
    return " and ".join(found) if len(found) <= 3 else f"{found[0]} and {len(found) - 1} more"


def _grouped(records: Sequence[RunRecord]) -> list[Group]:
    experiments = {record.experiment.name for record in records}
    own = {record.experiment.name for record in records if tool_of(record) is None}
    owners: dict[str, set[str]] = {}
    for record in records:
        for leg in record.legs:
            owners.setdefault(leg.name, set()).add(record.experiment.name)
    found: dict[str, list[Leg]] = {}
    for record in records:
        alone = len({leg.name for leg in record.legs}) == 1
        for leg in record.legs:
            # legs of other tools are called after their files; only the legs of several own experiments are alike
            clear = len(owners[leg.name]) == 1 and (tool_of(record) is not None or len(own) == 1)
            clear = clear or (alone and leg.name == record.experiment.name)
            name = leg.name if clear or len(experiments) == 1 else f"{record.experiment.name}: {leg.name}"
            legs = found.setdefault(name, [])
            if leg in legs:  # the same file twice
                continue
            taken = {each.repetition for each in legs}
            legs.append(leg.model_copy(update={"repetition": max(taken) + 1}) if leg.repetition in taken else leg)
    return [
        Group(
            name,
            tuple(leg for leg in legs if leg.status == "ok"),
            tuple(leg for leg in legs if leg.status == "failed"),
        )
        for name, legs in found.items()
    ]


def _baseline(records: Sequence[RunRecord], groups: Sequence[Group]) -> Group | None:
    """The experiment's own choice, else the first local leg without budgets, else the first leg that worked."""
    named = {record.experiment.baseline for record in records} - {None}
    worked = [group for group in groups if group.legs]
    chosen = [group for group in worked if group.first.name in named]
    plain = [group for group in worked if group.first.compressed is False]
    return next(iter((*chosen, *plain, *worked)), None)


def _place(group: Group, baseline: Group | None) -> tuple[int, float]:
    """The baseline first, then local legs by falling retention, then the rest as they came, remote ones last."""
    if group is baseline:
        return 0, 0.0
    if group.first.kind == "remote":
        return 3, 0.0
    return (2, 0.0) if group.retention is None else (1, -group.retention)


def _compared(groups: Sequence[Group], reference: Group | None) -> Comparison:
    worked = [group for group in groups if group.legs]
    rows = [_quality_row(each, worked, reference) for each in quality_figures(r for g in worked for r in g.requests)]
    rows += [_row(figure, worked, reference) for figure in figures()]
    known = [row for row in rows if any(value.value is not None for value in row.values.values())]
    return Comparison(reference.name if reference else None, tuple(_with_reached(known)))


def _shared(comparison: Comparison) -> Comparison:
    """Only the rows that the reference has a number in."""
    name = comparison.reference or ""
    return Comparison(name, tuple(row for row in comparison.rows if row.values[name].value is not None))


def _row(figure: Figure, groups: Sequence[Group], reference: Group | None) -> Row:
    values = {group.name: student_mean(_known(figure.of(leg) for leg in group.legs)) for group in groups}
    differences = {
        group.name: _between_runs(figure, group, reference) for group in groups if reference and group is not reference
    }
    return Row(figure.key, figure.label, figure.group, figure.unit, figure.better, figure.relative, values, differences)


def _between_runs(figure: Figure, group: Group, reference: Group) -> Estimate:
    """The difference over repetitions that both have, as a share of the reference where the figure says so."""
    ours = {leg.repetition: figure.of(leg) for leg in group.legs}
    theirs = {leg.repetition: figure.of(leg) for leg in reference.legs}
    pairs = [
        (our, their) for number, our in ours.items() if our is not None and (their := theirs.get(number)) is not None
    ]
    if not pairs or figure.better == 0:
        return UNKNOWN
    if not figure.relative:
        return student_mean([our - their for our, their in pairs])
    if not all(our > 0 and their > 0 and 0 < our / their < math.inf for our, their in pairs):
        return UNKNOWN
    found = student_mean([math.log(our / their) for our, their in pairs])
    return _mapped(found, lambda apart: math.expm1(min(apart, _MOST_APART)))


def _quality_row(figure: QualityFigure, groups: Sequence[Group], reference: Group | None) -> Row:
    by_group = {group.name: _by_question(group, figure) for group in groups}
    values = {name: _average(found, figure) for name, found in by_group.items()}
    theirs = by_group[reference.name] if reference and reference.legs else {}
    differences = {
        name: _between_answers(found, theirs, figure)
        for name, found in by_group.items()
        if reference and name != reference.name
    }
    return Row(figure.key, figure.label, QUALITY, figure.unit, figure.better, False, values, differences)


_MOST_APART = 700.0
"""Logarithm of the largest ratio that a float holds, about."""

Question = tuple[str | None, str | None, int | None]
"""Document, question, seed."""


def _by_question(group: Group, figure: QualityFigure) -> dict[Question, float]:
    """The mean of a figure over a question's repetitions."""
    found: dict[Question, list[float]] = defaultdict(list)
    for request in group.requests:
        value = figure.of(request)
        if value is not None:
            found[request.document, request.question, request.seed].append(value)
    return {key: math.fsum(values) / len(values) for key, values in found.items()}


def _average(found: Mapping[Question, float], figure: QualityFigure) -> Estimate:
    if not found:
        return UNKNOWN
    bootstrap = Bootstrap([document for document, _, _ in found])
    values = list(found.values())
    return bootstrap.share(values) if figure.share else _without_certainty(bootstrap.mean(values))


def _without_certainty(estimate: Estimate) -> Estimate:
    """The estimate without an interval of no width: questions that all agree show no spread, not certainty."""
    return Estimate(estimate.value, None, None) if estimate.low == estimate.high else estimate


def _between_answers(
    ours: Mapping[Question, float], theirs: Mapping[Question, float], figure: QualityFigure
) -> Estimate:
    """The difference over the questions that both answered."""
    common = [question for question in ours if question in theirs]
    if not common:
        return UNKNOWN
    bootstrap = Bootstrap([document for document, _, _ in common])
    first, second = [ours[each] for each in common], [theirs[each] for each in common]
    if figure.share:
        return bootstrap.difference(first, second)
    return _without_certainty(bootstrap.mean([a - b for a, b in zip(first, second, strict=True)]))


def _with_reached(rows: Sequence[Row]) -> list[Row]:
    """The rows, with the speed-up reached next to its bound where the legs could not state it themselves."""
    by_key = {row.key: row for row in rows}
    bound, speed = by_key.get("bound"), by_key.get("output_throughput")
    if bound is None or speed is None or "reached" in by_key:
        return list(rows)
    # a difference of +40 % is a speed-up of 1.4
    reached, fraction = {}, {}
    for name, most in bound.values.items():
        difference = speed.differences.get(name, UNKNOWN)
        limit = most.value
        reached[name] = UNKNOWN if limit is None else _mapped(difference, lambda value: 1 + value)
        fraction[name] = UNKNOWN if limit is None else _mapped(reached[name], lambda value, limit=limit: value / limit)  # type: ignore[misc]
    # both new rows follow that of the bound
    templates = {figure.key: figure for figure in figures()}
    found = []
    for row in rows:
        found.append(row)
        if row is bound:
            for key, values in (("reached", reached), ("fraction", fraction)):
                f = templates[key]
                found.append(Row(key, f.label, f.group, f.unit, f.better, f.relative, values, {}))
    return found


def _mapped(estimate: Estimate, change: Callable[[float], float]) -> Estimate:
    """An estimate on another scale; ``change`` must rise."""
    return Estimate(
        *(None if value is None else change(value) for value in (estimate.value, estimate.low, estimate.high))
    )


def _known(values: Iterable[float | None]) -> list[float]:
    return [value for value in values if value is not None]


def _described(group: Group) -> dict[str, Any]:
    leg = group.first
    return {
        "name": group.name,
        "kind": leg.kind,
        "model": leg.model,
        "retention_asked": leg.retention_asked,
        "retention_realised": leg.retention_realised,
        "repetitions": len(group.legs),
        "failed": [each.reason for each in group.failed],
    }
