"""Writing results so that a reader never meets half a file, JSON of stable bytes, and hashing what was read."""

from __future__ import annotations

import hashlib
import json
import os
import stat
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from kvprofile.errors import InputError

BUDGET_DIR = Path("models/kv_budget")
"""Where budget files are kept, below the folder in which a command or vLLM is started."""

MAX_FILE_BYTES = 64 * 2**20
"""Of a file of numbers; texts may be larger."""

MAX_TEXT_BYTES = 2**30

LOCK, PARTIAL = ".lock", ".partial"


def write_atomically(path: Path, content: bytes) -> None:
    """Write ``content`` to ``path`` through a temporary file in the same folder, fsync and rename.

    Folders on the way are made. Raises InputError where the disk is full or the place cannot be written; then
    ``path`` is as it was and no temporary file is left. What killed processes left of the same path is removed.
    """
    partial: Path | None = None
    try:
        path = path.resolve()  # a link stays a link, and what it points to is replaced
        path.parent.mkdir(parents=True, exist_ok=True)
        prefix = f".{path.name[:80]}."
        _remove_abandoned(path.parent, prefix)
        handle, partial = _temporary(path.parent, prefix)
        with open(handle, "wb") as stream:  # locked as long as it is open
            stream.write(content)
            stream.flush()
            os.fsync(handle)
            partial.chmod(0o666 & ~_umask())
            partial.replace(path)
        partial = None
    except (OSError, RuntimeError) as error:  # RuntimeError: links in a circle, up to Python 3.12
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"cannot write {path}: {reason}; free space or choose another --output") from error
    finally:
        if partial is not None:
            partial.unlink(missing_ok=True)


@contextmanager
def alone(lock: Path, output: Path) -> Iterator[None]:
    """Keep other kvprofile processes away from ``output`` while the block lasts, by a lock on the file ``lock``.

    The lock ends with the process, however that ends; its file and folders made for it go with the block. Raises
    InputError where another process has it. File systems without locks keep nobody away.
    """
    made = _missing_folders(lock.parent)
    handle = -1
    try:
        try:
            lock.parent.mkdir(parents=True, exist_ok=True)
            while handle == -1:
                handle = os.open(lock, os.O_RDWR | os.O_CREAT, 0o666)
                if _lock(handle) is False:
                    raise InputError(
                        f"another kvprofile process is writing {output}; wait for it or choose another --output"
                    )
                if not _is_open_at(handle, lock):  # its last holder has just removed it
                    os.close(handle)
                    handle = -1
        except OSError as error:
            raise InputError(f"cannot write {output}: {error.strerror or error}; choose another --output") from error
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)
    finally:
        if handle != -1:
            os.close(handle)
        for folder in made:
            with suppress(OSError):
                folder.rmdir()


def is_temporary(name: str) -> bool:
    """Whether a file of this name is being written, or was left half-written by a process that was killed."""
    return name.startswith(".") and name.endswith(PARTIAL)


def _temporary(folder: Path, prefix: str) -> tuple[int, Path]:
    """A new file, open and locked, so that it does not pass for abandoned."""
    while True:
        handle, name = tempfile.mkstemp(prefix=prefix, suffix=PARTIAL, dir=folder)
        if _lock(handle) is not False and _is_open_at(handle, Path(name)):
            return handle, Path(name)
        os.close(handle)


def _remove_abandoned(folder: Path, prefix: str) -> None:
    """Remove temporary files whose process is gone: their locks can be had."""
    with suppress(OSError):  # a folder that may be written and not listed
        for path in folder.iterdir():
            if path.name.startswith(prefix) and is_temporary(path.name) and path.is_file():
                handle = os.open(path, os.O_RDWR | os.O_NOFOLLOW)
                try:
                    if _lock(handle):
                        path.unlink()
                finally:
                    os.close(handle)


def _lock(handle: int) -> bool | None:
    """Take an open file's lock; False where another process has it, None where there are no locks."""
    if sys.platform == "win32":
        return None
    import fcntl

    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _is_open_at(handle: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), path.stat())
    except FileNotFoundError:
        return False


def require_writable(path: Path) -> None:
    """Raise InputError now if ``path`` could not be written later: before hours of work, not after."""
    made: list[Path] = []
    try:
        if path.is_dir():  # raises where the name is too long
            raise InputError(f"cannot write {path}: it is a folder; give a file name")
        if path.exists() and not path.is_file():
            raise InputError(f"cannot write {path}: it is not a regular file; choose another --output")
        made += _missing_folders(path.parent)
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent) as probe:
            probe.write(b"\0" * 4096)
            probe.flush()
        if path.exists() and not os.access(path, os.W_OK):
            raise PermissionError(13, "the file is read-only")
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}; choose another --output") from error
    finally:
        for folder in made:
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()


