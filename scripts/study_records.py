"""What the studies on the pretrained model measured, in files that are committed: a page is made from them alone.

A part of a study has one file. Its first line names the budgets, each further line is one context: the name, the key of
the folder that it was asked in (which depends on settings, budgets and probe: lines with another key do not count, and
go when the file is written again), and the answers in columns, at DIGITS significant digits. A column has a value for
each question, or a row of them for each budget in the order of the first line; where all values of a column or row are
equal, one stands for them. What follows from the rest is not written: shares of tokens, whether an answer is exact, and
where spans begin.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from kvprofile.errors import InputError
from kvprofile.evaluate.item_store import SPANS, SUMMARY, AnswerSpan, Item
from kvprofile.evaluate.summary import Results
from kvprofile.evaluate.variants import Variant
from kvprofile.files import write_atomically

DIGITS = 5
NAMED = ("name", "kind", "retention", "seed", "tokens", "probe", "full_heads")
"""What the first line says of each budget."""

ASKED = ("reference_tokens", "depth", "outside")
"""Columns [questions]."""

MEASURED = ("tokens_right", "agreed", "nll", "kl")
"""Columns [budgets][questions], and those of spans [budgets][questions][spans]; ``agreed`` counts tokens."""


@dataclass(frozen=True)
class RecordedVariant(Variant):
    """A budget of which only the number of full heads is kept."""

    counted: int = 0

    @property
    def full_heads(self) -> int:
        """Heads that keep the whole context."""
        return self.counted


@dataclass(frozen=True)
class Records:
    """The contexts of a part, by name and key, each with its line; ``variants`` are its budgets."""

    variants: tuple[RecordedVariant, ...] = ()
    contexts: Mapping[tuple[str, str], dict[str, Any]] | None = None

    @classmethod
    def load(cls, path: Path) -> Records:
        """What a file holds; nothing where there is none. Raises InputError for a line that does not belong there."""
        if not path.is_file():
            return cls()
        number = 1
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
            listed = json.loads(lines[0])["variants"]
            variants = tuple(
                RecordedVariant(**{name: each[name] for name in NAMED[:-1]}, heads=[], counted=each["full_heads"])
                for each in listed
            )
            contexts = {}
            for number, text in enumerate(lines[1:], 2):  # noqa: B007 - named in the error
                line = json.loads(text)
                _items(line, variants)
                contexts[line["context"], line["key"]] = line
        except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
            raise InputError(f"{path}: line {number} is not a record of a study's answers ({error})") from error
        return cls(variants, contexts)

    def __contains__(self, context: tuple[str, str]) -> bool:
        return context in (self.contexts or {})

    def __or__(self, other: Records) -> Records:
        """The contexts of both. Raises ValueError where their budgets are not the same."""
        if self.variants and other.variants and self.variants != other.variants:
            raise ValueError("two records have other budgets")
        return Records(self.variants or other.variants, {**(self.contexts or {}), **(other.contexts or {})})

    def only(self, wanted: Iterable[tuple[str, str]]) -> Records:
        """Some contexts, those that are there, in the order given."""
        return Records(self.variants, {each: self.contexts[each] for each in wanted if self.contexts and each in self})

    def to_bytes(self) -> bytes:
        """The file."""
        first = {"variants": [{name: getattr(each, name) for name in NAMED} for each in self.variants]}
        lines = [first, *(self.contexts or {}).values()]
        return "".join(json.dumps(line, separators=(",", ":")) + "\n" for line in lines).encode()

    def results(self) -> Results | None:
        """All of it as one evaluation; None where nothing was asked."""
        items = [item for line in (self.contexts or {}).values() for item in _items(line, self.variants)]
        return Results.of(items, self.variants) if items else None


def of_folder(name: str, folder: Path) -> Records:
    """The record of a context that was asked about in a folder. Raises InputError where that is not finished."""
    results = Results.load(folder)
    variants = tuple(
        RecordedVariant(**{field: getattr(each, field) for field in NAMED[:-1]}, heads=[], counted=each.full_heads)
        for each in results.variants
    )
    by_key: dict[str, list[Item]] = {}
    for seeds in results.items.values():
        for items in seeds:
            by_key[items[0].variant] = [replace(item, exercise=name) for item in items]
    rows = [by_key[each.key] for each in variants]
    first = rows[0]
    line: dict[str, Any] = {"context": name, "key": key_of(folder), "questions": len(first)}
    line["context_tokens"] = first[0].context_tokens
    line |= {field: _short([_number(getattr(item, field)) for item in first]) for field in ASKED}
    line["retention_realised"] = [_number(row[0].retention_realised) for row in rows]
    line |= {field: [_short([_value(item, field) for item in row]) for row in rows] for field in MEASURED}
    if any(item.spans for item in first):
        line["spans"] = {
            field: [[[_value(span, field) for span in item.spans or ()] for item in row] for row in rows]
            for field in MEASURED
        }
    line = {field: value for field, value in line.items() if value is not None}
    for made, item in zip(_items(line, variants), (item for row in rows for item in row), strict=True):
        if _derived(made) != _derived(item) or abs(made.accuracy - item.accuracy) > 10**-DIGITS:
            raise InputError(f"{folder} holds more than a record can say of {item.variant}, question {item.question}")
    return Records(variants, {(name, line["key"]): line})


def key_of(folder: Path) -> str:
    """What settings, budgets and probe are told apart by: the end of a folder's name."""
    return folder.name.rpartition("-")[2]


