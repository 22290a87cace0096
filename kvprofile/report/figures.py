"""The rows of a comparison: which numbers of a leg are compared, in which unit, and which way is better."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Literal, TypeAlias

from kvprofile.records.foreign import COUNTED
from kvprofile.records.record import LATENCIES, Leg, Request

Unit: TypeAlias = Literal["tokens/s", "requests/s", "ms", "s", "bytes", "share", "count", "x", "money"]
QUALITY, SPEED, LATENCY, MEMORY, BOUND, LOAD = "Quality", "Speed", "Latency", "Memory", "Bound", "Load"

AGREEMENT = "agreement"
"""The verifier whose score is a figure of its own: chrF against the baseline's answer, 0 to 1."""

_NAMES = {
    "ttft": "Time to first token",
    "tpot": "Time per output token",
    "itl": "Between tokens",
    "e2el": "End to end",
}


@dataclass(frozen=True)
class Figure:
    """A number of a leg. ``better`` is 1 where more is better, -1 where less is, 0 where neither is.

    ``relative``: differences are shares of the reference, else they are in the figure's own unit.
    """

    key: str
    label: str
    group: str
    unit: Unit
    better: int
    relative: bool
    of: Callable[[Leg], float | None]


@dataclass(frozen=True)
class QualityFigure:
    """A number of a request, averaged over questions; ``share`` says that it lies in [0, 1]."""

    key: str
    label: str
    unit: Unit
    better: int
    share: bool
    of: Callable[[Request], float | None]


def figures() -> list[Figure]:
    """All of them, in the order of the page."""
    return [*_speed(), *_latency(), *_memory(), *_bound(), *_load()]


def quality_figures(requests: Iterable[Request]) -> list[QualityFigure]:
    """The pass rate over all verifiers, that of each verifier that was used, agreement as a number, and warnings."""
    names = dict.fromkeys(verdict.name for request in requests for verdict in request.verdicts)
    found = [QualityFigure("pass_rate", "Verifier pass rate", "share", 1, True, passed)]
    if len(names) > 1:
        label = "Verifier pass rate: "
        found += [QualityFigure(f"pass_rate:{n}", label + n, "share", 1, True, _passed_one(n)) for n in names]
    if AGREEMENT in names:
        label = "Agreement with the baseline's answers"
        found.append(QualityFigure(AGREEMENT, label, "share", 1, True, _agreement))
    return [*found, QualityFigure("warnings", "Warnings per answer", "count", -1, False, warnings_of)]


def passed(request: Request) -> float | None:
    """1 where every verifier that could judge passed the answer; 0 for a failed request; None where none judged."""
    if request.error is not None:
        return 0.0
    judged = [verdict.passed for verdict in request.verdicts if verdict.passed is not None]
    return float(all(judged)) if judged else None


def warnings_of(request: Request) -> float | None:
    """Warnings of all verifiers; None where none looked at the answer."""
    return float(sum(len(verdict.warnings) for verdict in request.verdicts)) if request.verdicts else None


def _agreement(request: Request) -> float | None:
    """How much of the baseline's answer it has: the score of the verifier; 0 for a failed request."""
    if request.error is not None:
        return 0.0
    return next((verdict.score for verdict in request.verdicts if verdict.name == AGREEMENT), None)


def _passed_one(name: str) -> Callable[[Request], float | None]:
    def found(request: Request) -> float | None:
        judged = [v.passed for v in request.verdicts if v.name == name and v.passed is not None]
        return float(all(judged)) if judged else None

    return found


def _at(part: str, key: str) -> Callable[[Leg], float | None]:
    """The number ``key`` of a part of a leg; None where the leg has no such part."""
    return lambda leg: getattr(getattr(leg, part), key, None)


def _measured(key: str) -> Callable[[Leg], float | None]:
    """A metric of answers; None where no request was answered, whatever stands there."""
    return _answered(_at("metrics", key))


def _answered(of: Callable[[Leg], float | None]) -> Callable[[Leg], float | None]:
    return lambda leg: None if leg.metrics.completed == 0 else of(leg)


def _speed() -> Iterator[Figure]:
    for key, label, unit in (
        ("output_throughput", "Output throughput", "tokens/s"),
        ("total_token_throughput", "Total token throughput", "tokens/s"),
        ("request_throughput", "Request throughput", "requests/s"),
    ):
        yield Figure(key, label, SPEED, unit, 1, True, _measured(key))  # type: ignore[arg-type]


def _latency() -> Iterator[Figure]:
    for name in LATENCIES:
        for statistic in ("mean", "median", "p99"):
            key = f"{statistic}_{name}_ms"
            yield Figure(key, f"{_NAMES[name]}, {statistic}", LATENCY, "ms", -1, True, _measured(key))


def _memory() -> Iterator[Figure]:
    for key, label in (
        ("pool_bytes_peak", "KV cache in use, peak"),
        ("device_memory_bytes_peak", "Device memory, peak"),
        ("process_memory_bytes_peak", "Process memory, peak"),
    ):
        yield Figure(key, label, MEMORY, "bytes", -1, True, _at("memory", key))
    yield Figure("eviction_ratio", "Eviction ratio", MEMORY, "share", 0, False, lambda leg: leg.eviction_ratio)
    yield Figure("preemptions", "Preemptions", MEMORY, "count", -1, False, _at("memory", "preemptions"))
    for statistic in ("mean", "median", "p99"):
        yield Figure(
            f"attention_{statistic}_ms", f"Attention latency, {statistic}", LATENCY, "ms", -1, True,
            _at("attention", f"{statistic}_ms"),
        )  # fmt: skip


def _bound() -> Iterator[Figure]:
    yield Figure("bound", "Speed-up bound", BOUND, "x", 0, False, _at("bound", "speedup"))
    yield Figure("reached", "Speed-up reached", BOUND, "x", 1, False, _answered(_at("bound", "reached")))
    yield Figure("fraction", "Fraction of the bound", BOUND, "share", 1, False, _answered(_at("bound", "fraction")))


def _load() -> Iterator[Figure]:
    for key, label, unit, better in (
        ("duration", "Duration", "s", 0),
        ("completed", "Requests completed", "count", 0),
        ("failed", "Requests failed", "count", 0),
        ("total_input_tokens", "Input tokens", "count", 0),
        ("total_output_tokens", "Output tokens", "count", 0),
        ("max_concurrent_requests", "Requests in flight, at most", "count", 0),
    ):
        of = _at("metrics", key) if key in COUNTED else _measured(key)
        yield Figure(key, label, LOAD, unit, better, False, of)  # type: ignore[arg-type]
    yield Figure("cost", "Cost", LOAD, "money", -1, False, _at("cost", "amount"))
