"""From items to the figures of a report: one row for each name and retention, its parts by task, and a verdict.

Every question weighs the same. Rows of random heads take all their seeds together, and their intervals resample seeds
too. What the figures look like is decided by the command line and the plot.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from kvprofile.errors import InputError
from kvprofile.evaluate.item_store import DIGITS, ITEMS, RUN, Item, read_items
from kvprofile.evaluate.variants import FULL, PROFILE, RANDOM, Variant
from kvprofile.statistics import Bootstrap, Estimate

KEPT = 0.99
"""Share of the full cache's accuracy that a budget must keep, with its whole interval, to be called lossless."""

Column = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Results:
    """Items by row of the table: for each, [seeds][questions], the questions in the same order everywhere."""

    variants: tuple[Variant, ...]
    items: dict[str, list[list[Item]]]
    bootstrap: Bootstrap

    @classmethod
    def of(cls, items: Sequence[Item], variants: Sequence[Variant]) -> Results:
        """Sort items. Raises ValueError where a variant lacks a question that another one has."""
        by_key: dict[str, list[Item]] = {variant.key: [] for variant in variants}
        for item in items:
            by_key[item.variant].append(item)
        questions = [(item.exercise, item.question) for item in by_key[variants[0].key]]
        rows: dict[str, list[list[Item]]] = {}
        for variant in variants:
            found = by_key[variant.key]
            if [(item.exercise, item.question) for item in found] != questions:
                raise ValueError(f"{variant.key} was not asked the same questions as {variants[0].key}")
            rows.setdefault(variant.row, []).append(found)
        first = by_key[variants[0].key]
        strata = [(item.task, item.length) for item in first]
        return cls(tuple(variants), rows, Bootstrap([item.exercise for item in first], strata))

    @classmethod
    def load(cls, folder: Path) -> Results:
        """The results of an evaluation's folder. Raises InputError where it is none or unfinished."""
        try:
            listed = json.loads((folder / RUN).read_bytes())["variants"]
            variants = [Variant(**each) for each in listed]
            return cls.of(read_items(folder / ITEMS), variants)
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise InputError(f"{folder} is not the folder of a finished evaluation: {error}") from error

    def only(self, wanted: Callable[[Item], bool]) -> Results | None:
        """The results of some of the questions, chosen by what does not depend on the variant; None without any."""
        chosen = [number for number, item in enumerate(self.questions) if wanted(item)]
        if not chosen:
            return None
        kept = [items[number] for seeds in self.items.values() for items in seeds for number in chosen]
        return Results.of(kept, self.variants)

    @property
    def questions(self) -> list[Item]:
        """The items of the full cache, one for each question."""
        return self.items[FULL][0]

    def column(self, row: str, field: str) -> Column:
        """A number of each item of a row, [seeds, questions]; None counts as nan."""
        values = [[getattr(item, field) for item in seed] for seed in self.items[row]]
        return np.array(values, dtype=np.float64)

    def accuracy(self, row: str) -> Estimate:
        """Mean accuracy of a row."""
        return self.bootstrap.share(self.column(row, "accuracy"))

    def relative(self, row: str) -> Estimate:
        """Accuracy of a row as a share of the full cache's."""
        return self.bootstrap.ratio(self.column(row, "accuracy"), self.column(FULL, "accuracy"))

    def difference(self, row: str, other: str) -> Estimate:
        """Accuracy of a row less that of another one."""
        return self.bootstrap.difference(self.column(row, "accuracy"), self.column(other, "accuracy"))

    def rise(self, row: str, field: str) -> Estimate:
        """Mean of a number less its mean with the full cache."""
        return self.bootstrap.mean(self.column(row, field) - self.column(FULL, field))

    def flips(self, row: str) -> tuple[float, float]:
        """Answers that were right with the full cache and are wrong, and the other way round; the mean over seeds."""
        full, found = self.column(FULL, "right"), self.column(row, "right")
        return float((full > found).sum(1).mean()), float((full < found).sum(1).mean())


