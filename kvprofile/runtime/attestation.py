"""What ``kvprofile verify`` leaves next to a budget file: on which machine, and how, these budgets were served right.

An attestation has a key, everything that decides which code serves, and the checks that were made. It is a record and
not a signature: whoever can write the file can make one up. What is refused is one that does not hold together, and one
that is about something else. Standard library only, so that vLLM's processes may read it.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from kvprofile.errors import InputError, plain
from kvprofile.files import json_bytes, read_json, sha256_of, write_atomically

FORMAT, VERSION = "kvprofile-attestation", 1
SUFFIX = ".verified.json"
MAX_FILE_BYTES = 4 * 2**20

KEY = {
    "model": "its name in the budget file",
    "budget": "what heads keep and by which rule: the label of the metric kvprofile_budget_info",
    "kind": "whole or graded",
    "window": "anchored or sliding",
    "runtime": "SHA-256 of the sources of kvprofile that run in vLLM's processes",
    "vllm": "its version, with the tag of the build",
    "torch": "likewise",
    "platform": "cpu, cuda, ...",
    "device": "its name, as vLLM says it",
    "driver": "of the device, and what torch was built for",
    "attention_backend": "of vLLM, of the layers with budgets; the workers check it",
    "model_runner": "V1 or V2",
    "dtype": "of the model",
    "kv_cache_dtype": "as vLLM is told it",
    "quantization": "of the weights, as vLLM says it, or none",
    "head_order": "loaded: weights come part by part; gathered: heads are put in order at every step",
    "head_size": "dimensions of a key",
    "block_size": "tokens of a block; the workers check it",
    "tensor_parallel_size": "ranks of an engine",
    "graphs": "vLLM's compilation mode and CUDA graph mode",
}
"""Fields of a key, each with what it says."""

CHECKED_IN_WORKERS = ("attention_backend", "block_size")
"""What is not decided before a worker has loaded the model."""

NUMBERS = ("head_size", "block_size", "tensor_parallel_size")

CHECKS: dict[str, tuple[str, ...]] = {
    "stock": ("tokens", "near_ties", "largest", "most", "mean", "most_mean", "far", "most_far"),
    "reference": ("against", "tokens", "near_ties", "largest", "most", "mean", "most_mean", "far", "most_far"),
    "blocks": ("requests", "given_back"),
    "load": ("longest_request", "preemptions", "prefix_hits", "chunks", "poisoned"),
}
"""What an attestation says of each check: tokens compared and differences of log-probability in nats, with what is
allowed (``most``), and how many tokens lay further apart; blocks that requests gave back; what the engine went through.
"""

_SOURCES = (
    "runtime", "budget/trim.py", "budget/probe.py", "budget/dtypes.py", "budget/float8.py", "capture/layout.py",
    "unsupported.py",
)  # fmt: skip


@dataclass(frozen=True)
class Attestation:
    """A key (``KEY``), its checks (``CHECKS``), and what changes from run to run: date and seconds per token."""

    key: Mapping[str, str | int]
    checks: Mapping[str, Mapping[str, Any]]
    measured: Mapping[str, Any]

    @property
    def sha256(self) -> str:
        """Over key and checks: what notices a slip of an editor, and stops nobody."""
        return sha256_of(
            json_bytes(dict(self.key)), json_bytes({name: dict(each) for name, each in self.checks.items()})
        )


def path_of(budget_file: Path) -> Path:
    """Where attestations of a budget file lie: next to it, under its name."""
    return budget_file.with_name(f"{budget_file.name.removesuffix('.json')}{SUFFIX}")


def is_attestation(path: Path) -> bool:
    """Whether a file is one of attestations, by its name."""
    return path.name.endswith(SUFFIX)


@cache
def runtime_sha256() -> str:
    """Digest over the sources that run in vLLM's processes, by their names below the package."""
    package = Path(__file__).resolve().parents[1]
    files = sorted(
        file for name in _SOURCES for file in ((package / name).glob("*.py") if "." not in name else [package / name])
    )
    parts = [part for file in files for part in (file.relative_to(package).as_posix().encode(), file.read_bytes())]
    return sha256_of(*parts)


def load(path: Path) -> list[Attestation]:
    """The attestations in a file. Raises InputError, one line, for a file that does not hold together."""
    try:
        raw = read_json(path, MAX_FILE_BYTES, "file of attestations")
        return _attestations(raw)
    except ValueError as error:
        raise InputError(f"{path}: {error}; run 'kvprofile verify' to make it anew") from error


