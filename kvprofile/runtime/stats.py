"""Numbers that cross processes: the scheduler counts, ``/metrics`` and the statistics file show.

vLLM's scheduler and its HTTP server are different processes, and its own statistics have no room for plugins. So the
process that configures the engine makes a small file, whose name its children inherit, and the scheduler maps it into
memory: counting costs a store. Under data parallelism each replica has a scheduler, and each that counts adds a record
of its own to the file. Standard library only; ``metrics`` speaks Prometheus.

Where a statistics file is asked for, it gets two kinds of lines: what the pool holds (``kv_bytes_in_use`` and the
counters), at most once a second, and for each request whose blocks went back a line with its ``request_id``. A request
that was preempted has a line for each time it was admitted. ``engine`` is the replica, by vLLM's number.
"""

from __future__ import annotations

import atexit
import fcntl
import json
import mmap
import multiprocessing
import os
import re
import struct
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from kvprofile.runtime.settings import SHARED, from_environment

FIELDS = (
    "kv_blocks_reclaimed_total",
    "kv_bytes_reclaimed_total",
    "kv_bytes_in_use",
    "kv_block_bytes",
    "kv_blocks_kept_total",
    "kv_move_microseconds_total",
)
SECONDS_BETWEEN_LINES = 1.0

_RECORD = struct.Struct(f"={1 + len(FIELDS)}q")
"""The replica's number and 1, so that zeros are nobody's, then its values."""

_made: set[tuple[int, str]] = set()
"""Files that this process has made, with its id: a fork of it has made none."""


def share() -> None:
    """Make the file that this process and its children share; a second engine of this process starts it anew.

    A process that was given the file, as each of several API servers is, leaves it to the schedulers that count there.
    """
    path = os.environ.get(SHARED)
    if path is None or not Path(path).is_file():
        handle, path = tempfile.mkstemp(prefix="kvprofile-")
        os.close(handle)
        os.environ[SHARED] = path
        _made.add((os.getpid(), path))
        atexit.register(Path(path).unlink, missing_ok=True)
    if (os.getpid(), path) not in _made:
        return
    with Path(path).open("r+b") as file:  # never shorter: an earlier engine may have it mapped
        file.write(bytes(Path(path).stat().st_size))


def by_engine() -> dict[int, dict[str, int]]:
    """What each replica has counted so far, by its number; without those that have not begun a step."""
    found: dict[int, dict[str, int]] = {}
    content = Path(os.environ[SHARED]).read_bytes()
    whole = len(content) - len(content) % _RECORD.size
    for marked, *values in _RECORD.iter_unpack(content[:whole]):
        if marked:
            found[marked - 1] = _added(found.get(marked - 1), dict(zip(FIELDS, values, strict=True)))
    return found


def read() -> dict[str, int]:
    """What all replicas have counted so far, added up."""
    total: dict[str, int] | None = None
    for values in by_engine().values():
        total = _added(total, values)
    return total or dict.fromkeys(FIELDS, 0)


def _added(one: dict[str, int] | None, other: dict[str, int]) -> dict[str, int]:
    """The sum, but for the width of a block, of which the larger is taken."""
    if one is None:
        return other
    found = {name: one[name] + other[name] for name in FIELDS}
    found["kv_block_bytes"] = max(one["kv_block_bytes"], other["kv_block_bytes"])
    return found


def engine_of_process() -> int:
    """The number of the replica whose scheduler runs in this process: vLLM tells it by the process's name alone."""
    found = re.search(r"_DP(\d+)(?:_|$)", multiprocessing.current_process().name)
    return int(found[1]) if found else 0


@dataclass
class Life:
    """Blocks of one request in one group of trimmed heads, from its admission until it gives all back.

    ``table`` counts those it would hold at its end had nothing been trimmed, as groups of full heads do; ``kept`` those
    that it took for the tokens of graded heads that stay.
    """

    after_prefill: int | None = None
    after_trim: int | None = None
    at_end: int = 0
    table: int = 0
    reclaimed: int = 0
    kept: int = 0

    def ended(self, held: int, table: int) -> None:
        """Note what it holds at its end."""
        self.at_end, self.table = held, table


