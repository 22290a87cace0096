"""Results of `vllm bench serve` and `vllm bench sweep serve` (vllm/benchmarks/serve.py and sweep/serve.py, 0.32).

The tool states what it sent and measured, not what served it. So whether budgets were in force, the retention and the
kind of server are null unless given to it: ``--metadata leg=0.5 retention=0.5 kind=local dtype=float32``. Nor does it
write its own release, the dataset, ``--ignore-eos`` or ``--num-warmups``.

A sweep keeps a folder for each combination of settings with ``run=0.json``, ``run=1.json``, ..., each a result with
``run_number`` and the settings that were varied, and ``summary.json``, a list of the same results.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kvprofile.errors import plain
from kvprofile.records.foreign import (
    CHAT,
    COMPLETIONS,
    ENDPOINT,
    UNKNOWN_MODEL,
    Place,
    ResultFormat,
    at,
    is_number,
    make_record,
    measured,
    metrics,
    name_of,
    numbers,
    scaled,
    without_folders,
)
from kvprofile.records.record import Leg, Load, Request, RunRecord

TOOL = "vllm bench serve"
RUN = "run_number"

_KEYS = {"duration", "completed", "total_input_tokens", "request_throughput", "model_id", "request_rate"}
_FAILED_RUN = {RUN, "error_type", "serve_overrides", "bench_overrides"}
_SETTINGS = ("backend", "label", "tokenizer_id", "ramp_up_strategy")
_ENDPOINTS = {"vllm": COMPLETIONS, "openai": COMPLETIONS, "openai-chat": CHAT}
"""Backends that send OpenAI requests, always streamed (lib/endpoint_request_func.py)."""

_LOAD = ("request_rate", "max_concurrency", "burstiness", "num_prompts", "label", "leg")
"""Settings of a result that a sweep may vary, besides those that its server was started with."""

_RESULT = {
    *("date", "endpoint_type", "backend", "model_id", "tokenizer_id", "duration", "completed", "failed", "errors"),
    *("total_input_tokens", "total_output_tokens", "request_throughput", "request_goodput", "output_throughput"),
    *("total_token_throughput", "input_lens", "output_lens", "ttfts", "itls", "latencies", "start_times"),
    *("queue_times", "generated_texts", "max_output_tokens_per_s", "max_concurrent_requests", "rtfx", RUN),
    *("rps_change_events", "total_input_sequences", "input_sequence_throughput"),
}
"""What a result holds of itself. Other keys are metadata, or settings that a sweep varied."""


class VLLMServe(ResultFormat):
    """Files of one result, of several below each other (--append-result), and of a sweep."""

    tool = TOOL

    def recognises(self, raw: Any) -> bool:
        """A result, a list of results, or a note of a run of a sweep that failed."""
        if isinstance(raw, list):
            return bool(raw) and all(isinstance(each, Mapping) and each.keys() >= _KEYS for each in raw)
        return isinstance(raw, Mapping) and (raw.keys() >= _KEYS or raw.keys() >= _FAILED_RUN)

    def place(self, path: Path, raw: Any) -> Place:
        """The file, or the folder of a sweep's combination with what was varied."""
        first = raw[0] if isinstance(raw, list) else raw
        if RUN not in first:
            return Place(path)
        settings = _failed_settings(first) if _is_failed_run(first) else _settings(first)
        copied = isinstance(raw, list) and any(path.parent.glob("run=*.json"))  # summary.json
        return Place(path.parent, settings, part=copied or first[RUN] == -1)  # -1 is warmup.json

    def to_record(self, raw: Any, name: str) -> RunRecord:
        """A record of one leg for each result."""
        results = raw if isinstance(raw, list) else [raw]
        legs: list[Leg] = []
        for result in results:
            leg = _failed_leg(result, name) if _is_failed_run(result) else _leg(result, name)
            if RUN not in result:  # results below each other are repetitions
                leg = leg.model_copy(update={"repetition": sum(earlier.name == leg.name for earlier in legs)})
            legs.append(leg)
        settings = {key: at(results[0], key) for key in _SETTINGS} | {ENDPOINT: _endpoint(results[0])}
        varied = {} if _is_failed_run(results[0]) else _varied(results[0])
        return make_record(TOOL, legs, varied | settings)