def save(path: Path, attestations: Iterable[Attestation]) -> None:
    """Write attestations, sorted by their keys; none removes the file. Raises InputError where that fails."""
    found = sorted(attestations, key=lambda each: json_bytes(dict(each.key)))
    if not found:
        path.unlink(missing_ok=True)
        return
    listed = [
        {"key": dict(each.key), "checks": dict(each.checks), "measured": dict(each.measured), "sha256": each.sha256}
        for each in found
    ]
    write_atomically(path, json_bytes({"format": FORMAT, "version": VERSION, "attestations": listed}))


def differences(key: Mapping[str, str | int], here: Mapping[str, str | int]) -> list[str]:
    """A phrase for each field of ``here`` in which a key differs."""
    return [
        f"{name} is {_short(here[name])}, attested is {_short(key[name])}" for name in here if key[name] != here[name]
    ]


def holding(path: Path, here: Mapping[str, str | int]) -> list[Attestation]:
    """Those attestations of a file that agree with what is known ``here``, a part of a key.

    Raises InputError, one line, where there are none: it says which fields of the nearest one differ.
    """
    if not path.is_file():
        raise InputError(f"the attestation {path} does not exist")
    attested = load(path)
    found = [each for each in attested if not differences(each.key, here)]
    if not found:
        nearest = min((differences(each.key, here) for each in attested), key=len)
        more = f" and {len(nearest) - 3} more fields" if len(nearest) > 3 else ""
        raise InputError(f"{path} does not hold here: {', '.join(nearest[:3])}{more}")
    return found


def _short(value: str | int) -> str:
    text = plain(value)
    return f"{text[:12]}…" if len(text) == 2 * hashlib.sha256().digest_size else text[:80]


def _attestations(raw: Any) -> list[Attestation]:
    """As ``load``. Raises ValueError."""
    if not isinstance(raw, dict) or raw.get("format") != FORMAT:
        raise ValueError("not a file of attestations")
    if raw.get("version") != VERSION or isinstance(raw["version"], bool):
        raise ValueError(f"version is {raw.get('version')!r:.40}, this kvprofile reads {VERSION}")
    listed = raw.get("attestations")
    if set(raw) != {"format", "version", "attestations"} or not isinstance(listed, list) or not listed:
        raise ValueError("not a list of attestations")
    found = [_attestation(each, f"attestation {number}") for number, each in enumerate(listed, 1)]
    keys = [json_bytes(dict(each.key)) for each in found]
    if len(set(keys)) < len(keys):
        raise ValueError("two attestations have one key")
    return found


def _attestation(raw: Any, where: str) -> Attestation:
    if not isinstance(raw, dict) or set(raw) != {"key", "checks", "measured", "sha256"}:
        raise ValueError(f"{where} is not made of key, checks, measured and sha256")
    key, checks, measured = raw["key"], raw["checks"], raw["measured"]
    if not isinstance(measured, dict) or not isinstance(key, dict) or set(key) != set(KEY):
        odd = ", ".join(sorted(set(KEY) ^ set(key))) if isinstance(key, dict) else "it is not an object"
        raise ValueError(f"{where}: the key has not the fields of this kvprofile ({odd})")
    for name, value in key.items():
        if type(value) is not (int if name in NUMBERS else str):
            raise ValueError(f"{where}: {name} is {value!r:.40}")
    if not isinstance(checks, dict) or set(checks) != set(CHECKS):
        raise ValueError(f"{where}: the checks are not {', '.join(CHECKS)}")
    for name, fields in CHECKS.items():
        if not isinstance(checks[name], dict) or set(checks[name]) != set(fields):
            raise ValueError(f"{where}: the check {name} does not say {', '.join(fields)}")
        _require_passed(name, checks[name], where)
    found = Attestation(key, checks, measured)
    if raw["sha256"] != found.sha256:
        raise ValueError(f"{where} was changed after it was written: its sha256 is another")
    return found


def _require_passed(name: str, check: Mapping[str, Any], where: str) -> None:
    """Raise ValueError unless the numbers of a check say that it passed."""
    for field, value in check.items():
        if field in ("against", "poisoned"):
            continue
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value < 0:
            raise ValueError(f"{where}: {field} of {name} is {value!r:.40}")
    if check.get("tokens") == 0 or check.get("given_back") == 0 or check.get("requests") == 0:
        raise ValueError(f"{where}: nothing was compared in {name}")
    for value, most in (("far", "most_far"), ("mean", "most_mean")):
        if value in check and check[value] > check[most]:
            raise ValueError(f"{where}: {value} of {name} is {check[value]:g}, more than the {check[most]:g} allowed")


def with_one_more(path: Path, key: Mapping[str, str | int], new: Attestation | None) -> Sequence[Attestation]:
    """The attestations of a file with that of ``key`` replaced, or taken out; a file that does not hold is left out."""
    try:
        before = load(path) if path.is_file() else []
    except InputError:
        before = []
    return [*(each for each in before if each.key != key), *([] if new is None else [new])]
