"""Numbers that cross processes: the scheduler counts, ``/metrics`` and the statistics file show.

vLLM's scheduler and its HTTP server are different processes, and its own statistics have no room for plugins. So the
process that configures the engine makes a small file, whose name its children inherit, and the scheduler maps it into
memory: counting costs a store. Standard library only; ``metrics`` speaks Prometheus.
"""

from __future__ import annotations

import atexit
import json
import mmap
import os
import struct
import tempfile
import time
from functools import cache
from pathlib import Path

from kvprofile.runtime.settings import SHARED, from_environment

FIELDS = ("kv_blocks_reclaimed_total", "kv_bytes_reclaimed_total", "kv_bytes_in_use")
SECONDS_BETWEEN_LINES = 1.0

_ENTRY = struct.Struct("=q")


def share() -> None:
    """Make the file that this process and its children share; a second engine starts it anew."""
    path = os.environ.get(SHARED)
    if path is None or not Path(path).is_file():
        handle, path = tempfile.mkstemp(prefix="kvprofile-")
        os.close(handle)
        os.environ[SHARED] = path
        atexit.register(Path(path).unlink, missing_ok=True)
    with Path(path).open("r+b") as file:  # never shorter: an earlier engine may have it mapped
        file.write(bytes(_ENTRY.size * len(FIELDS)))


def read() -> dict[str, int]:
    """What the scheduler has counted so far."""
    content = Path(os.environ[SHARED]).read_bytes()
    return {name: _ENTRY.unpack_from(content, _ENTRY.size * place)[0] for place, name in enumerate(FIELDS)}


class Counters:
    """The scheduler's side of the shared file, and of the statistics file where one is asked for."""

    def __init__(self, shared: Path, lines: Path | None) -> None:
        with shared.open("r+b") as file:
            self._map = mmap.mmap(file.fileno(), _ENTRY.size * len(FIELDS))
        self._values = dict.fromkeys(FIELDS, 0)
        self._lines = lines
        self._next_line = 0.0

    def reclaimed(self, blocks: int, block_bytes: int) -> None:
        """Count blocks that went back to the pool while their request went on."""
        self._set("kv_blocks_reclaimed_total", self._values["kv_blocks_reclaimed_total"] + blocks)
        self._set("kv_bytes_reclaimed_total", self._values["kv_bytes_reclaimed_total"] + blocks * block_bytes)

    def in_use(self, kv_bytes: int) -> None:
        """Note what requests hold as a step begins; at most once a second that makes a line."""
        self._set("kv_bytes_in_use", kv_bytes)
        now = time.monotonic()
        if self._lines is not None and now >= self._next_line:
            self._next_line = now + SECONDS_BETWEEN_LINES
            with self._lines.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"time": time.time(), **self._values}) + "\n")

    def _set(self, name: str, value: int) -> None:
        if self._values[name] != value:
            self._values[name] = value
            _ENTRY.pack_into(self._map, _ENTRY.size * FIELDS.index(name), value)


@cache
def counters() -> Counters:
    """The counters of this process; its cache managers share them."""
    return Counters(Path(os.environ[SHARED]), from_environment(os.environ).stats)
