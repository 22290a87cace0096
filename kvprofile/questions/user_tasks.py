"""Questions that people bring: JSON lines and data sets, in our own format, a published benchmark's or a mapped one.

What is generated lives in ``tasks``; docs/texts-and-questions.md lists the formats.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from kvprofile.corpus import datasets_
from kvprofile.corpus.text_files import json_lines
from kvprofile.errors import InputError, plain
from kvprofile.files import MAX_TEXT_BYTES
from kvprofile.questions import judge, published
from kvprofile.questions.columns import USAGE, Columns
from kvprofile.questions.fields import Source, choice_question, context_of, question_of, text_of
from kvprofile.questions.tasks import TASKS, Exercise, Question

_OWN = "kvprofile's own"


@dataclass(frozen=True)
class Brought:
    """A task that somebody brought: its name, its exercises, and lines that say as what they were read."""

    name: str
    exercises: tuple[Exercise, ...]
    told: tuple[str, ...]


def load(reference: str, contexts: int, questions: int, columns: Columns | None = None) -> Brought:
    """The first ``contexts`` exercises of a task that people bring, of at most ``questions`` each.

    ``reference`` is a ``.jsonl`` file or ``datasets:ID_OR_PATH[:SPLIT[:CONFIG]]``. Its rows are, in this order, what
    ``columns`` say, our own ``{"context", "questions": [{"text", "answer", "expected"?, "any_of"?, "choices"?,
    "measure"?, "evidence"?}], "conversation"?}`` (``evidence``: a list of [start, stop) characters of the context), or
    a format of ``published``. Raises InputError where it is missing, unreadable, empty or of no format that is known.
    """
    wanted = columns or Columns()
    name, rows, known_columns, hints = _rows(reference)
    first = next(rows, None)
    if first is None:
        raise InputError(f"{reference} holds no exercises")
    listed = known_columns or _columns_of(first[1], first[0])
    format_name, read = _reader(reference, listed, first[1], wanted)
    source = Source(reference, hints)
    exercises = []
    found = _grouped(_read(itertools.chain([first], rows), read, source))
    for exercise in itertools.islice(found, contexts):
        kept = [wanted.apply(question) for question in exercise.questions[:questions]]
        exercises.append(replace(exercise, task=name, questions=tuple(kept)))
    if not exercises:
        raise InputError(f"{reference} holds no exercises{_and(source)}")
    asked = [question for exercise in exercises for question in exercise.questions]
    for measure in {question.measure for question in asked}:
        judge.require_measure(measure)
    told = f"{name} is read as {format_name} ({', '.join(listed)}): {judge.describe(asked)}"
    notes = [f"{name}: {note} (rows or questions: {count})" for note, count in source.notes.items()]
    return Brought(name, tuple(exercises), (told, *notes))


def require(references: Iterable[str]) -> None:
    """Raise InputError now for a reference that is neither a file nor a data set: before others are read."""
    for reference in references:
        if not reference.startswith(datasets_.SCHEME):
            _file(reference)


def _reader(
    reference: str, columns: Sequence[str], first: Mapping[str, Any], wanted: Columns
) -> tuple[str, Callable[[Mapping[str, Any], Source], Exercise | None]]:
    """(what the rows are, what reads one)."""
    if wanted.names:
        return "mapped by --columns", wanted.read
    found = published.recognise(columns, first)
    if found:
        return found.name, found.read
    if "questions" in columns:
        return _OWN, _own
    raise InputError(
        f"{reference}: columns {', '.join(columns)} are of no known format; 'kvprofile evaluate' takes {USAGE} "
        "(docs/texts-and-questions.md)"
    )


def _rows(reference: str) -> tuple[str, Iterator[tuple[str, Any]], tuple[str, ...], tuple[str, ...]]:
    """Name, (where, row) of each row, columns (empty for JSON lines), and words that may tell a benchmark's part."""
    if not reference.startswith(datasets_.SCHEME):
        path = _file(reference)
        return plain(path.name), _lines(path), (), _words_of(path)
    wanted = datasets_.parse(reference)
    if wanted.column:
        raise InputError(f"{reference}: questions have several columns; @COLUMN is for the texts of 'kvprofile score'")
    table = datasets_.load(reference, wanted)
    rows = ((f"{reference}: row {number}", row) for number, row in enumerate(table.rows))
    return wanted.name, rows, table.columns, (wanted.config, table.name, *_words_of(Path(wanted.path)))


