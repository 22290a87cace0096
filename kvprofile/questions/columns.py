"""``--columns``: which columns of a user's rows hold what, and how answers count, where no format is recognised."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from kvprofile.errors import InputError
from kvprofile.questions.fields import Source, choice_question, context_of, question_of
from kvprofile.questions.judge import WITHOUT_CHOICES
from kvprofile.questions.tasks import Exercise, Question

USAGE = "--columns context=NAME,question=NAME,answer=NAME[,choices=NAME][,answers=any|all][,measure=NAME]"
_NAMED = ("context", "question", "answer", "choices")


@dataclass(frozen=True)
class Columns:
    """Names of columns (``a.b`` is ``b`` inside ``a``), and whether ``any`` or ``all`` of an answer's list is expected.

    Without columns, ``answers`` and ``measure`` change what a recognised format says. Empty parts were not given.
    """

    context: str = ""
    question: str = ""
    answer: str = ""
    choices: str = ""
    answers: str = ""
    measure: str = ""

    @classmethod
    def parse(cls, text: str) -> Columns:
        """From ``context=...,question=...``. Raises InputError for other keys, and where one of three is missing."""
        given: dict[str, str] = {}
        for part in text.split(","):
            key, equals, value = (each.strip() for each in part.partition("="))
            if key not in {field.name for field in fields(cls)} or not equals or not value or key in given:
                raise InputError(f"--columns {text[:200]!r}: {part.strip()[:60]!r} is not understood; write {USAGE}")
            given[key] = value
        found = cls(**given)
        if found.answers not in ("", "any", "all"):
            raise InputError(f"--columns: answers is any or all, not {found.answers!r}")
        if found.measure not in ("", *WITHOUT_CHOICES):
            raise InputError(f"--columns: measure is one of {', '.join(WITHOUT_CHOICES)}, not {found.measure[:60]!r}")
        missing = [name for name in ("context", "question", "answer") if not getattr(found, name)]
        if missing and any(getattr(found, name) for name in _NAMED):
            raise InputError(f"--columns {text[:200]!r}: {', '.join(missing)} is missing; write {USAGE}")
        return found

    @property
    def names(self) -> dict[str, str]:
        """The columns by what they hold; empty where the format is left to be recognised."""
        return {name: getattr(self, name) for name in _NAMED if getattr(self, name)}

    def read(self, row: Mapping[str, Any], source: Source) -> Exercise:
        """A row as an exercise. Raises InputError where a column is not there or holds something else."""
        found = {name: _value(row, column, source) for name, column in self.names.items()}
        context = context_of(found["context"], source)
        if "choices" in found:
            question = choice_question(found["question"], found["choices"], found["answer"], source)
        else:
            answers = found["answer"]
            if isinstance(answers, list) and len(answers) > 1 and not self.answers:
                told = "add answers=any (one is enough) or answers=all to --columns"
                raise InputError(f"{source.where} has {len(answers)} answers in {self.answer!r}; {told}")
            any_of, measure = self.answers == "any", self.measure or "words"
            question = question_of(found["question"], answers, source, any_of=any_of, measure=measure)
        return Exercise("", context, (question,))

    def apply(self, question: Question) -> Question:
        """A question of a recognised format with what was said about its answers."""
        any_of = {"any": True, "all": False, "": question.any_of}[self.answers]
        answer = question.answer
        if any_of != question.any_of:
            answer = question.expected[0] if any_of else ", ".join(question.expected)
        return replace(question, any_of=any_of, answer=answer, measure=self.measure or question.measure)


def _value(row: Mapping[str, Any], column: str, source: Source) -> object:
    """What a column holds; a column of that very name first, then ``a.b`` as ``b`` inside ``a``."""
    if column in row:
        return row[column]
    value: object = row
    for part in column.split("."):
        if not isinstance(value, Mapping) or part not in value:
            raise InputError(f"{source.where} has no column {column!r}; it has {', '.join(map(str, row))}"[:1500])
        value = value[part]
    return value
