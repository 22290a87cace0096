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
from kvprofile.evaluate.item_store import ITEMS, RUN, SPANS, AnswerSpan, Item, read_items, rounded
from kvprofile.evaluate.token_choice import ANY_TOKENS
from kvprofile.evaluate.variants import FULL, PROFILE, RANDOM, Variant
from kvprofile.statistics import Bootstrap, Estimate

KEPT = 0.99
"""Share that a budget must keep, with its whole interval, to be called lossless: of the full cache's first choices, and
of its accuracy."""

ENOUGH = 0.1
"""Least accuracy of the full cache's answers at which answers are compared: of nothing nothing can be lost."""

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

    def column(self, row: str, field: str, span: int | None = None) -> Column:
        """A number of each item of a row, or of one of its spans, [seeds, questions]; None counts as nan."""
        values = [
            [getattr(item if span is None else _span(item, span), field) for item in seed] for seed in self.items[row]
        ]
        return np.array(values, dtype=np.float64)

    def share(self, row: str, field: str) -> Estimate:
        """Mean of a number in [0, 1]."""
        return self.bootstrap.share(self.column(row, field))

    def share_of_tokens(self, row: str, field: str, span: int | None = None) -> Estimate:
        """Mean of a share of each answer's tokens, or of one of its spans."""
        parts = [item if span is None else _span(item, span) for item in self.questions]
        return self.bootstrap.share(self.column(row, field, span), sum(part.reference_tokens for part in parts))

    def accuracy(self, row: str) -> Estimate:
        """Mean accuracy of a row."""
        return self.share(row, "accuracy")

    def relative(self, row: str) -> Estimate:
        """Accuracy of a row as a share of the full cache's."""
        return self.bootstrap.ratio(self.column(row, "accuracy"), self.column(FULL, "accuracy"))

    def difference(self, row: str, other: str, field: str = "accuracy") -> Estimate:
        """Mean of a number in [0, 1] of a row less that of another one."""
        return self.bootstrap.difference(self.column(row, field), self.column(other, field))

    def rise(self, row: str, field: str, other: str = FULL, span: int | None = None) -> Estimate:
        """Mean of a number less its mean with the full cache, or in another row."""
        return self.bootstrap.mean(self.column(row, field, span) - self.column(other, field, span))

    def flips(self, row: str) -> tuple[float, float]:
        """Answers that were right with the full cache and are wrong, and the other way round; the mean over seeds."""
        full, found = self.column(FULL, "right"), self.column(row, "right")
        return float((full > found).sum(1).mean()), float((full < found).sum(1).mean())


def summarise(results: Results) -> dict[str, Any]:
    """The figures of an evaluation, ready for JSON: counts, ``answers``, ``rows`` as the variants, ``verdicts``."""
    questions = results.questions
    known = [item for item in questions if item.outside is not None]
    outside = results.only(lambda item: bool(item.outside))
    parts = _parts(results)
    spans = {
        _span_name(number): (number, part)
        for number in range(len(SPANS))
        if (part := results.only(lambda item, number=number: len(item.spans or ()) > number))  # type: ignore[misc]
    }
    shown: dict[str, Variant] = {}
    for variant in results.variants:
        shown.setdefault(variant.row, variant)
    rows = []
    for variant in shown.values():
        row = _row(results, variant)
        for name, found in parts.items():
            row[name] = {key: _part(part, variant.row) for key, part in found.items()}
        row["outside"] = _part(outside, variant.row) if outside else None
        row["by_span"] = {name: _span_part(part, variant.row, number) for name, (number, part) in spans.items()}
        rows.append(row)
    answers = _answers(results)
    summary: dict[str, Any] = rounded(
        {
            "exercises": len({item.exercise for item in questions}),
            "questions": len(questions),
            "questions_outside": sum(bool(item.outside) for item in known),
            "questions_with_known_evidence": len(known),
            "context_tokens": [
                min(item.context_tokens for item in questions),
                max(i.context_tokens for i in questions),
            ],
            "answers": answers,
            "rows": rows,
            "verdicts": verdicts(rows, compare_answers=answers["compared"]),
        }
    )
    return summary


def _parts(results: Results) -> dict[str, dict[str, Results]]:
    """The results of each task, and of each length."""
    by_task: dict[str, list[Item]] = {}
    by_length: dict[str, list[Item]] = {}
    for item in results.questions:
        by_task.setdefault(item.task, []).append(item)
        by_length.setdefault(str(item.length or "files"), []).append(item)
    tasks = {task: results.only(lambda item, task=task: item.task == task) for task in by_task}  # type: ignore[misc]
    lengths = {
        length: results.only(lambda item, length=length: str(item.length or "files") == length)  # type: ignore[misc]
        for length in by_length
    }
    return {
        "by_task": {name: part for name, part in tasks.items() if part},
        "by_length": {name: part for name, part in lengths.items() if part},
    }


def _answers(results: Results) -> dict[str, Any]:
    """How the full cache answers, and whether that is often enough right for budgets to be compared by it."""
    answers = [item for item in results.questions if item.right is not None]
    accuracy = sum(item.accuracy for item in answers) / len(answers) if answers else None
    return {
        "questions": len(answers),
        "right": sum(bool(item.right) for item in answers),
        "exact": sum(item.exact for item in answers),
        "accuracy": accuracy,
        "compared": accuracy is not None and accuracy >= ENOUGH,
    }


