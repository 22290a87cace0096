"""The record of an evaluation: one line for each question and variant, kept so that an interrupted run continues.

A folder holds ``run.json`` (what was asked of which model with what), ``items.jsonl`` and, at the end,
``summary.json``. An exercise's lines are written together; exercises are written in the order of the plan.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, BinaryIO

from kvprofile.errors import InputError
from kvprofile.files import document, write_atomically
from kvprofile.run_folder import RunFolder

RUN, ITEMS, SUMMARY = "run.json", "items.jsonl", "summary.json"
DIGITS = 6
"""Significant digits of measured numbers."""

SPANS = ((1, 64), (65, 150), (151, None))
"""Tokens of a continued text that are reported apart, the first and the last of each; the window of a trimmed head has
moved past the prompt in the later ones."""


@dataclass(frozen=True)
class AnswerSpan:
    """The same figures as in an item, over tokens ``first`` to ``last`` of a continued text, counted from 1."""

    first: int
    last: int
    tokens_right: int
    nll: float
    agreement: float
    kl: float

    @property
    def reference_tokens(self) -> int:
        """Tokens of the span."""
        return self.last - self.first + 1

    @property
    def right_share(self) -> float:
        """Share of the span's tokens that are the first choice."""
        return self.tokens_right / self.reference_tokens


@dataclass(frozen=True)
class Item:
    """What one variant made of one question.

    - ``exercise``: task/length/number; ``length``: context tokens asked for, null for documents of files.
    - ``context_tokens``: tokens prefilled, prefix and context; ``depth``, ``outside``: as in ``asking.Asked``.
    - ``retention_realised``: bytes of keys and values held after the trim, as a share of the full cache's.
    - ``reference_tokens``: tokens of the reference answer and its end; ``tokens_right``: how many of them are the first
      choice after the ones before; ``exact``: all are, so greedy decoding writes the reference.
    - ``right``: the greedy answer is what is expected, null where the text is known and nothing answered; ``accuracy``:
      how far it is, by the question's measure, 0 to 1; the share of tokens right where nothing is answered. An answer
      that the full cache gets entirely wrong (accuracy 0) is not written under other budgets. It is wrong there too,
      unless greedy decoding writes the reference.
    - ``nll``: mean negative log likelihood of the reference tokens, nats; ``agreement``: share of them where the first
      choice is the full cache's; ``kl``: mean KL divergence of the next token from the full cache's, nats.
    - ``generated``: the answer written, null where it is the reference or none was asked for; ``generated_tokens``:
      its length without the end, and that of the reference where it is exact.
    - ``spans``: of a continued text, its figures for each of ``SPANS`` that it reaches; null for everything else.
    """

    exercise: str
    task: str
    length: int | None
    question: int
    variant: str
    context_tokens: int
    depth: float | None
    outside: bool | None
    retention_realised: float
    reference_tokens: int
    tokens_right: int
    exact: bool
    right: bool | None
    accuracy: float
    nll: float
    agreement: float
    kl: float
    generated: str | None
    generated_tokens: int | None
    spans: tuple[AnswerSpan, ...] | None = None

    @property
    def right_share(self) -> float:
        """Share of the reference tokens that are the first choice."""
        return self.tokens_right / self.reference_tokens

    @property
    def length_inflation(self) -> float | None:
        """Tokens generated for each token of the reference; None where nothing is generated."""
        if self.generated_tokens is None:
            return None
        return self.generated_tokens / max(1, self.reference_tokens - 1)

    def to_line(self) -> str:
        """The item as one line of JSON, its measured numbers rounded."""
        return json.dumps(rounded(asdict(self)), ensure_ascii=False, allow_nan=False) + "\n"


def read_items(path: Path) -> list[Item]:
    """The items of a file. Raises InputError where it is missing or holds anything else."""
    try:
        lines = [f"{line}\n" for line in path.read_bytes().decode().removesuffix("\n").split("\n")]
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read {path}: {error}") from error
    found = [_parse(line) for line in lines]
    items = [item for item in found if item is not None]
    if len(items) < len(found):
        raise InputError(f"{path}: line {found.index(None) + 1} is not an item of an evaluation")
    return items


