"""DuoAttention's patterns: a folder of ``attn_patterns/`` of github.com/mit-han-lab/duo-attention.

``full_attention_heads.tsv`` has L rows of G tab-separated gate values and no header; they are clipped to [0, 1] on
load. Of ``config.json`` consumers read ``sink_size`` and ``recent_size`` only. RLKV's ``adapter_weights.tsv`` has the
same form and no config.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kvprofile.budget import store
from kvprofile.budget.formats.base import (
    Export,
    ForeignScores,
    Format,
    require_geometry,
    require_matrix,
    single,
)
from kvprofile.budget.profile import Geometry, Matrix
from kvprofile.errors import InputError, plain
from kvprofile.files import LOCK, PARTIAL, alone, read_bytes, write_atomically

HEADS_FILE, CONFIG_FILE, RLKV_FILE = "full_attention_heads.tsv", "config.json", "adapter_weights.tsv"
_MAX_CONFIG_BYTES = 1024 * 1024
_MAX_TOKENS = 1_000_000


class DuoAttention(Format):
    """Gate values [L, G], sinks and window; the path is the folder or its .tsv file."""

    name = "duo-attention"
    holds = "scores"

    def read(self, paths: Sequence[Path], geometry: Geometry | None) -> ForeignScores:
        """Read one folder. Sinks and window are None where it has no config."""
        shape = require_geometry(geometry)
        heads = _heads_file(single(paths, self.name))
        matrix, clipped = _read_heads(heads)
        require_matrix(heads, matrix, shape)
        sink, recent = _read_config(heads.parent / CONFIG_FILE)
        return ForeignScores(
            method="rlkv" if heads.name == RLKV_FILE else "duo-attention",
            scores=matrix,
            dtype="text",
            files=(heads,),
            sink_tokens=sink,
            recent_tokens=recent,
            notes=f"gate values, {clipped} of {shape.layers * shape.kv_heads} clipped to [0, 1]",
        )

    def write(self, export: Export, path: Path) -> None:
        """Write the folder; its two files appear together where it is new, and one after the other where it is not."""
        rows = export.dense_scores(self.name)
        heads = "".join("\t".join(f"{value:.18e}" for value in row) + "\n" for row in rows)
        runtime = export.profile.runtime
        config = {
            "model_name": export.profile.model.name,
            "recent_size": runtime.recent_tokens,
            "sink_size": runtime.sink_tokens,
        }
        _replace_folder(path, {HEADS_FILE: heads.encode(), CONFIG_FILE: (json.dumps(config, indent=2) + "\n").encode()})

    def model_of(self, path: Path) -> str | None:
        """The model that the config of a folder, or next to its .tsv file, names."""
        try:
            folder = path if store.is_dir(path) else path.parent
            name = _config(folder / CONFIG_FILE).get("model_name")
        except InputError:
            return None
        return name if isinstance(name, str) else None

    def advice(self, export: Export) -> str | None:
        """How to ask DuoAttention for the asked retention."""
        if export.retention is None:
            return None
        return f"load it with sparsity={round(1.0 - export.retention, 6):g}; DuoAttention breaks ties by random noise"


def _heads_file(path: Path) -> Path:
    if not store.is_dir(path):
        return path
    for name in (HEADS_FILE, RLKV_FILE):
        if (path / name).is_file():
            return path / name
    raise InputError(f"{path} has no {HEADS_FILE}; give the folder of one model")


def _read_heads(path: Path) -> tuple[Matrix, int]:
    """Values clipped to [0, 1], and how many were outside."""
    try:
        lines = read_bytes(path).decode("utf-8").splitlines()
        rows = [[float(cell) for cell in line.split("\t")] for line in lines if line.strip()]
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 at byte {error.start}; not a table of numbers") from error
    except ValueError as error:
        raise InputError(f"{path}: not a table of tab-separated numbers ({plain(str(error)[:80])})") from error
    for number, row in enumerate(rows, start=1):
        if not all(math.isfinite(value) for value in row):
            raise InputError(f"{path}: row {number} has a value that is not finite")
    clipped = sum(not 0.0 <= value <= 1.0 for row in rows for value in row)
    return [[min(max(0.0, value), 1.0) for value in row] for row in rows], clipped


def _read_config(path: Path) -> tuple[int | None, int | None]:
    """(sink tokens, recent tokens), or None for both where there is no config."""
    if not path.is_file():
        return None, None
    config = _config(path)
    for key, least in (("sink_size", 0), ("recent_size", 1)):
        value = config.get(key)
        if type(value) is not int or not least <= value <= _MAX_TOKENS:
            raise InputError(f"{path}: {key} is {plain(repr(value)[:40])}, not a number of tokens")
    return config["sink_size"], config["recent_size"]


def _config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(read_bytes(path, _MAX_CONFIG_BYTES).decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not JSON ({plain(str(error)[:80])})") from error
    if not isinstance(config, dict):
        raise InputError(f"{path}: the top level is not an object with sink_size and recent_size")
    return config


def _replace_folder(path: Path, files: dict[str, bytes]) -> None:
    """Write files into a new folder next to ``path`` first; a failure leaves nothing of it."""
    path = path.resolve()
    partial, lock = (path.parent / f".{path.name[:80]}{ending}" for ending in (PARTIAL, LOCK))
    with alone(lock, path):
        try:
            shutil.rmtree(partial, ignore_errors=True)  # of a process that was killed: this one is alone here
            partial.mkdir()
            for name, content in files.items():
                write_atomically(partial / name, content)
            if path.exists():
                for name in files:
                    (partial / name).replace(path / name)
            else:
                partial.rename(path)
        except OSError as error:
            raise InputError(f"cannot write {path}: {error.strerror or error}; choose another --output") from error
        finally:
            shutil.rmtree(partial, ignore_errors=True)
