"""Finished legs on disk, so that a benchmark that was stopped continues, and one of other settings never does."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from kvprofile.bench.scenario import BenchPlan, LegPlan
from kvprofile.budget.probe import path_of
from kvprofile.budget.store import file_name
from kvprofile.budget.trim import GRADED
from kvprofile.errors import InputError
from kvprofile.files import parse_json, write_atomically
from kvprofile.records.record import Leg, Request
from kvprofile.run_folder import RunFolder

RECORD, PARTS = "record.json", "parts"


class LegStore:
    """The folder of a benchmark: ``record.json`` for readers, and ``parts/`` with one file for each leg."""

    def __init__(self, folder: Path, plan: BenchPlan) -> None:
        self.plan = plan
        self.record, self.parts = folder / RECORD, folder / PARTS
        self._folder = RunFolder(
            folder, f"{PARTS}/plan", plan.run_key(), kind="a benchmark", files=(RECORD, f"{PARTS}/*")
        )

    @contextmanager
    def opened(self, force: bool) -> Iterator[None]:
        """The folder, for this process alone. Raises InputError as ``open``, and where another is at work in it."""
        with self._folder.alone(force, worth_keeping=self._has_legs):
            self.open(force)
            yield

    def open(self, force: bool) -> None:
        """Make the folder, or recognise it. Raises InputError where it holds something else."""
        self._folder.open(force=force)
        self._keep_profile()

    def path(self, leg: LegPlan, repetition: int, ending: str) -> Path:
        """A file of a leg: its record, its rows as they come, its server's log, its statistics."""
        return self.parts / f"{file_name(f'{repetition}-{leg.name}').removesuffix('.json')}.{ending}"

    @property
    def profile(self) -> Path:
        """The budget file as it was when the benchmark was planned: what legs are served with."""
        return self.parts / "profile"

    def finished(self, leg: LegPlan, repetition: int) -> Leg | None:
        """The leg if it ran to its end under the same settings."""
        found = self._read(self.path(leg, repetition, "leg"))
        if found is None or found.get("leg_key") != self.plan.leg_key(leg, repetition):
            return None
        try:
            return Leg.model_validate(found["leg"])
        except (ValidationError, KeyError):
            return None

    def save(self, plan: LegPlan, repetition: int, leg: Leg) -> None:
        """Keep a leg, finished or failed."""
        content = {"leg_key": self.plan.leg_key(plan, repetition), "leg": leg.model_dump(mode="json")}
        write_atomically(self.path(plan, repetition, "leg"), json.dumps(content).encode() + b"\n")
        self.forget_rows(plan, repetition)

    def forget_rows(self, leg: LegPlan, repetition: int) -> None:
        """Remove the rows of a leg that is kept."""
        self.path(leg, repetition, "rows").unlink(missing_ok=True)

    def rows(self, leg: LegPlan, repetition: int) -> Rows:
        """A fresh file for the rows of a leg that begins."""
        return Rows(self.path(leg, repetition, "rows"))

    def interrupted(self, leg: LegPlan, repetition: int) -> list[Request]:
        """Rows left by a leg whose benchmark was killed."""
        found = []
        with contextlib.suppress(OSError):
            for line in self.path(leg, repetition, "rows").read_bytes().splitlines():
                with contextlib.suppress(ValueError):
                    found.append(Request.model_validate(parse_json(line, "row")))
        return found

    def _has_legs(self) -> bool:
        """Whether there is a file of a leg: its record, its rows or its log."""
        return any(self.parts.glob("[0-9]*"))

    def _keep_profile(self) -> None:
        if self.plan.profile is None:
            return
        try:
            content = Path(self.plan.profile).read_bytes()
        except OSError as error:
            raise InputError(f"cannot read {self.plan.profile}: {error.strerror}; run the command again") from error
        if self.plan.profile_sha256 not in (None, hashlib.sha256(content).hexdigest()):
            raise InputError(f"{self.plan.profile} was changed while the benchmark started; run the command again")
        write_atomically(self.profile, content)
        if any(leg.heads == GRADED for leg in self.plan.legs):
            source = path_of(Path(self.plan.profile))
            try:
                write_atomically(path_of(self.profile), source.read_bytes())
            except OSError as error:
                raise InputError(f"cannot read {source}: {error.strerror}; run the command again") from error

    def _read(self, path: Path) -> dict[str, Any] | None:
        try:
            found = parse_json(path.read_bytes(), "leg")
        except (OSError, ValueError):
            return None
        return found if isinstance(found, dict) else None


class Rows:
    """Rows of a leg while it runs, one JSON line each, written as they come. Raises InputError on a full disk."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with self._on_disk():
            self._file = open(path, "wb")  # noqa: SIM115 - open as long as the leg runs

    def add(self, request: Request) -> None:
        """Append a row so that a crash keeps it."""
        with self._on_disk():
            self._file.write(request.model_dump_json().encode() + b"\n")
            self._file.flush()
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """No more rows."""
        with contextlib.suppress(OSError):  # of a full disk, said before
            self._file.close()

    @contextmanager
    def _on_disk(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise InputError(
                f"cannot write {self.path}: {error.strerror or error}; free space and run the same command again"
            ) from error