def _missing_folders(path: Path) -> list[Path]:
    """``path`` and those of its parents that do not exist yet, innermost first."""
    return [folder for folder in (path, *path.parents) if not folder.exists()]


def json_bytes(value: Any) -> bytes:
    """JSON that diffs well, equal for equal content: sorted keys, two-space indent, one line for a list of numbers."""
    return (_render(value, 0) + "\n").encode()


def _render(value: Any, depth: int) -> str:
    indent, closing = "  " * (depth + 1), "  " * depth
    if isinstance(value, dict) and value:
        lines = [f"{indent}{json.dumps(key)}: {_render(value[key], depth + 1)}" for key in sorted(value)]
        return "{\n" + ",\n".join(lines) + f"\n{closing}}}"
    if isinstance(value, list) and any(isinstance(item, (dict, list)) for item in value):
        return "[\n" + ",\n".join(indent + _render(item, depth + 1) for item in value) + f"\n{closing}]"
    return json.dumps(value, ensure_ascii=False, allow_nan=False)


def document(content: Mapping[str, Any]) -> bytes:
    """JSON in the order given, two-space indent: for a file that is read from its top."""
    return (json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()


def read_bytes(path: Path, most: int = MAX_FILE_BYTES) -> bytes:
    """A file's content. Raises InputError where it cannot be read, is not a file, or is larger than ``most`` bytes."""
    try:
        if path.exists() and not path.is_file() and not path.is_dir():  # a pipe or device would be read for ever
            raise InputError(f"{path}: not a regular file")
        with open(path, "rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            content = b"" if size > most else stream.read(most + 1)
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot read: {getattr(error, 'strerror', None) or error}") from error
    if max(size, len(content)) > most:
        raise InputError(f"{path}: larger than {most // 2**20} MiB; no such file is that large")
    return content


def read_json(path: Path, max_bytes: int, kind: str) -> Any:
    """The JSON of a file. Raises ValueError with one phrase that says why it is not a ``kind``: 'budget file'."""
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode) and not stat.S_ISDIR(found.st_mode):  # would be read for ever
            raise ValueError(f"not a regular file; not a {kind}")
        if found.st_size > max_bytes:
            raise ValueError(f"larger than {max_bytes // 2**20} MiB; not a {kind}")
        return parse_json(path.read_bytes(), kind)
    except OSError as error:
        raise ValueError(f"cannot read: {error.strerror}") from error


def parse_json(content: bytes, kind: str, constant: Callable[[str], Any] | None = None) -> Any:
    """The JSON in ``content``. Raises ValueError as ``read_json`` does. ``constant`` reads NaN and the infinities.

    Refused is what readers disagree about and what no measurement reaches: NaN and infinities, a key twice, whole
    numbers of more than 64 bits, others from 1e100.
    """
    try:
        return json.loads(
            content.decode("utf-8"),
            parse_constant=constant or _no_constant,
            parse_int=_integer,
            parse_float=_float,
            object_pairs_hook=_once,
        )
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 at byte {error.start}; not a {kind}") from error
    except RecursionError as error:
        raise ValueError("not JSON: nested too deep") from error
    except ValueError as error:
        raise ValueError(f"not JSON: {error}") from error


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is not allowed")


def _integer(text: str) -> int:
    if len(text) > 20 or not -(2**63) <= (value := int(text)) < 2**64:
        raise ValueError(f"a whole number of {len(text)} digits is not allowed")
    return value


def _float(text: str) -> float:
    value = float(text)
    if not -1e100 < value < 1e100:
        raise ValueError(f"{text[:20]} is not allowed")
    return value


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{twice[:40]!r} is there twice")
    return found


def bundled_model(reference: str) -> Path | None:
    """The folder of the bundled checkpoint where ``reference`` means it and no folder of that name lies here.

    The docs call it models/pocket. From an installed package that would be a name to ask the hub for.
    """
    if reference not in ("pocket", "models/pocket") or os.path.exists(reference):  # noqa: PTH110
        return None
    inside = Path(__file__).resolve().parent / "data" / "pocket"
    found = inside if inside.is_dir() else Path(__file__).resolve().parents[1] / "models" / "pocket"
    return found if found.is_dir() else None


def sha256_of(*parts: bytes) -> str:
    """Hex digest over the parts, each preceded by its length so that no two lists of parts collide."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.hexdigest()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
