"""The record of an evaluation: one line for each question and variant, kept so that an interrupted run continues.

A folder holds ``run.json`` (what was asked of which model with what), ``items.jsonl`` and, at the end,
``summary.json``. An exercise's lines are written together; exercises are written in the order of the plan.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from kvprofile.errors import InputError
from kvprofile.files import holdings, missing_folders, refuse_links, write_atomically

RUN, ITEMS, SUMMARY = "run.json", "items.jsonl", "summary.json"
DIGITS = 6
"""Significant digits of measured numbers."""


@dataclass(frozen=True)
class Item:
    """What one variant made of one question.

    - ``exercise``: task/length/number; ``length``: context tokens asked for, null for documents of files.
    - ``context_tokens``: tokens prefilled, prefix and context; ``depth``, ``outside``: as in ``asking.Asked``.
    - ``retention_realised``: bytes of keys and values held after the trim, as a share of the full cache's.
    - ``reference_tokens``: tokens of the reference answer and its end; ``tokens_right``: how many of them are the first
      choice behind the ones before; ``exact``: all are, so greedy decoding writes the reference.
    - ``right``: the greedy answer holds what is expected, null where the context is asked back; ``accuracy``: 1 or 0
      for right, the share of tokens right where the context is asked back.
    - ``nll``: mean negative log likelihood of the reference tokens, nats; ``agreement``: share of them where the first
      choice is the full cache's; ``kl``: mean KL divergence of the next token from the full cache's, nats, over at
      most 128 of them.
    - ``generated``: the answer written, null where it is the reference or none was asked for; ``generated_tokens``:
      its length without the end, and that of the reference where it is exact.
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

    @property
    def length_inflation(self) -> float | None:
        """Tokens generated for each token of the reference; None where nothing is generated."""
        if self.generated_tokens is None:
            return None
        return self.generated_tokens / max(1, self.reference_tokens - 1)

    def to_line(self) -> str:
        """The item as one line of JSON, its measured numbers rounded."""
        rounded = {name: _rounded(value) for name, value in asdict(self).items()}
        return json.dumps(rounded, ensure_ascii=False, allow_nan=False) + "\n"


def read_items(path: Path) -> list[Item]:
    """The items of a file. Raises InputError where it is missing or holds anything else."""
    try:
        lines = [f"{line}\n" for line in path.read_bytes().decode().removesuffix("\n").split("\n")]
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read {path}: {error}") from error
    found = [_parse(line) for line in lines]
    items = [item for item in found if item is not None]
    if len(items) < len(found):
        raise InputError(f"{path}: line {found.index(None) + 1} is no item of an evaluation")
    return items


class ItemStore:
    """The folder of one evaluation. ``run_key`` names everything its items depend on."""

    def __init__(self, folder: Path, run_key: str) -> None:
        self.folder, self.run_key = folder, run_key
        self._made: list[Path] = []
        self._mine = False

    @property
    def path(self) -> Path:
        """The file of items."""
        return self.folder / ITEMS

    def open(self, run: Mapping[str, Any], exercises: Sequence[tuple[str, int]], force: bool = False) -> int:
        """Prepare the folder; returns how many of the exercises (name, number of items), in order, are finished.

        ``run`` is what ``run.json`` will say. A half-written end is cut off. Raises InputError where the folder holds
        an evaluation with other settings, unless ``force``, and where it holds anything else.
        """
        same = self.refuse_foreign(force)
        self._mine = True
        if not same:
            self._remove_files()
            self._made = missing_folders(self.folder)
            write_atomically(self.folder / RUN, document({"run_key": self.run_key, **run}))
        finished, size = self._finished(exercises)
        try:
            with open(self.path, "ab") as stream:
                stream.truncate(size)
                os.fsync(stream.fileno())
        except OSError as error:
            raise InputError(f"cannot write {self.path}: {error.strerror or error}; choose another --output") from error
        return finished

    def append(self, items: Sequence[Item]) -> None:
        """Write the items of an exercise at once. Raises InputError where the disk is full."""
        try:
            with open(self.path, "ab") as stream:
                stream.write("".join(item.to_line() for item in items).encode())
                stream.flush()
                os.fsync(stream.fileno())
        except OSError as error:
            raise InputError(
                f"cannot write {self.path}: {error.strerror or error}; free space and run the same command again"
            ) from error

    def discard_if_empty(self) -> None:
        """Remove the folder, and those made on the way to it, unless it holds an item."""
        if not self._mine or (self.path.is_file() and self.path.stat().st_size):
            return
        self._remove_files()
        for folder in self._made:
            with contextlib.suppress(OSError):
                folder.rmdir()

    def items(self) -> list[Item]:
        """All items written so far, as they stand in the file."""
        return read_items(self.path)

    def save_summary(self, summary: Mapping[str, Any]) -> None:
        """Write ``summary.json``."""
        write_atomically(self.folder / SUMMARY, document(summary))

    def refuse_foreign(self, force: bool = False) -> bool | None:
        """Whether the folder holds this run; None where it holds nothing. Raises InputError as ``open``."""
        refuse_links(self.folder)
        same = self._same_run()
        if same is False and not force:
            raise InputError(
                f"{self.folder} holds an evaluation with other settings; pass --force to replace it or another --output"
            )
        return same

    def _same_run(self) -> bool | None:
        """Whether the folder belongs to this run; None where nothing is in it. Raises InputError for other things."""
        if not self.folder.exists():
            return None
        if not self.folder.is_dir() or (not (self.folder / RUN).is_file() and holdings(self.folder)):
            raise InputError(f"{self.folder} exists and is no evaluation's folder; move it or choose another --output")
        if not (self.folder / RUN).is_file():
            return None
        try:
            found = json.loads((self.folder / RUN).read_bytes())
        except (OSError, ValueError, RecursionError):
            return False
        return isinstance(found, dict) and found.get("run_key") == self.run_key

    def _remove_files(self) -> None:
        for name in (ITEMS, SUMMARY, RUN):  # RUN last: a folder without it passes for someone else's
            with contextlib.suppress(OSError):
                (self.folder / name).unlink()

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


def document(content: Mapping[str, Any]) -> bytes:
    """A JSON file's bytes, the same for the same content."""
    return (json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()


def _rounded(value: Any) -> Any:
    return float(f"{value:.{DIGITS}g}") if isinstance(value, float) else value


def _parse(line: str) -> Item | None:
    """The item of a whole line; None for anything else."""
    try:
        found = json.loads(line) if line.endswith("\n") else None
        return Item(**found) if isinstance(found, dict) and set(found) == _NAMES else None
    except (ValueError, RecursionError):
        return None


_NAMES = {field.name for field in fields(Item)}
