"""Starts an engine in a process of its own, waits for it, and says in one line how it went wrong."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvprofile.bench.engines.vllm_server import POOL_VARIABLE, child_command, clean_environment, reason_in
from kvprofile.environment import ENABLED, PREFIX
from kvprofile.errors import InputError
from kvprofile.verify.child_engine import FINISHED
from kvprofile.verify.request_plan import RequestPlan

CHILD = "kvprofile.verify.child_engine"


class EngineFailedError(Exception):
    """An engine started, and ended before it had answered: the reason in one line, and its key if it had one."""

    def __init__(self, reason: str, key: Mapping[str, str | int] | None) -> None:
        super().__init__(reason)
        self.key = key


@dataclass(frozen=True)
class EngineRun:
    """What an engine said, as ``child_engine`` writes it, and the lines of the plugin's statistics file."""

    found: Mapping[str, Any]
    statistics: tuple[Mapping[str, Any], ...]

    @property
    def facts(self) -> Mapping[str, Any]:
        """Platform, model runner, dtype and, with the plugin, the key of its attestation."""
        return self.found["facts"]  # type: ignore[no-any-return]

    def outputs(self) -> dict[str, Mapping[str, Any]]:
        """Answers by the names of their requests."""
        return {each["name"]: each for batch in self.found["batches"].values() for each in batch}


def environment(plugin: Mapping[str, str] | None) -> dict[str, str]:
    """Of an engine: this process's, without kvprofile's variables but for those given; without any it is stock vLLM."""
    found = clean_environment()
    found.pop(POOL_VARIABLE, None)  # vLLM prefers it to the size of the pool that is asked for
    found |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": found.get("VLLM_LOGGING_LEVEL", "INFO")}
    return found if plugin is None else {**found, ENABLED: "1", **plugin}


def run_engine(
    folder: Path,
    name: str,
    model: str,
    arguments: Mapping[str, Any],
    plan: RequestPlan,
    plugin: Mapping[str, str] | None,
) -> EngineRun:
    """One engine from start to end; its files go into ``folder``.

    Raises InputError where it does not start, EngineFailedError where it ends before it has answered everything.
    """
    stem = re.sub(r"\W+", "-", name)
    job, result, log, statistics = (folder / f"{stem}.{suffix}" for suffix in ("job", "result", "log", "jsonl"))
    batches = {batch: [each.__dict__ for each in requests] for batch, requests in plan.batches.items()}
    job.write_text(json.dumps({"model": model, "arguments": dict(arguments), "batches": batches}), encoding="utf-8")
    own = None if plugin is None else {**plugin, f"{PREFIX}STATS": str(statistics)}
    with open(log, "wb") as out:
        process = subprocess.Popen(  # noqa: S603 - our own interpreter, arguments as a list
            [*child_command(CHILD), str(job), str(result)], env=environment(own), stdout=out,
            stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        try:
            code = process.wait()
        finally:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)  # and what it started
            process.wait()
    found = json.loads(result.read_text(encoding="utf-8")) if result.is_file() else None
    if found is None:
        raise InputError(f"vLLM does not start ({name}): {_how(code, log)}")
    if plugin is not None and found["facts"]["key"] is None:
        raise InputError(f"vLLM did not load the plugin ({name}); 'kvprofile doctor' looks for the reason")
    if plugin is None and found["facts"]["key"] is not None:
        raise InputError("budgets are in force in the engine that must not have any; unset what sets LLM_KVZIP_ENABLED")
    if found["state"] != FINISHED:
        raise EngineFailedError(_how(code, log), found["facts"]["key"])
    lines = statistics.read_text(encoding="utf-8").splitlines() if statistics.is_file() else []
    return EngineRun(found, tuple(json.loads(line) for line in lines))


def _how(code: int, log: Path) -> str:
    if code < 0:
        return f"killed by {signal.Signals(-code).name}"
    return reason_in(log)