def verdicts(rows: Sequence[dict[str, Any]], compare_answers: bool = True) -> list[dict[str, Any]]:
    """For each profile what it keeps of the full cache's first choices and, where they are compared, of its accuracy.

    Each part names the lowest ``retention`` that keeps KEPT with its whole interval, and where it beats random heads.
    ``retention`` is null where none does; ``nearest`` then is the one with the highest lower bound.
    """
    draws = {row["kind"]: row["seeds"] for row in rows if row["kind"] in (RANDOM, ANY_TOKENS)}
    found = []
    for name in dict.fromkeys(row["name"] for row in rows if row["kind"] == PROFILE):
        mine = [row for row in rows if row["name"] == name]
        drawn = RANDOM if mine[0]["tokens"] is None else ANY_TOKENS
        found.append(
            {
                "profile": name,
                "kept": KEPT,
                "random": drawn,
                "random_seeds": draws.get(drawn, 0),
                "agreement": _kept(mine, "agreement", "agreement_against_random"),
                "accuracy": _kept(mine, "relative", "against_random") if compare_answers else None,
            }
        )
    return found


def _kept(rows: Sequence[dict[str, Any]], share: str, against: str) -> dict[str, Any]:
    """Of a profile's rows, the lowest retention at which a share keeps KEPT; without one, the nearest miss."""
    known = [row for row in rows if row[share]["low"] is not None]
    keeping = [row for row in known if row[share]["low"] >= KEPT]
    best = min(keeping, key=lambda row: row["retention"], default=None)
    nearest = max(known, key=lambda row: (row[share]["low"], -row["retention"]), default=None)
    shown = best or nearest
    # where the profile beats random heads with certainty
    better = [row["retention"] for row in known if row[against] and (row[against]["low"] or 0) > 0]
    return {
        "retention": best and best["retention"],
        "nearest": None if best or not nearest else nearest["retention"],
        "retention_realised": shown and shown["retention_realised"],
        "share": shown and shown[share],
        "kl": shown and shown["kl"],
        "against_random": shown and shown[against],
        "beats_random_at": better,
    }


def _row(results: Results, variant: Variant) -> dict[str, Any]:
    # every item of the row: [seeds][questions], several seeds for random heads alone
    row, full = variant.row, results.questions
    seeds = results.items[row]
    every = [item for items in seeds for item in items]
    inflation = [item.length_inflation for item in every if item.length_inflation is not None]
    lost, gained = results.flips(row)
    # paired differences: to random heads, or tokens, at the same retention, and to the first profile of several
    drawn = RANDOM if variant.tokens is None else ANY_TOKENS
    random = f"{drawn}@{variant.retention:g}" if variant.retention is not None else ""
    rivals = random in results.items and variant.kind != drawn
    first = next((each for each in results.variants if each.kind == PROFILE), None)
    rival = f"{first.name}@{variant.retention:g}" if first and variant.retention is not None else row
    compared = variant.kind == PROFILE and rival != row
    return {
        "name": variant.name,
        "kind": variant.kind,
        "retention": variant.retention,
        "seeds": len(seeds),
        "tokens": variant.tokens,
        "full_heads": variant.full_heads,
        "heads": sum(value is not None for values in variant.heads for value in values),
        "retention_realised": sum(item.retention_realised for item in every) / len(every),
        "accuracy": asdict(results.accuracy(row)),
        "accuracy_by_seed": results.column(row, "accuracy").mean(1).tolist(),
        "relative": asdict(results.relative(row)) if row != FULL else None,
        "against_random": asdict(results.difference(row, random)) if rivals else None,
        "against_first": asdict(results.difference(row, rival)) if compared else None,
        "exact": sum(item.exact for item in every) / len(every),
        "loss": float(results.column(row, "nll").mean()),
        "loss_rise": asdict(results.rise(row, "nll")),
        "agreement": asdict(results.share_of_tokens(row, "agreement")),
        "agreement_by_seed": results.column(row, "agreement").mean(1).tolist(),
        "agreement_against_random": asdict(results.difference(row, random, "agreement")) if rivals else None,
        "kl": asdict(results.rise(row, "kl")),
        "kl_against_random": asdict(results.rise(row, "kl", random)) if rivals else None,
        "kl_against_first": asdict(results.rise(row, "kl", rival)) if compared else None,
        "tokens_right": asdict(results.share_of_tokens(row, "right_share")),
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
        "agreement": asdict(results.share_of_tokens(row, "agreement")),
        "kl": asdict(results.rise(row, "kl")),
        "tokens_right": asdict(results.share_of_tokens(row, "right_share")),
    }


def _span_part(results: Results, row: str, span: int) -> dict[str, Any]:
    """One of the spans of continued texts, over those that reach it."""
    return {
        "texts": len(results.questions),
        "agreement": asdict(results.share_of_tokens(row, "agreement", span)),
        "kl": asdict(results.rise(row, "kl", span=span)),
        "loss_rise": asdict(results.rise(row, "nll", span=span)),
        "tokens_right": asdict(results.share_of_tokens(row, "right_share", span)),
    }


def _span(item: Item, number: int) -> AnswerSpan:
    return (item.spans or ())[number]


def _span_name(number: int) -> str:
    first, last = SPANS[number]
    return f"{first}-{last or ''}"
