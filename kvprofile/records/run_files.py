"""Reading and writing run records: the only place that knows their bytes, and which files are some.

Result files of other tools are read into the same model (``registry``).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from kvprofile.budget.store import is_dir, phrases
from kvprofile.errors import InputError
from kvprofile.files import json_bytes, parse_json, read_json, write_atomically
from kvprofile.records.foreign import ResultFormat
from kvprofile.records.leg_names import leg_names, notes_about
from kvprofile.records.record import FORMAT, SCHEMA_VERSION, RunRecord
from kvprofile.records.registry import format_of, tools

MAX_FILE_BYTES = 512 * 1024 * 1024
_SHOWN_PROBLEMS = 5
_LINES = ".jsonl"


@dataclass(frozen=True)
class Collected:
    """Records by path, the JSON files that are none, and what a reader should know of how legs were told apart."""

    records: dict[Path, RunRecord]
    others: list[Path]
    notes: list[str]


def to_bytes(record: RunRecord) -> bytes:
    """The file's bytes, equal for equal records: sorted keys, two-space indent."""
    return json_bytes(record.model_dump(mode="json"))


def save(record: RunRecord, path: Path) -> None:
    """Write a record atomically. Raises InputError where that fails; then nothing has changed."""
    write_atomically(path, to_bytes(record))


def load(path: Path) -> RunRecord:
    """Read a run record or another tool's result. Raises InputError with the file's problems in one line."""
    raw = _read(path)
    if _is_own(raw):
        return _record(raw, path)
    form = _format_of(raw, path)
    place = form.place(path, raw)
    return _validated(lambda: form.to_record(raw, leg_names([place])[place.path]), path)


def collect(places: Iterable[Path]) -> Collected:
    """What files and folders hold, folders searched deeply.

    Raises InputError where a given file is not a record, a record is broken or of another version, or there is none.
    """
    places = list(places)
    found: dict[Path, Any] = {}
    others: list[Path] = []
    for path, given in _files(places):
        raw = _read(path) if given or path.suffix != _LINES else _read_lines(path)
        form = None if _is_own(raw) else format_of(raw)
        if given and not _is_own(raw):
            form = _format_of(raw, path)
        if _is_own(raw) or (form is not None and (given or not form.place(path, raw).part)):
            found[path] = raw
        elif form is None and path.suffix != _LINES:
            others.append(path)
    if not found:
        raise InputError(f"no run records in {', '.join(map(str, places))}; run 'kvprofile bench' to make some")
    # the legs of other tools get their names together, so that those tell them apart
    standing = {path: form.place(path, raw) for path, raw in found.items() if (form := format_of(raw)) is not None}
    names = leg_names(standing.values())
    records: dict[Path, RunRecord] = {}
    for path, raw in found.items():
        if path in standing:
            records[path] = _foreign_record(raw, path, names[standing[path].path])
        else:
            records[path] = _record(raw, path)
    foreign = [(standing[path].path, record) for path, record in records.items() if path in standing]
    return Collected(records, others, [*notes_about(foreign)])


def _files(places: Iterable[Path]) -> Iterator[tuple[Path, bool]]:
    """Every file to look at, once, and whether it was given by name."""
    seen: set[str] = set()
    for place in places:
        folder = is_dir(place)
        endings = ("*.json", f"*{_LINES}") if folder else ()
        inside = sorted(path for ending in endings for path in place.rglob(ending) if path.is_file())
        for path in inside if folder else [place]:
            real = os.path.realpath(path)  # Path.resolve raises for links in a circle
            if real not in seen:
                yield path, not folder
            seen.add(real)


def _is_own(raw: Any) -> bool:
    return isinstance(raw, dict) and raw.get("format") == FORMAT


def _format_of(raw: Any, path: Path) -> ResultFormat:
    found = format_of(raw)
    if found is None:
        raise InputError(f"{path}: not a run record of kvprofile, nor a result of {tools()}")
    return found


def _foreign_record(raw: Any, path: Path, name: str) -> RunRecord:
    return _validated(lambda: _format_of(raw, path).to_record(raw, name), path)


def _record(raw: dict[str, Any], path: Path) -> RunRecord:
    version = raw.get("schema_version")
    if version != SCHEMA_VERSION or isinstance(version, bool):
        raise InputError(
            f"{path}: schema_version of this run record is {version!r:.40}, this kvprofile reads {SCHEMA_VERSION}"
        )
    return _validated(lambda: RunRecord.model_validate(raw), path)


def _read(path: Path) -> Any:
    """The JSON of a file, or the list of its lines where those are results of another tool."""
    try:
        return read_json(path, MAX_FILE_BYTES, "run record")
    except ValueError as error:
        found = _read_lines(path)
        if found is None:
            raise InputError(f"{path}: {error}") from error
        return found


def _read_lines(path: Path) -> Any:
    """Another tool's result, NaN read as null, or the list of those that stand in lines; None where there is none.

    Raises InputError where a line after the first is broken.
    """
    try:
        if not path.is_file() or path.stat().st_size > MAX_FILE_BYTES:
            return None
        with path.open("rb") as stream:
            first = _lenient(stream.readline())
            if format_of(first) is None:  # a result over several lines; in .jsonl files there are none
                whole = _lenient(path.read_bytes()) if path.suffix != _LINES else None
                return whole if format_of(whole) is not None else None
            more = [line for line in stream if line.strip()]
    except OSError:
        return None
    found = [first, *map(_lenient, more)]
    if None in found:
        raise InputError(
            f"{path}: line {found.index(None) + 1} is not JSON; the run that wrote it may have been cut off"
        )
    return found if more else first


def _lenient(content: bytes) -> Any:
    """JSON in which NaN is null, as tools write it that found nothing to average; None for what is not JSON."""
    try:
        return parse_json(content, "result", constant=lambda _: None)
    except ValueError:
        return None


def _validated(make: Callable[[], RunRecord], path: Path) -> RunRecord:
    try:
        return make()
    except ValueError as error:
        found = phrases(error) if isinstance(error, ValidationError) else [str(error)]
        more = f"; and {len(found) - _SHOWN_PROBLEMS} more" if len(found) > _SHOWN_PROBLEMS else ""
        raise InputError(f"{path}: {'; '.join(found[:_SHOWN_PROBLEMS])}{more}") from error
