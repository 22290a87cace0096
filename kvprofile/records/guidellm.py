"""Results of guidellm (guidellm/benchmark/schemas/, 0.8.1): the JSON that `--output kind=json` writes.

A file holds one benchmark for each strategy: each number of streams or rate. Only answered requests are read; a
distribution without samples has zeros in the file. `inter_token_latency_ms` is a request's mean after its first token,
weighted by its tokens, so it is TPOT here; `time_per_output_token_ms` counts the first token's wait in and is left out.
"""

from __future__ import annotations

from typing import Any

from kvprofile.errors import plain
from kvprofile.files import parse_json
from kvprofile.records.foreign import (
    CHAT,
    COMPLETIONS,
    DATASET,
    ENDPOINT,
    IGNORE_EOS,
    INPUT_ASKED,
    OUTPUT_ASKED,
    UNKNOWN_MODEL,
    ResultFormat,
    at,
    make_record,
    measured,
    metrics,
    name_of,
    numbers,
    scaled,
    without_folders,
)
from kvprofile.records.record import Leg, Provenance, Request, RunRecord

TOOL = "guidellm"

_ENDPOINTS = {"/v1/completions": COMPLETIONS, "/v1/chat/completions": CHAT}
_KEPT = ("successful", "errored")
_DISTRIBUTIONS = {
    "ttft": ("time_to_first_token_ms", 1.0),
    "tpot": ("inter_token_latency_ms", 1.0),
    "e2el": ("request_latency", 1000.0),
}
"""Latency, its distribution in the file, and the factor to milliseconds."""


class GuideLLM(ResultFormat):
    """Report files of version 2 of their schema."""

    tool = TOOL

    def recognises(self, raw: Any) -> bool:
        """A report: its metadata names guidellm, and it holds benchmarks."""
        return at(raw, "metadata", "guidellm_version") is not None and isinstance(at(raw, "benchmarks"), list)

    def to_record(self, raw: Any, name: str) -> RunRecord:
        """A record of one leg for each benchmark."""
        version = at(raw, "metadata", "version")
        if version != 2:
            raise ValueError(f"version {version!r:.20} of guidellm's reports; this kvprofile reads 2, of guidellm 0.8")
        benchmarks = raw["benchmarks"]
        if not benchmarks:
            raise ValueError("holds no benchmark of guidellm")
        legs: list[Leg] = []
        for benchmark in benchmarks:
            own = f"{name} {_strategy_words(benchmark)}" if len(benchmarks) > 1 else name
            leg = _leg(benchmark, name_of(own))
            legs.append(leg.model_copy(update={"repetition": sum(earlier.name == leg.name for earlier in legs)}))
        spec, python = at(raw, "config", "spec"), at(raw, "metadata", "python_version")
        data = at(spec, "data", 0)
        settings = {
            ENDPOINT: _endpoint(at(spec, "backend", "request_format")),
            DATASET: at(data, "kind"),
            INPUT_ASKED: at(data, "prompt_tokens"),
            OUTPUT_ASKED: at(data, "output_tokens"),
            IGNORE_EOS: _ignores_eos(benchmarks),
            "tokenizer": at(spec, "tokenizer", "model"),
            "seed": at(spec, "seed", "value"),
        }
        provenance = Provenance(versions={"python": python} if isinstance(python, str) else {})
        release = plain(at(raw, "metadata", "guidellm_version"))
        return make_record(f"{TOOL} {release}", legs, settings, provenance)


FORMAT = GuideLLM()


def _endpoint(path: Any) -> Any:
    return _ENDPOINTS.get(path, path) if isinstance(path, str) else path


def _ignores_eos(benchmarks: list[Any]) -> Any:
    """What the first request that the file keeps was sent with; guidellm asks for it where a length is asked for."""
    kept = (at(each, "requests", status, 0, "request_args") for each in benchmarks for status in _KEPT)
    sent = next((each for each in kept if isinstance(each, str)), "null")
    try:
        found = at(parse_json(sent.encode("utf-8", "replace"), "request"), "body", "ignore_eos")
    except ValueError:
        return None
    return found if isinstance(found, bool) else None