def summarise(results: Results) -> dict[str, Any]:
    """The figures of an evaluation, ready for JSON: counts, ``rows`` in the order of the variants, ``verdicts``."""
    questions = results.questions
    known = [item for item in questions if item.outside is not None]
    tasks = dict.fromkeys(item.task for item in questions)
    lengths = dict.fromkeys(item.length for item in questions)
    parts = {
        "by_task": {task: results.only(lambda item, task=task: item.task == task) for task in tasks},  # type: ignore[misc]
        "by_length": {
            str(length or "files"): results.only(lambda item, length=length: item.length == length)  # type: ignore[misc]
            for length in lengths
        },
    }
    outside = results.only(lambda item: bool(item.outside))
    shown: dict[str, Variant] = {}
    for variant in results.variants:
        shown.setdefault(variant.row, variant)
    rows = []
    for variant in shown.values():
        row = _row(results, variant)
        for name, found in parts.items():
            row[name] = {key: _part(part, variant.row) for key, part in found.items() if part}
        row["outside"] = _part(outside, variant.row) if outside else None
        rows.append(row)
    return _rounded_values(
        {
            "exercises": len({item.exercise for item in questions}),
            "questions": len(questions),
            "questions_outside": sum(bool(item.outside) for item in known),
            "questions_with_known_evidence": len(known),
            "context_tokens": [
                min(item.context_tokens for item in questions),
                max(i.context_tokens for i in questions),
            ],
            "rows": rows,
            "verdicts": verdicts(rows),
        }
    )


def verdicts(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each profile the lowest retention that keeps KEPT with its whole interval, and where it beats random heads.

    ``retention`` is null where none does; ``nearest`` then is the one with the highest lower bound.
    """
    found = []
    for name in dict.fromkeys(row["name"] for row in rows if row["kind"] == PROFILE):
        # the lowest retention whose whole interval stays above KEPT; without one, the nearest miss
        mine = [row for row in rows if row["name"] == name and row["relative"]["low"] is not None]
        keeping = [row for row in mine if row["relative"]["low"] >= KEPT]
        best = min(keeping, key=lambda row: row["retention"], default=None)
        nearest = max(mine, key=lambda row: (row["relative"]["low"], -row["retention"]), default=None)
        shown = best or nearest
        # where the profile beats random heads with certainty
        draws = next((row["seeds"] for row in rows if row["kind"] == RANDOM), 0)
        better = [row["retention"] for row in mine if row["against_random"] and (row["against_random"]["low"] or 0) > 0]
        found.append(
            {
                "profile": name,
                "kept": KEPT,
                "retention": best and best["retention"],
                "nearest": None if best or not nearest else nearest["retention"],
                "retention_realised": shown and shown["retention_realised"],
                "relative": shown and shown["relative"],
                "against_random": shown and shown["against_random"],
                "beats_random_at": better,
                "random_seeds": draws,
            }
        )
    return found


def _row(results: Results, variant: Variant) -> dict[str, Any]:
    # every item of the row: [seeds][questions], several seeds for random heads alone
    row, full = variant.row, results.questions
    seeds = results.items[row]
    every = [item for items in seeds for item in items]
    inflation = [item.length_inflation for item in every if item.length_inflation is not None]
    lost, gained = results.flips(row)
    # paired differences: to random heads at the same retention, and to the first profile where there are several
    random = f"{RANDOM}@{variant.retention:g}" if variant.retention is not None else ""
    against = results.difference(row, random) if random in results.items and variant.kind != RANDOM else None
    first = next((each for each in results.variants if each.kind == PROFILE), None)
    rival = f"{first.name}@{variant.retention:g}" if first and variant.retention is not None else row
    compared = variant.kind == PROFILE and rival != row
    return {
        "name": variant.name,
        "kind": variant.kind,
        "retention": variant.retention,
        "seeds": len(seeds),
        "full_heads": variant.full_heads,
        "heads": sum(value is not None for values in variant.heads for value in values),
        "retention_realised": sum(item.retention_realised for item in every) / len(every),
        "accuracy": asdict(results.accuracy(row)),
        "accuracy_by_seed": results.column(row, "accuracy").mean(1).tolist(),
        "relative": asdict(results.relative(row)) if row != FULL else None,
        "against_random": asdict(against) if against else None,
        "against_first": asdict(results.difference(row, rival)) if compared else None,
        "exact": sum(item.exact for item in every) / len(every),
        "loss": float(results.column(row, "nll").mean()),
        "loss_rise": asdict(results.rise(row, "nll")),
        "kl": asdict(results.rise(row, "kl")),
        "agreement": float(results.column(row, "agreement").mean()),
        "answers": sum(item.right is not None for item in full),
        "lost": lost,
        "gained": gained,
        "length_inflation": sum(inflation) / len(inflation) if inflation else None,
    }


def _part(results: Results, row: str) -> dict[str, Any]:
    return {
        "questions": len(results.questions),
        "accuracy": asdict(results.accuracy(row)),
        "relative": asdict(results.relative(row)) if row != FULL else None,
    }


def _rounded_values(values: dict[str, Any]) -> dict[str, Any]:
    return {name: _rounded(value) for name, value in values.items()}


def _rounded(value: Any) -> Any:
    """Numbers to the digits of the items, so that the last bits of a sum never differ between machines."""
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}")
    if isinstance(value, dict):
        return _rounded_values(value)
    return [_rounded(each) for each in value] if isinstance(value, list) else value