@dataclass
class _Sums:
    """Lives of one request in the groups seen so far."""

    lives: list[Life] = field(default_factory=list)

    def line(self, full_groups: int) -> dict[str, int | None]:
        """Blocks over all groups with budgets; None for what a request that never decoded has not."""
        first = self.lives[0]
        trimmed = first.after_prefill is not None
        prefilled = first.after_prefill or 0
        return {
            "blocks_after_prefill": (full_groups + len(self.lives)) * prefilled if trimmed else None,
            "blocks_after_trim": full_groups * prefilled + self._total("after_trim") if trimmed else None,
            "blocks_at_end": full_groups * first.table + self._total("at_end"),
            "blocks_reclaimed": self._total("reclaimed"),
            "blocks_kept": self._total("kept"),
        }

    def _total(self, name: str) -> int:
        return sum(getattr(life, name) or 0 for life in self.lives)


class Counters:
    """The scheduler's side of the shared file, and of the statistics file where one is asked for."""

    def __init__(self, shared: Path, lines: Path | None, engine: int = 0) -> None:
        self._engine = engine
        with shared.open("r+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)  # replicas start at the same time
            size = file.seek(0, os.SEEK_END)
            self._place = size + -size % _RECORD.size
            file.truncate(self._place + _RECORD.size)
            self._map = mmap.mmap(file.fileno(), self._place + _RECORD.size)
            fcntl.flock(file, fcntl.LOCK_UN)  # the map keeps the file open, and would keep it locked
        self._values = dict.fromkeys(FIELDS, 0)
        self._lines = lines
        self._next_line = 0.0
        self._lives: dict[str, _Sums] = {}

    def reclaimed(self, blocks: int, block_bytes: int) -> None:
        """Count blocks that went back to the pool while their request went on."""
        self._set("kv_blocks_reclaimed_total", self._values["kv_blocks_reclaimed_total"] + blocks)
        self._set("kv_bytes_reclaimed_total", self._values["kv_bytes_reclaimed_total"] + blocks * block_bytes)

    def kept(self, blocks: int) -> None:
        """Count blocks that requests took for the tokens of graded heads that stay."""
        self._set("kv_blocks_kept_total", self._values["kv_blocks_kept_total"] + blocks)

    def moved(self, seconds: float) -> None:
        """Count time that a worker spent on moving such tokens, on the host."""
        self._set("kv_move_microseconds_total", self._values["kv_move_microseconds_total"] + round(1e6 * seconds))

    def in_use(self, blocks: int, block_bytes: int) -> None:
        """Note what requests hold as a step begins; at most once a second that makes a line."""
        self._set("kv_block_bytes", block_bytes)
        self._set("kv_bytes_in_use", blocks * block_bytes)
        now = time.monotonic()
        if self._lines is not None and now >= self._next_line:
            self._next_line = now + SECONDS_BETWEEN_LINES
            self._write(self._values)

    def gave_back(self, request_id: str, life: Life, groups: tuple[int, int], block_bytes: int) -> None:
        """Note a life that ended in a group of trimmed heads; of groups (full, streaming) the last makes a line."""
        if self._lines is None:
            return
        sums = self._lives.setdefault(request_id, _Sums())
        sums.lives.append(life)
        full_groups, stream_groups = groups
        if len(sums.lives) >= stream_groups:
            found = self._lives.pop(request_id).line(full_groups)
            self._write({"request_id": request_id, "block_bytes": block_bytes, **found})

    def _write(self, line: Mapping[str, object]) -> None:
        if self._lines is not None:
            with self._lines.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"time": time.time(), "engine": self._engine, **line}) + "\n")

    def _set(self, name: str, value: int) -> None:
        if self._values[name] != value:
            self._values[name] = value
            _RECORD.pack_into(self._map, self._place, self._engine + 1, *self._values.values())


@cache
def counters() -> Counters:
    """The counters of this process; its cache managers share them.

    On a machine that the file of the configuring process did not reach, they are that machine's alone.
    """
    share()
    return Counters(Path(os.environ[SHARED]), from_environment(os.environ).stats, engine_of_process())
