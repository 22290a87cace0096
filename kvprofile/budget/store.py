"""Reading and writing budget files: the only place that knows their bytes and their names."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from kvprofile.budget.profile import SCHEMA_VERSION, Geometry, Profile
from kvprofile.errors import InputError
from kvprofile.files import write_atomically

BUDGET_DIR = Path("models/kv_budget")
MAX_FILE_BYTES = 64 * 1024 * 1024


def file_name(model_name: str) -> str:
    """'Qwen/Qwen2.5-14B' -> 'Qwen--Qwen2.5-14B.json'; never a path, whatever the model is called."""
    safe = re.sub(r"[^A-Za-z0-9._-]+", "-", model_name.replace("/", "--")).strip(".-")
    if not safe:
        raise InputError(f"cannot make a file name from model name {model_name!r}; give --output")
    return f"{safe}.json"


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
    return (_render(profile.model_dump(mode="json"), 0) + "\n").encode()


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
        if path.stat().st_size > MAX_FILE_BYTES:
            return [f"larger than {MAX_FILE_BYTES // 2**20} MiB; not a budget file"]
        raw = json.loads(path.read_bytes().decode("utf-8"), parse_constant=_no_constant)
    except OSError as error:
        return [f"cannot read: {error.strerror}"]
    except UnicodeDecodeError as error:
        return [f"not UTF-8 at byte {error.start}; not a budget file"]
    except RecursionError:
        return ["not JSON: nested too deep"]
    except ValueError as error:
        return [f"not JSON: {error}"]
    if not isinstance(raw, dict):
        return ["not a budget file: the top level is not an object"]
    version = raw.get("schema_version")
    if version != SCHEMA_VERSION or isinstance(version, bool):
        return [f"schema_version is {version!r}, this kvprofile reads {SCHEMA_VERSION}"]
    try:
        return Profile.model_validate(raw)
    except ValidationError as error:
        return [_phrase(item["loc"], item["msg"]) for item in error.errors(include_url=False, include_input=False)]


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


def _phrase(location: tuple[int | str, ...], message: str) -> str:
    message = message.removeprefix("Value error, ")
    place = ".".join(str(part) for part in location)
    return f"{place}: {message}" if place else message


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is not allowed")


def _render(value: Any, depth: int) -> str:
    indent, closing = "  " * (depth + 1), "  " * depth
    if isinstance(value, dict) and value:
        lines = [f"{indent}{json.dumps(key)}: {_render(value[key], depth + 1)}" for key in sorted(value)]
        return "{\n" + ",\n".join(lines) + f"\n{closing}}}"
    if isinstance(value, list) and any(isinstance(item, (dict, list)) for item in value):
        return "[\n" + ",\n".join(indent + _render(item, depth + 1) for item in value) + f"\n{closing}]"
    return json.dumps(value, ensure_ascii=False, allow_nan=False)
