"""Results of AIPerf (aiperf/common/models/export_models.py, 0.13.0): its `profile_export_aiperf.json`.

Only what its client measured is read; the GPU telemetry and the server's counters that it collects stay out. Tokens are
counted by the client's tokenizer from the text of the answer, so they can differ from those that the server made; where
the file states both, the leg says so. `inter_token_latency` is a request's mean after its first chunk, which is TPOT
here, and `inter_chunk_latency` is the time between chunks, which is ITL here, as in `vllm bench serve`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kvprofile.errors import plain
from kvprofile.records.foreign import (
    DATASET,
    ENDPOINT,
    IGNORE_EOS,
    INPUT_ASKED,
    OUTPUT_ASKED,
    UNKNOWN_MODEL,
    Place,
    ResultFormat,
    at,
    make_record,
    metrics,
    name_of,
    numbers,
    scaled,
    without_folders,
)
from kvprofile.records.record import Leg, RunRecord

TOOL = "aiperf"

_TO_MS = {"ns": 1e-6, "us": 1e-3, "ms": 1.0, "sec": 1000.0, "s": 1000.0}
_LATENCIES = {
    "ttft": "time_to_first_token",
    "tpot": "inter_token_latency",
    "itl": "inter_chunk_latency",
    "e2el": "request_latency",
}
_STATISTICS = {"mean": "avg", "median": "p50", "p99": "p99"}
_TRIAL = re.compile(r"(run|trial)_\d+")
_CLOSED, _OPEN = ("concurrency",), ("poisson", "gamma", "constant")


class AIPerf(ResultFormat):
    """The summary of one run. What lies in `phases/` below it repeats its numbers, or is its warm-up."""

    tool = TOOL

    def recognises(self, raw: Any) -> bool:
        """A summary: release and schema, and at least one number of a client."""
        known = isinstance(raw, Mapping) and raw.keys() >= {"aiperf_version", "schema_version"}
        return known and bool(raw.keys() & {"request_latency", "request_count", "error_request_count", "run_info"})

    def place(self, path: Path, raw: Any) -> Place:
        """The folder of the run, without those of its trials; the file where it has a name of its own."""
        phase = path.parent.parent.name == "phases"
        if not path.name.startswith("profile_export_aiperf"):
            return Place(path, part=phase)
        parts = path.parent.absolute().parts
        if at(raw, "run_info", "trial") is not None:
            parts = tuple(part for part in parts if part != "profile_runs" and not _TRIAL.fullmatch(part))
        return Place(Path(*parts), part=phase)

    def to_record(self, raw: Any, name: str) -> RunRecord:
        """A record of one leg."""
        config = raw.get("input_config")
        data = at(config, "datasets", 0)
        settings = {
            ENDPOINT: at(config, "endpoint", "type"),
            DATASET: at(data, "type"),
            INPUT_ASKED: at(data, "prompts", "isl", "mean"),
            OUTPUT_ASKED: at(data, "prompts", "osl", "mean"),
            IGNORE_EOS: at(config, "endpoint", "extra", "ignore_eos"),
            "tokenizer": at(config, "tokenizer", "name"),
        }
        return make_record(f"{TOOL} {plain(raw['aiperf_version'])}", [_leg(raw, name)], settings)


FORMAT = AIPerf()


def _leg(raw: Mapping[str, Any], name: str) -> Leg:
    found: dict[str, Any] = {
        "duration": scaled(_in_ms(raw, "benchmark_duration", "avg"), 1e-3),
        "completed": _whole(_of(raw, "request_count")),
        "failed": _failed(raw),
        "total_input_tokens": _whole(_of(raw, "total_isl")),
        "total_output_tokens": _whole(_of(raw, "total_osl")),
        "request_throughput": _of(raw, "request_throughput"),
        "output_throughput": _of(raw, "output_token_throughput"),
        "total_token_throughput": _of(raw, "total_token_throughput"),
        "max_concurrent_requests": _of(raw, "effective_concurrency", "max"),
    }
    for latency, key in _LATENCIES.items():
        for statistic, own in _STATISTICS.items():
            found[f"{statistic}_{latency}_ms"] = _in_ms(raw, key, own)
    if found["completed"] is None and found["failed"]:  # the file leaves the count out where nothing was answered
        found["completed"] = 0
    config = raw.get("input_config")
    return Leg.model_validate(
        {
            "name": name_of(name),
            "kind": None,
            "repetition": at(raw, "run_info", "trial") or 0,
            "status": "ok",
            "model": without_folders(at(config, "models", "items", 0, "name")) or UNKNOWN_MODEL,
            "load": _load(config),
            "metrics": metrics(found),
            "warnings": list(_warnings(raw)),
        }
    )


def _load(config: Any) -> dict[str, Any]:
    phases = [phase for phase in numbers(at(config, "phases")) if isinstance(phase, Mapping)]
    measured = next((phase for phase in phases if not phase.get("exclude_from_results")), {})
    kind = measured.get("type")
    return {
        "mode": "closed" if kind in _CLOSED else "open" if kind in _OPEN else "unknown",
        "concurrency": measured.get("concurrency"),
        "request_rate": measured.get("rate") if kind in _OPEN else None,
        "burstiness": 1.0 if kind == "poisson" else measured.get("smoothness"),
        "requests": measured.get("requests"),
        "warmup_requests": _warmup(phases),
        "streaming": at(config, "endpoint", "streaming"),
        "description": f"as aiperf sent it: {kind}",
    }


def _warmup(phases: list[Mapping[str, Any]]) -> Any:
    """Requests of the phases that do not count; None where one of them is bounded by time."""
    asked = [phase.get("requests") for phase in phases if phase.get("exclude_from_results")]
    return sum(asked) if all(isinstance(each, int) for each in asked) and phases else None


def _failed(raw: Mapping[str, Any]) -> Any:
    errors = _whole(_of(raw, "error_request_count"))
    return 0 if errors is None and _of(raw, "request_error_rate") == 0 else errors


def _warnings(raw: Mapping[str, Any]) -> list[str]:
    found = []
    ours, theirs = _whole(_of(raw, "total_osl")), _whole(_of(raw, "total_usage_completion_tokens"))
    if isinstance(ours, int) and isinstance(theirs, int) and ours != theirs:
        found.append(
            f"output tokens are counted by the client's tokenizer: {ours:,}, where the server reports {theirs:,}, so "
            "throughput and time per output token are off by as much (aiperf --use-server-token-count)"
        )
    if raw.get("was_cancelled") is True or raw.get("is_complete") is False:
        found.append("the run was stopped before its end")
    return found


def _of(raw: Mapping[str, Any], key: str, statistic: str = "avg") -> Any:
    return at(raw, key, statistic)


def _in_ms(raw: Mapping[str, Any], key: str, statistic: str) -> Any:
    """A duration in milliseconds. Raises ValueError for a unit that is not one of durations."""
    value, unit = at(raw, key, statistic), at(raw, key, "unit")
    if value is None:
        return None
    if unit not in _TO_MS:
        raise ValueError(f"{key} is in {unit!r:.40}, which is not a unit of time that this kvprofile knows")
    return scaled(value, _TO_MS[unit])


def _whole(value: Any) -> Any:
    """A count that the file keeps as a float."""
    return int(value) if isinstance(value, float) and value.is_integer() else value
