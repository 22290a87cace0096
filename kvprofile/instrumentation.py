"""What a vLLM engine holds while it serves: cache bytes, eviction, device and process memory.

``GPUMemoryManager`` looks at a server through its ``/metrics`` or at an engine in this process through the same
numbers, and writes JSON lines. What cannot be known is None, never a guess. ``RequestLog`` reads what the runtime
writes about single requests into ``LLM_KVZIP_STATS``.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from kvprofile.prometheus import metric_values, scrape


@dataclass(frozen=True)
class Look:
    """One look at an engine, or at all ``replicas`` behind a server together. Bytes and shares; None is unknown.

    ``eviction_ratio``: blocks that the trim freed, of all that prefills of finished requests took.
    """

    time: float
    cache_bytes_in_use: int | None = None
    cache_bytes_total: int | None = None
    cache_usage: float | None = None
    block_bytes: int | None = None
    block_tokens: int | None = None
    eviction_ratio: float | None = None
    device_memory_bytes: int | None = None
    process_memory_bytes: int | None = None
    running: int | None = None
    waiting: int | None = None
    preemptions: int | None = None
    kv_bytes_reclaimed: int | None = None
    replicas: int | None = None


@dataclass(frozen=True)
class CacheStatistics:
    """Blocks that one request held over all cache groups with budgets: when prefill ended, after the trim, at its end.

    None for a request that ended before its trim was due. ``blocks_kept``: those that it took for the tokens of graded
    heads that stay. ``lives`` counts its admissions: preemptions and one.
    """

    blocks_after_prefill: int | None
    blocks_after_trim: int | None
    blocks_at_end: int | None
    blocks_reclaimed: int
    block_bytes: int
    lives: int = 1
    blocks_kept: int = 0

    @property
    def eviction_ratio(self) -> float | None:
        """Share of the blocks after prefill that the trim freed."""
        if not self.blocks_after_prefill or self.blocks_after_trim is None:
            return None
        return 1.0 - self.blocks_after_trim / self.blocks_after_prefill


class RequestLog:
    """The lines about requests in a statistics file, from where it stood when this object was made."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._offset = path.stat().st_size if path.is_file() else 0
        self._found: dict[str, CacheStatistics] = {}

    def read(self) -> dict[str, CacheStatistics]:
        """Statistics by the engine's request id, as far as they are written."""
        try:
            with open(self.path, "rb") as file:
                file.seek(self._offset)
                content = file.read()
        except OSError:
            return self._found
        whole = content[: content.rfind(b"\n") + 1]
        self._offset += len(whole)
        for line in whole.splitlines():
            self._take(line)
        return self._found

    def of(self, request_id: str, wait_s: float = 0.0) -> CacheStatistics | None:
        """Statistics of the request whose id, or the engine's form of it, contains ``request_id``; None if unknown."""
        deadline = time.monotonic() + wait_s
        while True:
            found = [value for name, value in self.read().items() if is_request(name, request_id)]
            if found or time.monotonic() >= deadline:
                return found[-1] if found else None
            time.sleep(0.02)

    @property
    def eviction_ratio(self) -> float | None:
        """Blocks freed by trims, of all that prefills took, over the requests read so far."""
        known = [(s.blocks_after_prefill, s.blocks_after_trim) for s in self.read().values()]
        held = sum(before for before, after in known if before is not None and after is not None)
        freed = sum(before - after for before, after in known if before is not None and after is not None)
        return freed / held if held else None

    def _take(self, line: bytes) -> None:
        try:
            raw = json.loads(line)
        except ValueError:
            return
        if not isinstance(raw, dict) or "request_id" not in raw:
            return
        name = str(raw["request_id"])
        before = self._found.get(name)
        self._found[name] = CacheStatistics(
            blocks_after_prefill=raw.get("blocks_after_prefill"),
            blocks_after_trim=raw.get("blocks_after_trim"),
            blocks_at_end=raw.get("blocks_at_end"),
            blocks_reclaimed=raw.get("blocks_reclaimed", 0) + (before.blocks_reclaimed if before else 0),
            block_bytes=raw.get("block_bytes", 0),
            lives=(before.lives if before else 0) + 1,
            blocks_kept=raw.get("blocks_kept", 0) + (before.blocks_kept if before else 0),
        )


def is_request(engine_id: str, request_id: str) -> bool:
    """Whether the engine's id is that of a request: vLLM puts an endpoint before it and eight characters after it."""
    head, dash, tail = engine_id.rpartition("-")
    core = head if dash and len(tail) == 8 else engine_id
    for prefix in ("chatcmpl-", "cmpl-"):
        core = core.removeprefix(prefix)
    return request_id in (engine_id, core) or core.rpartition("-")[0] == request_id  # completions number their prompts


