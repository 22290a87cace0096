"""Exercises that people bring: JSON lines, and data sets with the columns of LongBench, SCBench or RULER.

A data set is a folder or file that ``datasets`` reads, or a data set of the hub. What is generated lives in ``tasks``.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from kvprofile.corpus import datasets_
from kvprofile.errors import InputError, plain
from kvprofile.files import MAX_TEXT_BYTES
from kvprofile.questions.tasks import TASKS, Exercise, Question

_QUESTION_COLUMNS = ("question", "input")
_ANSWER_COLUMNS = ("answers", "outputs", "answer", "output")


def load(reference: str, contexts: int, questions: int) -> tuple[str, list[Exercise]]:
    """The name of a task that people bring and its first ``contexts`` exercises of at most ``questions`` each.

    ``reference`` is one of

    - a .jsonl file of ``{"context", "questions": [{"text", "answer", "expected"?, "any_of"?, "evidence"?}],
      "conversation"?}``, with ``expected`` a list of strings (the answer unless given) and ``evidence`` a list of
      [start, stop) characters of the context,
    - ``datasets:ID_OR_PATH[:SPLIT[:CONFIG]]`` (see ``kvprofile.corpus.datasets_``).

    Raises InputError where it is missing, unreadable, empty or has no such fields.
    """
    if reference.startswith(datasets_.SCHEME):
        name, found = _from_datasets(reference)
    else:
        name, found = _from_file(reference)
    exercises = []
    for exercise in itertools.islice(found, contexts):
        kept = exercise.questions[:questions]
        exercises.append(Exercise(name, exercise.context, kept, exercise.conversation))
    if not exercises:
        raise InputError(f"{reference} holds no exercises")
    return name, exercises


def require(references: Iterable[str]) -> None:
    """Raise InputError now for a reference that is no file and no data set: before others are read."""
    for reference in references:
        if not reference.startswith(datasets_.SCHEME):
            _file(reference)


def _from_file(reference: str) -> tuple[str, Iterator[Exercise]]:
    path = _file(reference)
    return plain(path.name), _lines(path)


def _file(reference: str) -> Path:
    try:
        path = Path(reference).expanduser()
        is_file = path.is_file()
    except (OSError, RuntimeError, ValueError) as error:
        raise InputError(f"cannot look for tasks {reference[:100]!r}: {error}") from error
    if not is_file or path.suffix != ".jsonl":
        raise InputError(f"no task {reference!r}; give a .jsonl file, datasets:ID_OR_PATH or one of {', '.join(TASKS)}")
    return path


def _lines(path: Path) -> Iterator[Exercise]:
    try:
        with open(path, encoding="utf-8-sig") as stream:
            number = 0
            while line := stream.readline(MAX_TEXT_BYTES):  # of what never ends no more than that
                number += 1
                if line.strip():
                    yield _exercise(line, f"{path}: line {number}")
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 (byte {error.start})") from error


def _exercise(line: str, where: str) -> Exercise:
    try:
        raw = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where} is not JSON") from error
    if not isinstance(raw, dict) or not isinstance(raw.get("questions"), list) or not raw["questions"]:
        raise InputError(f'{where} has no "questions"; give {{"context": "...", "questions": [{{...}}]}}')
    context = _text(raw.get("context"), where, "context")
    found = []
    for entry in raw["questions"]:
        if not isinstance(entry, dict):
            raise InputError(f'{where}: a question is no object; give {{"text": "...", "answer": "..."}}')
        answer = _text(entry.get("answer"), where, "answer")
        expected = entry.get("expected", [answer])
        expected = [expected] if isinstance(expected, str) else expected
        if not isinstance(expected, list) or not expected:
            raise InputError(f'{where}: "expected" is no list of strings')
        found.append(
            Question(
                text=_text(entry.get("text"), where, "text"),
                answer=answer,
                expected=tuple(_text(each, where, "expected") for each in expected),
                evidence=_spans(entry.get("evidence", []), len(context), where),
                any_of=entry.get("any_of") is True,
            )
        )
    return Exercise("", context, tuple(found), raw.get("conversation") is True)


def _spans(value: object, length: int, where: str) -> tuple[tuple[int, int], ...]:
    spans: list[Any] = value if isinstance(value, list) else [None]
    for span in spans:
        fits = isinstance(span, list) and len(span) == 2 and all(type(place) is int for place in span)
        if not fits or not 0 <= span[0] < span[1] <= length:
            raise InputError(f'{where}: "evidence" is no list of [start, stop] within the context')
    return tuple((start, stop) for start, stop in spans)


def _from_datasets(reference: str) -> tuple[str, Iterator[Exercise]]:
    wanted = datasets_.parse(reference)
    if wanted.column:
        raise InputError(f"{reference}: questions have several columns; @COLUMN is for the texts of 'kvprofile score'")
    table = datasets_.load(reference, wanted)
    read = _reader(list(table.columns))
    if read is None:
        raise InputError(
            f"{reference}: columns {', '.join(table.columns)} are not those of LongBench (context, input, answers), "
            "SCBench (context, multi_turns) or RULER (input, outputs)"
        )
    return wanted.name, _grouped(read(row, f"{reference}: row {number}") for number, row in enumerate(table.rows))


def _reader(columns: list[str]) -> Any:
    """What turns a row with these columns into an exercise; None where nothing does."""
    question = next((column for column in _QUESTION_COLUMNS if column in columns), None)
    answer = next((column for column in _ANSWER_COLUMNS if column in columns), None)
    if "context" in columns and "multi_turns" in columns:
        return _conversation
    if question is None or answer is None:
        return None

    def read(row: Mapping[str, Any], where: str) -> Exercise:
        if "context" in columns:
            context, text = row["context"], row[question]
        else:  # RULER writes context and question as one text, whose last line asks
            context, _, text = _text(row[question], where, question).rstrip().rpartition("\n")
        found = _question(text, row[answer], where, any_of=answer == "answers")
        return Exercise("", _text(context, where, "context"), (found,))

    return read


def _conversation(row: Mapping[str, Any], where: str) -> Exercise:
    turns = row["multi_turns"]
    if isinstance(turns, dict):  # how older versions of datasets give a list of objects
        turns = [dict(zip(turns, values, strict=False)) for values in zip(*turns.values(), strict=False)]
    if not isinstance(turns, list) or not turns or not all(isinstance(turn, dict) for turn in turns):
        raise InputError(f"{where}: multi_turns is no list of turns")
    found = tuple(_question(turn.get("input"), turn.get("answer"), where, any_of=True) for turn in turns)
    return Exercise("", _text(row["context"], where, "context"), found, conversation=True)


def _question(text: object, answers: object, where: str, *, any_of: bool) -> Question:
    """A question whose answers are alternatives (``any_of``, the first is the reference) or all expected."""
    listed = answers if isinstance(answers, list) else [answers]
    expected = tuple(_text(answer, where, "answer") for answer in listed)
    if not expected:
        raise InputError(f"{where} has no answer")
    reference = expected[0] if any_of else ", ".join(expected)
    return Question(_text(text, where, "question"), reference, expected, (), any_of)


def _grouped(exercises: Iterable[Exercise]) -> Iterator[Exercise]:
    """Rows about one context, where they follow each other, as one exercise."""
    for (context, conversation), group in itertools.groupby(exercises, lambda each: (each.context, each.conversation)):
        same = list(group)
        if conversation:
            yield from same
        else:
            yield Exercise("", context, tuple(question for each in same for question in each.questions))


def _text(value: object, where: str, what: str) -> str:
    text = str(value) if isinstance(value, int | float) and not isinstance(value, bool) else value
    if not isinstance(text, str) or not text.strip():
        raise InputError(f"{where} has no {what}, or one that is no text")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"{where} holds half a surrogate pair in its {what}, which is no text") from error
    return text
