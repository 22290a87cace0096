"""What a benchmark's child processes measure the same way on every side: seconds, and memory at its peak."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import resource
import time
from pathlib import Path

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def resident_bytes(field: str) -> int | None:
    """A size of this process by the kernel's name for it: VmRSS now, VmHWM at the peak; None outside Linux."""
    if not STATUS.exists():
        return None
    lines = (line.split() for line in STATUS.read_text().splitlines())
    return next((int(words[1]) * 1024 for words in lines if words[0] == f"{field}:"), None)


class Watch:
    """Seconds of named parts, and the peak of resident memory over what was resident at the start."""

    def __init__(self) -> None:
        gc.collect()
        with contextlib.suppress(OSError, AttributeError):  # glibc's own: what the warm-up freed is not used again
            ctypes.CDLL(None).malloc_trim(0)
        if CLEAR.exists():
            CLEAR.write_text("5")  # proc(5): the peak starts again from what is resident now
        self.before = resident_bytes("VmRSS") or 0
        self.last = time.perf_counter()
        self.seconds: dict[str, float] = {}

    def part(self, name: str) -> None:
        """What has passed since the last part, or the start, belongs to ``name``."""
        now = time.perf_counter()
        self.seconds[name] = self.seconds.get(name, 0.0) + now - self.last
        self.last = now

    def found(self) -> dict[str, float]:
        """Seconds by part, as NAME_s, and extra_bytes."""
        peak = resident_bytes("VmHWM") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        return {**{f"{name}_s": value for name, value in self.seconds.items()}, "extra_bytes": peak - self.before}
