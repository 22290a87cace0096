"""Reading and writing run records: the only place that knows their bytes, and which files are some.

Result files of `vllm bench serve` are read into the same model (``vllm_serve``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from kvprofile.budget.store import is_dir, phrases
from kvprofile.errors import InputError
from kvprofile.files import json_bytes, parse_json, read_json, write_atomically
from kvprofile.records import vllm_serve
from kvprofile.records.record import FORMAT, SCHEMA_VERSION, RunRecord

MAX_FILE_BYTES = 512 * 1024 * 1024
_SHOWN_PROBLEMS = 5


def to_bytes(record: RunRecord) -> bytes:
    """The file's bytes, equal for equal records: sorted keys, two-space indent."""
    return json_bytes(record.model_dump(mode="json"))


def save(record: RunRecord, path: Path) -> None:
    """Write a record atomically. Raises InputError where that fails; then nothing has changed."""
    write_atomically(path, to_bytes(record))


def load(path: Path) -> RunRecord:
    """Read a run record or a result of `vllm bench serve`. Raises InputError with the file's problems in one line."""
    found = _read(path)
    if not is_result(found):
        raise InputError(f"{path}: no run record of kvprofile and no result of `vllm bench serve`")
    return parse(found, str(path))


def parse(raw: Any, name: str) -> RunRecord:
    """The record in parsed JSON. Raises InputError, which calls the file ``name``."""
    if vllm_serve.is_result(raw):
        return _validated(lambda: vllm_serve.to_record(raw, Path(name).stem), name)
    version = raw.get("schema_version")
    if version != SCHEMA_VERSION or isinstance(version, bool):
        raise InputError(
            f"{name}: schema_version of this run record is {version!r:.40}, this kvprofile reads {SCHEMA_VERSION}"
        )
    return _validated(lambda: RunRecord.model_validate(raw), name)


def is_result(raw: Any) -> bool:
    """Whether parsed JSON calls itself a run record, or is a result of `vllm bench serve`."""
    return (isinstance(raw, dict) and raw.get("format") == FORMAT) or vllm_serve.is_result(raw)


def collect(places: Iterable[Path]) -> tuple[dict[Path, RunRecord], list[Path]]:
    """The records of files and folders by path, folders searched deeply; and the .json files there that are none.

    Raises InputError where a given file is no record, a record is broken or of another version, or there is none.
    """
    places = list(places)
    found: dict[Path, RunRecord] = {}
    others: list[Path] = []
    for place in places:
        if not is_dir(place):
            found[place] = load(place)
            continue
        for path in sorted(p for p in place.rglob("*.json") if p.is_file()):
            raw = _read(path)
            if is_result(raw):
                found[path] = parse(raw, str(path))
            else:
                others.append(path)
    if not found:
        raise InputError(f"no run records in {', '.join(map(str, places))}; run 'kvprofile bench' to make some")
    return found, others


def _read(path: Path) -> Any:
    try:
        return read_json(path, MAX_FILE_BYTES, "run record")
    except ValueError as error:
        lines = _lines(path)
        if lines is not None:
            return lines
        raise InputError(f"{path}: {error}") from error


def _lines(path: Path) -> dict[str, Any] | None:
    """The results that `vllm bench serve --append-result` wrote below each other; None where the file is no such."""
    try:
        if not path.is_file() or path.stat().st_size > MAX_FILE_BYTES:
            return None
        found = [parse_json(line, "run record") for line in path.read_bytes().splitlines() if line.strip()]
    except (OSError, ValueError):
        return None
    if not found or not all(vllm_serve.is_result(each) for each in found):
        return None
    return {"results": found}


def _validated(make: Callable[[], RunRecord], name: str) -> RunRecord:
    try:
        return make()
    except ValueError as error:
        found = phrases(error) if isinstance(error, ValidationError) else [str(error)]
        more = f"; and {len(found) - _SHOWN_PROBLEMS} more" if len(found) > _SHOWN_PROBLEMS else ""
        raise InputError(f"{name}: {'; '.join(found[:_SHOWN_PROBLEMS])}{more}") from error
