"""Results of `vllm bench serve` (vllm/benchmarks/serve.py, 0.32) as run records.

The tool states what it sent and measured, not what served it. So whether budgets were in force, the retention and the
kind of server are null unless given to it: ``--metadata leg=0.5 retention=0.5 kind=local dtype=float32``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import PurePath, PureWindowsPath
from typing import Any

from kvprofile import __version__
from kvprofile.records.record import Experiment, Leg, Load, Metrics, Provenance, Request, RunRecord

_KEYS = {"duration", "completed", "total_input_tokens", "request_throughput", "model_id", "request_rate"}
_SETTINGS = ("backend", "endpoint_type", "label", "tokenizer_id", "num_prompts", "date", "ramp_up_strategy")


def is_result(raw: Any) -> bool:
    """Whether parsed JSON is a result of `vllm bench serve`, or several of them under 'results'."""
    if isinstance(raw, Mapping) and set(raw) == {"results"}:
        return bool(raw["results"]) and all(is_result(each) for each in raw["results"])
    return isinstance(raw, Mapping) and raw.keys() >= _KEYS


def to_record(raw: Mapping[str, Any], name: str) -> RunRecord:
    """A record of one leg for each result. Raises pydantic's ValidationError where a value is none of its kind."""
    results: Sequence[Mapping[str, Any]] = raw.get("results", [raw])
    legs: list[Leg] = []
    for result in results:
        leg = _leg(result, name)
        legs.append(leg.model_copy(update={"repetition": sum(earlier.name == leg.name for earlier in legs)}))
    settings = {key: _plain(results[0][key]) for key in _SETTINGS if results[0].get(key) is not None}
    return RunRecord(
        kvprofile_version=__version__,
        experiment=Experiment(name=name[:200], preset="vllm bench serve", settings=settings),
        provenance=Provenance(),
        legs=legs,
    )


def _leg(result: Mapping[str, Any], name: str) -> Leg:
    retention = result.get("retention")
    share = None if retention is None else float(retention)
    rate = result["request_rate"]
    return Leg.model_validate(
        {
            "name": str(result.get("leg") or result.get("label") or name)[:200],
            "kind": result.get("kind"),
            "status": "ok",
            "compressed": None if share is None else share < 1,
            "retention_asked": share,
            "engine": result.get("engine"),
            "model": _plain(result["model_id"]),
            "dtype": result.get("dtype"),
            "load": Load(
                mode="closed" if rate == "inf" else "open",
                concurrency=result.get("max_concurrency"),
                request_rate=None if rate == "inf" else rate,
                burstiness=result.get("burstiness"),
                requests=result.get("num_prompts"),
                description="as vllm bench serve sent it",
            ),
            "metrics": {key: result.get(key) for key in Metrics.model_fields},
            "requests": _requests(result),
        }
    )


def _requests(result: Mapping[str, Any]) -> list[Request]:
    """One row for each request, where the tool was asked for them (--save-detailed)."""
    errors = result.get("errors")
    if not errors:
        return []
    starts = result.get("start_times") or []
    first = min(starts, default=0.0)
    rows = []
    for number, error in enumerate(errors):
        good = not error  # a failed request has zeros for what was never measured
        rows.append(
            Request(
                output=_at(result, "generated_texts", number),
                error=error or None,
                start_s=starts[number] - first if number < len(starts) else None,
                ttft_ms=_ms(_at(result, "ttfts", number)) if good else None,
                e2el_ms=_ms(_at(result, "latencies", number)) if good else None,
                itl_ms=[gap * 1000 for gap in _at(result, "itls", number) or []] if good else None,
                input_tokens=_at(result, "input_lens", number),
                output_tokens=_at(result, "output_lens", number),
            )
        )
    return rows


def _at(result: Mapping[str, Any], key: str, number: int) -> Any:
    values = result.get(key) or []
    return values[number] if number < len(values) else None


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else seconds * 1000


def _plain(value: Any) -> Any:
    """A setting without the folders of a path: a record names no place on a machine."""
    if isinstance(value, str) and (PurePath(value).is_absolute() or PureWindowsPath(value).is_absolute()):
        return PureWindowsPath(value).name  # knows both kinds of slashes
    return value