def _strategy_words(benchmark: Any) -> str:
    """'concurrent 4', 'poisson 2.5', 'throughput'."""
    strategy = at(benchmark, "config", "strategy")
    amount = at(strategy, "streams") or at(strategy, "rate")
    return f"{at(strategy, 'type_')} {amount}" if amount is not None else str(at(strategy, "type_"))


def _load(benchmark: Any) -> dict[str, Any]:
    strategy, spec = at(benchmark, "config", "strategy"), at(benchmark, "config", "backend")
    kind, rate = at(strategy, "type_"), at(strategy, "rate")
    open_ = kind in ("constant", "poisson")
    closed = kind in ("synchronous", "concurrent", "throughput")
    warm = at(benchmark, "config", "warmup", "value") or at(benchmark, "config", "warmup", "percent")
    return {
        "mode": "open" if open_ else "closed" if closed else "unknown",
        "concurrency": 1 if kind == "synchronous" else at(strategy, "streams") or at(strategy, "max_concurrency"),
        "request_rate": rate if open_ else None,
        "burstiness": 1.0 if kind == "poisson" else None,
        "requests": at(benchmark, "scheduler_metrics", "requests_made", "total"),
        "warmup_requests": None if warm else 0,  # a warm-up is a share of the run, or seconds
        "max_output_tokens": at(spec, "max_tokens"),
        "streaming": at(spec, "stream"),
        "description": f"as guidellm sent it: {_strategy_words(benchmark)}",
    }


def _leg(benchmark: Any, name: str) -> Leg:
    made = at(benchmark, "scheduler_metrics", "requests_made")
    known = at(benchmark, "metrics")
    found: dict[str, Any] = {
        "duration": at(benchmark, "duration"),
        "completed": at(made, "successful"),
        "failed": at(made, "errored"),
        "total_input_tokens": _of(known, "prompt_token_count", "total_sum"),
        "total_output_tokens": _of(known, "output_token_count", "total_sum"),
        "request_throughput": _of(known, "requests_per_second", "mean"),
        "output_throughput": _of(known, "output_tokens_per_second", "mean"),
        "total_token_throughput": _of(known, "tokens_per_second", "mean"),
    }
    for latency, (key, factor) in _DISTRIBUTIONS.items():
        for statistic, way in (("mean", ("mean",)), ("median", ("median",)), ("p99", ("percentiles", "p99"))):
            found[f"{statistic}_{latency}_ms"] = scaled(_of(known, key, *way), factor)
    for key in ("total_input_tokens", "total_output_tokens"):  # sums of counts, kept as floats
        found[key] = int(found[key]) if isinstance(found[key], float) and found[key].is_integer() else found[key]
    unfinished = at(made, "incomplete")
    return Leg.model_validate(
        {
            "name": name,
            "kind": None,
            "status": "ok",
            "model": without_folders(at(benchmark, "config", "backend", "model")) or UNKNOWN_MODEL,
            "load": _load(benchmark),
            "metrics": metrics(found),
            "requests": [
                _request(each, good=status == "successful")
                for status in _KEPT
                for each in numbers(at(benchmark, "requests", status))
            ],
            "warnings": [f"{unfinished} requests were cut off when the run ended"] if unfinished else [],
        }
    )


def _of(known: Any, key: str, *way: str) -> Any:
    """A statistic of the answered requests; None where there are none, for which the file has zeros."""
    found = at(known, key, "successful")
    return at(found, *way) if at(found, "count") else None


def _request(row: Any, *, good: bool) -> Request:
    error = at(row, "info", "error")
    return Request.model_validate(
        {
            "output": at(row, "output"),
            "error": None if good else error or "failed",
            "ttft_ms": measured(at(row, "time_to_first_token_ms")) if good else None,
            "tpot_ms": measured(at(row, "inter_token_latency_ms")) if good else None,
            "e2el_ms": scaled(measured(at(row, "request_latency")), 1000) if good else None,
            "input_tokens": at(row, "prompt_tokens"),
            "output_tokens": at(row, "output_tokens") if good else None,
        }
    )