class ItemStore:
    """The folder of one evaluation. ``run_key`` names everything its items depend on."""

    def __init__(self, folder: Path, run_key: str) -> None:
        self._folder = RunFolder(folder, RUN, run_key, kind="an evaluation", files=(ITEMS, SUMMARY))

    @property
    def path(self) -> Path:
        """The file of items."""
        return self._folder.path / ITEMS

    @contextmanager
    def opened(
        self, run: Mapping[str, Any], exercises: Sequence[tuple[str, int]], force: bool = False
    ) -> Iterator[int]:
        """The folder, for this process alone. Gives and raises as ``open``, and raises where another is at work there.

        Where the block fails before there is an item, the folder goes with it.
        """
        with self._folder.alone(force, worth_keeping=lambda: self.path.is_file() and self.path.stat().st_size):
            yield self.open(run, exercises, force)

    def open(self, run: Mapping[str, Any], exercises: Sequence[tuple[str, int]], force: bool = False) -> int:
        """Prepare the folder; returns how many of the exercises (name, number of items), in order, are finished.

        ``run`` is what ``run.json`` will say. A half-written end is cut off. Raises InputError where the folder holds
        an evaluation with other settings, unless ``force``, and where it holds anything else.
        """
        self._folder.open(run, force)
        finished, size = self._finished(exercises)
        with self._for_writing() as stream:
            stream.truncate(size)
        return finished

    def append(self, items: Sequence[Item]) -> None:
        """Write the items of an exercise at once. Raises InputError where the disk is full."""
        with self._for_writing() as stream:
            stream.write("".join(item.to_line() for item in items).encode())

    def items(self) -> list[Item]:
        """All items written so far, as they stand in the file."""
        return read_items(self.path)

    def save_summary(self, summary: Mapping[str, Any]) -> None:
        """Write ``summary.json``."""
        write_atomically(self._folder.path / SUMMARY, document(summary))

    @contextmanager
    def _for_writing(self) -> Iterator[BinaryIO]:
        """The file of items, at its end; what is done to it reaches the disk. Raises InputError where that fails."""
        try:
            with open(self.path, "ab") as stream:
                yield stream
                stream.flush()
                os.fsync(stream.fileno())
        except OSError as error:
            raise InputError(
                f"cannot write {self.path}: {error.strerror or error}; free space and run the same command again"
            ) from error

    def _finished(self, exercises: Sequence[tuple[str, int]]) -> tuple[int, int]:
        """(exercises whose items are all there, bytes of these items)."""
        lines = self._lines()
        size = 0
        for number, (name, count) in enumerate(exercises):
            block = [next(lines, b"") for _ in range(count)]
            if any((item := _parse(line.decode(errors="replace"))) is None or item.exercise != name for line in block):
                return number, size
            size += sum(map(len, block))
        return len(exercises), size

    def _lines(self) -> Iterator[bytes]:
        with contextlib.suppress(OSError), open(self.path, "rb") as stream:
            yield from stream


def rounded(value: Any) -> Any:
    """Numbers to ``DIGITS``, so that the last bits of a sum never differ between machines."""
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}")
    if isinstance(value, dict):
        return {name: rounded(each) for name, each in value.items()}
    return [rounded(each) for each in value] if isinstance(value, list | tuple) else value


def _parse(line: str) -> Item | None:
    """The item of a whole line; None for anything else."""
    try:
        found = json.loads(line) if line.endswith("\n") else None
        if not isinstance(found, dict) or set(found) | _NEWER != _NAMES:
            return None
        spans = found.get("spans")
        return Item(**{**found, "spans": None if spans is None else tuple(AnswerSpan(**each) for each in spans)})
    except (ValueError, TypeError, RecursionError):
        return None


_NAMES = {field.name for field in fields(Item)}
_NEWER = {"spans"}
"""Fields that items of version 0.1 do not have."""
