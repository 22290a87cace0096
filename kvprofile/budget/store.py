"""Reading and writing budget files: the only place that knows their bytes and their names."""

from __future__ import annotations

import os
import re
from pathlib import Path

from pydantic import ValidationError

from kvprofile.budget.profile import SCHEMA_VERSIONS, Geometry, Profile
from kvprofile.errors import InputError
from kvprofile.files import BUDGET_DIR, json_bytes, read_json, write_atomically

MAX_FILE_BYTES = 64 * 1024 * 1024


def file_name(model_name: str) -> str:
    """'Qwen/Qwen2.5-14B' -> 'Qwen--Qwen2.5-14B.json', never a path. Raises InputError where nothing is left of it."""
    safe = re.sub(r"[^A-Za-z0-9._-]+", "-", model_name.replace("/", "--")).strip(".-")
    if not safe:
        raise InputError(f"cannot make a file name from model name {model_name!r}; give --output")
    return f"{safe}.json"


def default_path(model_name: str) -> Path:
    """Where the budget file of a model lies unless it is told otherwise. Raises InputError as ``file_name``."""
    return BUDGET_DIR / file_name(model_name)


def is_file(path: Path) -> bool:
    """As Path.is_file, but False where that raises: a name too long for the system, no permission above."""
    return os.path.isfile(path)  # noqa: PTH113


def is_dir(path: Path) -> bool:
    """As Path.is_dir, but False where that raises."""
    return os.path.isdir(path)  # noqa: PTH112


def exists(path: Path) -> bool:
    """As Path.exists, but False where that raises."""
    return os.path.exists(path)  # noqa: PTH110


def to_bytes(profile: Profile) -> bytes:
    """The file's bytes: sorted keys, two-space indent, one line for each layer of a matrix."""
    return json_bytes(profile.model_dump(mode="json"))


def save(profile: Profile, path: Path) -> None:
    """Write a profile atomically. Raises InputError where that fails; then nothing has changed."""
    write_atomically(path, to_bytes(profile))


def load(path: Path) -> Profile:
    """Read one budget file. Raises InputError with every problem of the file in one line."""
    found = problems(path)
    if isinstance(found, Profile):
        return found
    raise InputError(f"{path}: {'; '.join(found)}")


def problems(path: Path) -> Profile | list[str]:
    """The profile in a file or, where it has problems, one phrase for each."""
    try:
        raw = read_json(path, MAX_FILE_BYTES, "budget file")
    except ValueError as error:
        return [str(error)]
    if not isinstance(raw, dict):
        return ["not a budget file: the top level is not an object"]
    if "format" in raw and "schema_version" not in raw:
        return ["it is a runtime file, which vLLM reads; give the budget file that it was exported from"]
    version = raw.get("schema_version")
    if version not in SCHEMA_VERSIONS or isinstance(version, bool):
        return [f"schema_version is {version!r:.40}, this kvprofile reads {' and '.join(map(str, SCHEMA_VERSIONS))}"]
    try:
        return Profile.model_validate(raw)
    except ValidationError as error:
        return phrases(error)


def refuse_other_model(path: Path, name: str, geometry: Geometry) -> None:
    """Raise InputError if ``path`` holds anything but a budget file of the same model; no file is fine."""
    if not exists(path):
        return
    found = problems(path)
    if not isinstance(found, Profile):
        raise InputError(f"{path} exists and is not a readable budget file ({found[0]}); pass --force to replace it")
    if found.model.name != name or found.model.geometry != geometry:
        raise InputError(
            f"{path} belongs to {found.model.name}, {found.model.geometry.describe()}, not to {name}, "
            f"{geometry.describe()}; pass --force or another --output"
        )


def phrases(error: ValidationError) -> list[str]:
    """One phrase for each problem that pydantic found: 'model.geometry.layers: Input should be a valid integer'."""
    return [_phrase(item["loc"], item["msg"]) for item in error.errors(include_url=False, include_input=False)]


def _phrase(location: tuple[int | str, ...], message: str) -> str:
    message = message.removeprefix("Value error, ")
    message = message if len(message) <= 1000 else f"{message[:1000]} …"
    place = ".".join(str(part) for part in location)
    return f"{place}: {message}" if place else message
