"""Documents of a benchmark: a text, questions about it with what answers must hold, and samples of a voice.

Where a model reads anything, documents are Markdown files with a ``.json`` of the same name next to them; the bundled
three have about 9,000 tokens each. models/pocket reads only what ``kvprofile.questions.tasks`` generates, so its
documents are made from a seed.
"""

from __future__ import annotations

import hashlib
import json
import random
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from kvprofile.budget.store import is_dir, is_file, phrases
from kvprofile.corpus.generate import blocks
from kvprofile.corpus.sources import documents_folder
from kvprofile.corpus.text_files import read_text
from kvprofile.errors import InputError, plain
from kvprofile.files import MAX_FILE_BYTES, read_bytes
from kvprofile.questions import tasks, user_tasks
from kvprofile.questions.judge import MEASURES, WITHOUT_CHOICES

BUNDLED, POCKET = "bundled", "pocket"
POCKET_TASKS = {"persona": 8000, "needle": 4000, "lookup": 3000}
"""A voice guide at the start, facts in filler of some kind, and a table, with the characters of each.

About 2,000 of models/pocket's tokens each, a length at which its card has figures.
"""

PURPOSE = "bench"
"""Documents made for this purpose are never used in training, scoring or evaluation."""


class BenchQuestion(BaseModel):
    """A question and what a right answer holds: ``expected`` strings (all, or with ``any_of`` one), a regular
    expression, a JSON schema. ``answer`` is a right answer in the reference's words; ``measure`` and ``choices`` say
    how it is compared with ``expected`` (``kvprofile.questions.judge``).
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    text: Annotated[str, Field(min_length=1)]
    answer: str | None = None
    expected: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    any_of: bool = False
    measure: str = "words"
    choices: tuple[str, ...] = ()
    pattern: str | None = None
    json_schema: dict[str, Any] | None = None
    in_voice: bool = False

    @model_validator(mode="after")
    def _measure_is_known(self) -> BenchQuestion:
        if self.measure not in (MEASURES if self.choices else WITHOUT_CHOICES):
            raise ValueError(f"measure is one of {', '.join(WITHOUT_CHOICES)}, and with choices letter or class")
        return self


class BenchDocument(BaseModel):
    """A text with its questions. ``voice_samples`` are passages in the voice that its guide asks for."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    text: Annotated[str, Field(min_length=1)]
    questions: Annotated[tuple[BenchQuestion, ...], Field(min_length=1)]
    voice_samples: tuple[str, ...] = ()

    @property
    def sha256(self) -> str:
        """Hash of the text."""
        return hashlib.sha256(self.text.encode()).hexdigest()


def load(references: tuple[str, ...]) -> list[BenchDocument]:
    """All documents of the references, in order.

    ``bundled``: the three long ones. ``pocket[:SEED]``: three that models/pocket understands. A folder of ``.md`` files
    with ``.json`` files of the same names, one such ``.md``, or a ``.jsonl`` of exercises as ``kvprofile evaluate``
    takes them. Raises InputError.
    """
    found = [document for reference in references for document in _load(reference)]
    names = [document.name for document in found]
    for name in names:
        if names.count(name) > 1:
            raise InputError(f"two documents are called {name}; rename one")
    if not found:
        raise InputError("give --documents: bundled, pocket, a folder, an .md or a .jsonl file")
    return found


def unique_opening(seed: int, request: int) -> str:
    """Words that no other request begins with, so that no cache of prefixes helps. Filler that models/pocket knows."""
    rng = random.Random(f"opening:{seed}:{request}")
    sentences = blocks("prose", rng)
    return " ".join(next(sentences) for _ in range(3))


def _load(reference: str) -> list[BenchDocument]:
    kind, _, rest = reference.partition(":")
    if kind == POCKET and (not rest or rest.isdecimal()):
        return pocket(int(rest or 0))
    if reference == BUNDLED:
        return _from_folder(documents_folder())
    path = Path(reference)
    if is_dir(path):
        return _from_folder(path)
    if is_file(path) and path.suffix == ".jsonl":
        return _from_exercises(reference)
    if is_file(path):
        return [_from_file(path)]
    raise InputError(f"no documents {reference!r}; give bundled, pocket[:SEED], a folder, an .md or a .jsonl file")


def pocket(seed: int, questions: int = 6) -> list[BenchDocument]:
    """Three generated documents with questions that models/pocket can answer."""
    return [
        _of_exercise(tasks.exercise(task, PURPOSE, seed, characters, questions), task)
        for task, characters in POCKET_TASKS.items()
    ]


def _of_exercise(exercise: tasks.Exercise, name: str) -> BenchDocument:
    asked = tuple(
        BenchQuestion(
            text=each.text,
            answer=each.answer,
            expected=each.expected,
            any_of=each.any_of,
            measure=each.measure,
            choices=each.choices,
        )
        for each in exercise.questions
    )
    return BenchDocument(name=name, text=exercise.context, questions=asked)


def _from_exercises(reference: str) -> list[BenchDocument]:
    brought = user_tasks.load(reference, contexts=10**6, questions=10**6)
    if any(exercise.conversation for exercise in brought.exercises):
        raise InputError(f"{reference}: a benchmark asks single questions; leave conversations to 'kvprofile evaluate'")
    name = plain(brought.name)[:180]
    return [_of_exercise(exercise, f"{name}/{number}") for number, exercise in enumerate(brought.exercises)]


def _from_folder(folder: Path) -> list[BenchDocument]:
    found = sorted(
        path
        for path in folder.iterdir()
        if path.suffix in (".md", ".txt") and path.name != "README.md" and path.is_file()
    )
    if not found:
        raise InputError(f"no .md files in {folder}")
    inside = folder.resolve()
    for path in found:  # what is read here is sent to providers
        if not path.resolve().is_relative_to(inside):
            raise InputError(f"{path} is a link out of its folder; copy the document there, or name it itself")
    return [_from_file(path) for path in found]


def _from_file(path: Path) -> BenchDocument:
    beside = path.with_suffix(".json")
    try:
        raw = json.loads(read_bytes(beside).decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{beside}: {error}") from error
    text = read_text(path, MAX_FILE_BYTES).replace("\r\n", "\n")
    if not isinstance(raw, dict):
        raise InputError(f'{beside} is not an object; write {{"questions": [...]}}')
    try:
        return BenchDocument(name=plain(path.stem)[:200], text=text, **raw)
    except (ValidationError, TypeError) as error:
        found = phrases(error) if isinstance(error, ValidationError) else [str(error)]
        raise InputError(f"{beside}: {'; '.join(found[:5])}") from error