class GPUMemoryManager:
    """Samples an engine, now and then in a thread (as a context manager) or when asked (``sample``).

    ``source`` is a server's URL or an in-process ``vllm.LLM`` made with ``disable_log_stats=False``; without one only
    memory is seen. ``cache_bytes_per_token`` turns blocks into bytes for an engine without budgets, which does not say
    how large its blocks are. ``process`` is the engine's process id, this process unless given: its memory and that of
    its children is added up. ``stats`` is the runtime's statistics file. ``lines`` gets a JSON object for each look.
    """

    def __init__(
        self,
        source: Any = None,
        *,
        interval_s: float = 1.0,
        lines: Path | None = None,
        process: int | None = None,
        cache_bytes_per_token: int | None = None,
        stats: Path | None = None,
    ) -> None:
        if isinstance(source, str) and not source.startswith(("http://", "https://")):
            raise ValueError(f"{source} is not an http address")
        self.source, self.interval_s, self.lines = source, interval_s, lines
        self.cache_bytes_per_token = cache_bytes_per_token
        self.looks: list[Look] = []
        self._process = os.getpid() if process is None and not isinstance(source, str) else process
        self._requests = None if stats is None else RequestLog(stats)
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._devices = _devices()
        self._epoch = time.time() - time.perf_counter()

    def __enter__(self) -> GPUMemoryManager:
        self._stop.clear()
        self._thread = threading.Thread(target=self._watch, name="kvprofile-watch", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        self._note(self.sample())

    def now(self) -> float:
        """Seconds since 1970 by the clock as it stood when this object was made; steps of the clock change nothing."""
        return self._epoch + time.perf_counter()

    def sample(self) -> Look:
        """One look, now."""
        # what the engine says of its pool: blocks, tokens of a block, the share in use
        values = self._values()
        blocks, usage = _whole(values.get("pool_blocks")), values.get("vllm:kv_cache_usage_perc")
        block_tokens = _whole(values.get("block_tokens"))
        # bytes of a block: the runtime says, else from the bytes of a token
        width = _whole(values.get("kvprofile_kv_block_bytes"))
        if not width:
            per_token = self.cache_bytes_per_token
            width = None if per_token is None or block_tokens is None else per_token * block_tokens
        replicas = _whole(values.get("replicas"))
        # one block of each pool is never given out
        usable = None if blocks is None or width is None else (blocks - (replicas or 1)) * width
        return Look(
            time=self.now(),
            cache_bytes_in_use=None if usable is None or usage is None else round(usage * usable),
            cache_bytes_total=None if blocks is None or width is None else blocks * width,
            cache_usage=usage,
            block_bytes=width,
            block_tokens=block_tokens,
            eviction_ratio=None if self._requests is None else self._requests.eviction_ratio,
            device_memory_bytes=_device_bytes(self._devices),
            process_memory_bytes=_process_bytes(self._process),
            running=_whole(values.get("vllm:num_requests_running")),
            waiting=_whole(values.get("vllm:num_requests_waiting")),
            preemptions=_whole(values.get("vllm:num_preemptions_total")),
            kv_bytes_reclaimed=_whole(values.get("kvprofile_kv_bytes_reclaimed_total")),
            replicas=replicas,
        )

    def _watch(self) -> None:
        while not self._stop.wait(self.interval_s):
            self._note(self.sample())

    def _note(self, look: Look) -> None:
        self.looks.append(look)
        if self.lines is not None:
            with open(self.lines, "a", encoding="utf-8") as file:
                file.write(json.dumps(asdict(look)) + "\n")

    def _values(self) -> dict[str, float]:
        if self.source is None:
            return {}
        try:
            return metric_values(scrape(self.source) if isinstance(self.source, str) else _own_metrics())
        except (OSError, ValueError):  # it does not answer, or not with metrics
            return {}


def _own_metrics() -> str:
    """The same text, of an engine in this process."""
    from prometheus_client import REGISTRY, generate_latest

    return generate_latest(REGISTRY).decode()


def _whole(value: float | None) -> int | None:
    return None if value is None else int(value)


def _devices() -> Sequence[Any]:
    """Handles of the GPUs that this process may use; none without NVML."""
    try:
        import pynvml
    except ImportError:
        return ()
    try:
        pynvml.nvmlInit()
        return tuple(_visible(pynvml))
    except pynvml.NVMLError:
        return ()


def _visible(nvml: Any) -> Iterator[Any]:
    asked = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = [str(n) for n in range(nvml.nvmlDeviceGetCount())] if asked is None else asked.split(",")
    for name in (name.strip() for name in names):
        if name.isdecimal():
            yield nvml.nvmlDeviceGetHandleByIndex(int(name))
        elif name and name != "-1":
            yield nvml.nvmlDeviceGetHandleByUUID(name.encode())


def _device_bytes(devices: Sequence[Any]) -> int | None:
    """Bytes used on those GPUs together, by anybody."""
    if not devices:
        return None
    import pynvml

    try:
        return sum(int(pynvml.nvmlDeviceGetMemoryInfo(device).used) for device in devices)
    except pynvml.NVMLError:
        return None


def _process_bytes(process: int | None) -> int | None:
    """Resident memory of a process and its descendants together; pages they share count for each."""
    if process is None:
        return None
    import psutil

    try:
        root = psutil.Process(process)
        family = [root, *root.children(recursive=True)]
    except psutil.Error:
        return None
    total = 0
    for member in family:
        try:
            total += int(member.memory_info().rss)
        except psutil.Error:
            continue
    return total or None