def path_of(output: Path, model: str, part: str) -> Path:
    """The file of a part in the folder of a study's pages."""
    return output / "data" / model / "answers" / f"{part}.jsonl"


def is_known(records: Records, name: str, folder: Path) -> bool:
    """Whether a context was asked about: its folder is finished, or its record is there."""
    return (name, key_of(folder)) in records or (folder / SUMMARY).is_file()


def collect(path: Path, folders: Sequence[tuple[str, Path]]) -> Results | None:
    """Bring the finished ones of some contexts' folders into a file of records, and give what it says of all of them.

    The file is left alone where it says nothing of them. Two processes may do this at a time: what one of them writes
    last lacks is still in a folder, and comes in with the next call. Raises InputError as ``Records.load``.
    """
    records = Records.load(path).only((name, key_of(folder)) for name, folder in folders)
    for name, folder in folders:
        if (name, key_of(folder)) not in records and (folder / SUMMARY).is_file():
            try:
                records |= of_folder(name, folder)
            except ValueError as error:
                raise InputError(f"{folder} has other budgets than {path}: remove what is out of date") from error
    records = records.only((name, key_of(folder)) for name, folder in folders)
    if not records.contexts:
        return None
    content = records.to_bytes()
    if not path.is_file() or path.read_bytes() != content:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, content)
    return records.results()


def _items(line: Mapping[str, Any], variants: Sequence[Variant]) -> list[Item]:
    """The items of a line, those of each budget together. Raises what indexing raises where the line is broken."""
    name, count = line["context"], line["questions"]
    task, length, _ = name.split("/")
    asked = {field: _long(line.get(field), count) for field in ASKED}
    realised = line["retention_realised"]
    measured = {field: line[field] for field in MEASURED}
    if any(len(column) != len(variants) for column in (realised, *measured.values())):
        raise ValueError(f"columns are not of {len(variants)} budgets")
    found = []
    for place, variant in enumerate(variants):
        rows = {field: _long(column[place], count) for field, column in measured.items()}
        for number in range(count):
            tokens = asked["reference_tokens"][number]
            values = {field: row[number] for field, row in rows.items()}
            spans = _spans(line["spans"], place, number, count, tokens) if "spans" in line else None
            exact = values["tokens_right"] == tokens
            found.append(
                Item(
                    exercise=name, task=task, length=int(length), question=number, variant=variant.key,
                    context_tokens=line["context_tokens"], depth=asked["depth"][number],
                    outside=asked["outside"][number], retention_realised=float(realised[place]),
                    reference_tokens=tokens, tokens_right=values["tokens_right"], exact=exact,
                    right=None if spans else exact,
                    accuracy=values["tokens_right"] / tokens if spans else float(exact),
                    nll=float(values["nll"]), agreement=values["agreed"] / tokens, kl=float(values["kl"]),
                    generated=None, generated_tokens=None, spans=spans,
                )
            )  # fmt: skip
    return found


def _spans(columns: Mapping[str, Any], place: int, number: int, count: int, tokens: int) -> tuple[AnswerSpan, ...]:
    """The spans of one question under one budget."""
    ends = [(first, min(most or tokens, tokens)) for first, most in SPANS if first <= tokens]
    values = {field: _long(_long(columns[field][place], count)[number], len(ends)) for field in MEASURED}
    found = []
    for at, (first, last) in enumerate(ends):
        right, agreed, nll, kl = (values[field][at] for field in MEASURED)
        found.append(AnswerSpan(first, last, right, float(nll), agreed / (last - first + 1), float(kl)))
    return tuple(found)


def _value(item: Item | AnswerSpan, field: str) -> Any:
    """A column's value of an item or a span."""
    if field == "agreed":
        return round(item.agreement * item.reference_tokens)
    return _number(getattr(item, field))


def _number(value: Any) -> Any:
    """A number at ``DIGITS``, whole ones without a point; what is none as it is."""
    if not isinstance(value, float):
        return value
    short = float(f"{value:.{DIGITS}g}")
    return int(short) if short == int(short) else short


def _short(values: Sequence[Any]) -> Any:
    """A list, or its one value where all are equal."""
    return values[0] if all(value == values[0] for value in values) else values


def _long(values: Any, count: int) -> list[Any]:
    """A list of ``count`` from what ``_short`` gave. Raises ValueError for one of another length."""
    found = values if isinstance(values, list) else [values] * count
    if len(found) != count:
        raise ValueError(f"{len(found)} values where {count} belong")
    return found


def _derived(item: Item) -> tuple[Any, ...]:
    """What a record does not write, but must give back."""
    spans = [(span.first, span.last) for span in item.spans or ()]
    return (item.task, item.length, item.question, item.variant, item.exact, item.right, item.generated, spans)
