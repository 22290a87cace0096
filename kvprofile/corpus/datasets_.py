r"""Data sets that ``datasets`` reads, local ones and those of the hub: one grammar and one loader for every command.

``datasets:ID_OR_PATH[:SPLIT[:CONFIG]][@COLUMN]``. A path that exists is taken as it is, colons and all; ``C:\data`` is
a path. A data set with one split needs no SPLIT; of several, one is named. CONFIG belongs to data sets of the hub and
to folders that have several. COLUMN is the column of texts, for a corpus.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvprofile.errors import InputError, first_line, plain

SCHEME = "datasets:"
USAGE = "datasets:ID_OR_PATH[:SPLIT[:CONFIG]][@COLUMN]"

_READERS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet", ".txt": "text"}
_SAVED = ("dataset_info.json", "dataset_dict.json")
_DRIVE = re.compile(r"[A-Za-z]:[\\/]")


@dataclass(frozen=True)
class DataSet:
    """What a reference names. Empty parts were not given."""

    path: str
    split: str = ""
    config: str = ""
    column: str = ""

    @property
    def is_local(self) -> bool:
        """Whether the path is a file or folder of this machine."""
        return _exists(self.path)

    @property
    def name(self) -> str:
        """The reference without the folders of a local path: records name no machine's paths."""
        where = plain(Path(self.path).name if self.is_local else self.path)
        parts = f":{self.split}:{self.config}" if self.config else f":{self.split}" if self.split else ""
        return f"{SCHEME}{where}{parts}{f'@{self.column}' if self.column else ''}"


@dataclass(frozen=True)
class LoadedSplit:
    """One split of a data set: its name, its rows and their columns in order."""

    name: str
    rows: Any
    columns: tuple[str, ...]


def parse(reference: str) -> DataSet:
    """The parts of ``datasets:...``. Raises InputError where it does not follow the grammar."""
    rest = reference.removeprefix(SCHEME)
    head, at, last = rest.rpartition("@")
    # a path may itself hold an @ or a colon: of both readings the one whose path exists, and of two the longer path
    readings = [(*_split_path(rest), ""), (*_split_path(head), last)] if at else [(*_split_path(rest), "")]
    local = [reading for reading in readings if _exists(reading[0])]
    path, tail, column = max(local, key=lambda reading: len(reading[0])) if local else readings[-1]
    if not column:
        tail, _, column = tail.partition("@")
    split, _, config = tail.partition(":")
    no_column = rest.endswith("@") and path != rest
    if not path or no_column or ":" in config or "@" in split + config + column:
        raise InputError(f"{reference}: use {USAGE}")
    return DataSet(path, split, config, column)


def load(reference: str, wanted: DataSet) -> LoadedSplit:
    """The split that a reference names. Raises InputError where it cannot be had, or where one of several is meant."""
    import datasets

    datasets.disable_progress_bars()
    try:
        name, rows = _load(reference, wanted)
        return LoadedSplit(name, rows, tuple(rows.column_names))
    except InputError:
        raise
    except Exception as error:  # datasets and its readers raise all kinds
        hint = f"; '{wanted.config}' is read as its configuration, a column of texts is written @{wanted.config}"
        told = f"cannot load the data set: {first_line(error)}"
        raise InputError(f"{reference}: {told}{hint if wanted.config else ''}") from error


def _load(reference: str, wanted: DataSet) -> tuple[str, Any]:
    """(name of the split, its rows)."""
    import datasets

    place = Path(wanted.path)
    is_saved = wanted.is_local and any((place / name).is_file() for name in _SAVED)
    is_file = wanted.is_local and place.is_file()
    if wanted.config and (is_saved or is_file):
        raise InputError(
            f"{reference}: a {'file' if is_file else 'saved data set'} has no configurations; "
            f"for a column of texts write @{wanted.config}"
        )
    if is_file and place.suffix not in _READERS:
        raise InputError(f"{reference}: datasets reads {', '.join(_READERS)} files")
    if is_saved:
        found = datasets.load_from_disk(wanted.path)
    elif is_file:
        found = datasets.load_dataset(_READERS[place.suffix], data_files=wanted.path)
    else:
        found = datasets.load_dataset(wanted.path, wanted.config or None, split=wanted.split or None)
    if isinstance(found, datasets.DatasetDict):
        chosen = wanted.split or (next(iter(found)) if len(found) == 1 else "")
        if chosen not in found:
            raise InputError(f"{reference}: choose one split of {', '.join(found)}: {USAGE}")
        return chosen, found[chosen]
    own = str(found.split or wanted.split or "train")
    if wanted.split and is_saved and wanted.split != own:
        raise InputError(f"{reference}: the data set has no split {wanted.split!r}, it is one split, {own}")
    return own, found


def _split_path(rest: str) -> tuple[str, str]:
    """The path, the longest that exists where one does, and what follows its colon."""
    parts = rest.split(":")
    first = 2 if _DRIVE.match(rest) else 1
    lengths = [count for count in range(len(parts), first, -1) if _exists(":".join(parts[:count]))]
    count = lengths[0] if lengths else first
    return ":".join(parts[:count]), ":".join(parts[count:])


def _exists(path: str) -> bool:
    try:
        return bool(path) and os.path.exists(path)  # noqa: PTH110 - Path.exists raises for names too long
    except ValueError:
        return False