def _words_of(path: Path) -> tuple[str, ...]:
    return path.stem, path.parent.name


def _file(reference: str) -> Path:
    try:
        path = Path(reference).expanduser()
        is_file = path.is_file()
    except (OSError, RuntimeError, ValueError) as error:
        raise InputError(f"cannot look for tasks {reference[:100]!r}: {error}") from error
    if not is_file or path.suffix != ".jsonl":
        raise InputError(f"no task {reference!r}; give a .jsonl file, datasets:ID_OR_PATH or one of {', '.join(TASKS)}")
    return path


def _lines(path: Path) -> Iterator[tuple[str, Any]]:
    try:
        with open(path, encoding="utf-8") as stream:
            lines = iter(lambda: stream.readline(MAX_TEXT_BYTES), "")  # of what never ends no more than that
            for number, row in json_lines(lines, f"{path}:"):
                yield f"{path}: line {number}", row
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 (byte {error.start})") from error


def _columns_of(row: Any, where: str) -> tuple[str, ...]:
    if not isinstance(row, dict):
        raise InputError(f'{where} is not an object; give {{"context": "...", "questions": [{{...}}]}}')
    return tuple(row)


def _read(
    rows: Iterable[tuple[str, Any]], read: Callable[[Mapping[str, Any], Source], Exercise | None], source: Source
) -> Iterator[Exercise]:
    for where, row in rows:
        source.where = where
        _columns_of(row, where)
        exercise = read(row, source)
        if exercise is not None:
            yield exercise


def _grouped(exercises: Iterable[Exercise]) -> Iterator[Exercise]:
    """Rows about one context, where they follow each other, as one exercise."""
    for (context, conversation), group in itertools.groupby(exercises, lambda each: (each.context, each.conversation)):
        same = list(group)
        if conversation:
            yield from same
        else:
            yield Exercise("", context, tuple(question for each in same for question in each.questions))


def _and(source: Source) -> str:
    return "".join(f"; {note}" for note in source.notes)


def _own(row: Mapping[str, Any], source: Source) -> Exercise:
    where, entries = source.where, row.get("questions")
    if not isinstance(entries, list) or not entries:
        raise InputError(f'{where} has no "questions"; give {{"context": "...", "questions": [{{...}}]}}')
    context = context_of(row.get("context"), source)
    questions = tuple(_own_question(entry, len(context), source) for entry in entries)
    return Exercise("", context, questions, row.get("conversation") is True)


def _own_question(entry: object, length: int, source: Source) -> Question:
    where = source.where
    if not isinstance(entry, dict):
        raise InputError(f'{where}: a question is not an object; give {{"text": "...", "answer": "..."}}')
    evidence = _spans(entry.get("evidence") or [], length, where)
    text, answer = entry.get("text"), entry.get("answer")
    if entry.get("choices"):
        return replace(choice_question(text, entry["choices"], answer, source), evidence=evidence)
    expected = answer if entry.get("expected") is None else entry["expected"]
    if expected == [] or not (expected is answer or isinstance(expected, str | int | float | list)):
        raise InputError(f'{where}: "expected" is not a list of strings')
    measure = "words" if entry.get("measure") is None else entry["measure"]
    if measure not in judge.WITHOUT_CHOICES:
        raise InputError(f'{where}: "measure" is not one of {", ".join(judge.WITHOUT_CHOICES)}')
    any_of = entry.get("any_of") is True
    made = question_of(text, expected, source, any_of=any_of, measure=measure, evidence=evidence)
    return replace(made, answer=text_of(answer, source, "answer"))


def _spans(value: object, length: int, where: str) -> tuple[tuple[int, int], ...]:
    spans: list[Any] = value if isinstance(value, list) else [None]
    for span in spans:
        fits = isinstance(span, list) and len(span) == 2 and all(type(place) is int for place in span)
        if not fits or not 0 <= span[0] < span[1] <= length:
            raise InputError(f'{where}: "evidence" is not a list of [start, stop] within the context')
    return tuple((start, stop) for start, stop in spans)