FORMAT = VLLMServe()


def _endpoint(result: Mapping[str, Any]) -> Any:
    backend = result.get("backend")
    return _ENDPOINTS.get(backend, backend) if isinstance(backend, str) else backend


def _is_failed_run(raw: Mapping[str, Any]) -> bool:
    return raw.keys() >= _FAILED_RUN


def _settings(result: Mapping[str, Any]) -> dict[str, Any]:
    """What a sweep can have varied: the load, and what else it added to the result."""
    return {key: result[key] for key in _LOAD if key in result} | _varied(result)


def _varied(result: Mapping[str, Any]) -> dict[str, Any]:
    """Metadata, and the settings that a sweep gave to the server: single values under keys that no result has."""
    found = {key: value for key, value in result.items() if key not in _RESULT and key not in _LOAD}
    return {
        name_of(key): plain(value)[:200] if isinstance(value, str) else value
        for key, value in found.items()
        if isinstance(value, (str, int, float)) and not key.endswith("_ms") and not key.startswith("spec_decode_")
    }


def _failed_settings(note: Mapping[str, Any]) -> dict[str, Any]:
    parts = [each for key in ("serve_overrides", "bench_overrides") if isinstance(each := note[key], Mapping)]
    return {str(key): value for part in parts for key, value in part.items()}


def _failed_leg(note: Mapping[str, Any], name: str) -> Leg:
    """A run of which only a note is left. Its message holds commands and paths, so only its kind is kept."""
    return Leg.model_validate(
        {
            "name": name,
            "kind": None,
            "repetition": max(0, note[RUN]) if isinstance(note[RUN], int) else note[RUN],
            "status": "failed",
            "reason": f"vllm bench sweep serve: {name_of(note['error_type'])}",
            "model": UNKNOWN_MODEL,
            "load": Load(mode="unknown"),
        }
    )


def _leg(result: Mapping[str, Any], name: str) -> Leg:
    retention = result.get("retention")
    share = None if retention is None else float(str(retention))
    rate = result["request_rate"]
    rate = rate if rate != "inf" else None
    own = None if RUN in result else result.get("leg") or result.get("label")  # a sweep's are equal for all
    return Leg.model_validate(
        {
            "name": name_of(own or name),
            "kind": result.get("kind"),
            "repetition": result.get(RUN) or 0,
            "status": "ok",
            "compressed": None if share is None else share < 1,
            "retention_asked": share,
            "engine": result.get("engine"),
            "model": without_folders(result["model_id"]),
            "dtype": result.get("dtype"),
            "load": {
                "mode": "closed" if rate is None else "open",
                "concurrency": result.get("max_concurrency"),
                "request_rate": rate,
                "burstiness": result.get("burstiness"),
                "requests": result.get("num_prompts"),
                "streaming": True if _endpoint(result) in (COMPLETIONS, CHAT) else None,
                "description": "as vllm bench serve sent it",
            },
            # max_concurrent_requests counts all that touched one second, which is more than were in flight
            "metrics": metrics({key: value for key, value in result.items() if key != "max_concurrent_requests"}),
            "requests": _requests(result),
        }
    )


def _requests(result: Mapping[str, Any]) -> list[Request]:
    """One row for each request, where the tool was asked for them (--save-detailed)."""
    starts = numbers(result.get("start_times"))
    first = min(filter(is_number, starts), default=0.0)
    rows = []
    for number, error in enumerate(numbers(result.get("errors"))):
        good = not error  # a failed request has zeros for what was never measured
        start = at(starts, number)
        rows.append(
            Request.model_validate(
                {
                    "output": at(result, "generated_texts", number),
                    "error": error or None,
                    "start_s": start - first if is_number(start) else start,
                    "ttft_ms": scaled(measured(at(result, "ttfts", number)), 1000) if good else None,
                    "e2el_ms": scaled(measured(at(result, "latencies", number)), 1000) if good else None,
                    "itl_ms": [scaled(gap, 1000) for gap in numbers(at(result, "itls", number))] if good else None,
                    "input_tokens": at(result, "input_lens", number),
                    "output_tokens": at(result, "output_lens", number),
                }
            )
        )
    return rows
