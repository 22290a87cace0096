"""The parts of a page before they become HTML: cards, tables, head maps, answers, provenance, as words and numbers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kvprofile.records.record import Cost, Leg, Request, RunRecord
from kvprofile.report.compare import Comparison, Row, Summary
from kvprofile.report.figures import passed
from kvprofile.report.wording import difference, interval, number, scale_for, verdict
from kvprofile.statistics import Estimate

MOST_QUESTIONS = 300
"""Questions that a page shows; the records hold all."""

_CARDS = {
    "output_throughput": "Output throughput",
    "median_ttft_ms": "Time to first token",
    "median_tpot_ms": "Time per output token",
    "max_concurrent_requests": "Requests in flight, at most",
    "pool_bytes_peak": "KV cache in use, peak",
    "pass_rate": "Verifier pass rate",
    "agreement": "Agreement with the baseline's answers",
    "fraction": "Fraction of the bound reached",
    "attention_mean_ms": "Attention latency",
    "cost": "Cost",
}
_OWN = ("leg", "repetition", "status")
_FALLBACKS = {"pool_bytes_peak": "process_memory_bytes_peak", "median_ttft_ms": "mean_ttft_ms"}


@dataclass(frozen=True)
class Cell:
    """A number as shown and in full, with its difference from the reference."""

    text: str
    value: float | None
    interval: str = ""
    difference: str = ""
    difference_value: float | None = None
    difference_interval: str = ""
    verdict: str = ""


@dataclass(frozen=True)
class Line:
    """A row of a table or card: what it is, its unit, and a cell for each leg."""

    key: str
    label: str
    unit: str
    part: bool
    cells: Mapping[str, Cell]
    bars: Mapping[str, float]


def cards(summary: Summary) -> list[dict[str, Any]]:
    """The few figures that matter most, with a bar for every leg: of 100 % for shares, else of the longest."""
    found = []
    for key, title in _CARDS.items():
        row = summary.against_baseline.row(key) or summary.against_baseline.row(_FALLBACKS.get(key, key))
        if row is None:
            continue
        names = [g.name for g in summary.groups if g.name in row.values and row.values[g.name].value is not None]
        line = _line(row, names, _currency(summary))
        found.append({"key": key, "title": title if row.key == key else row.label, "line": line, "names": names})
    return found


def sections(comparison: Comparison, names: Sequence[str], summary: Summary) -> list[tuple[str, list[Line]]]:
    """The rows of a comparison under their headings."""
    found: dict[str, list[Line]] = {}
    for row in comparison.rows:
        found.setdefault(row.section, []).append(_line(row, names, _currency(summary)))
    return list(found.items())


def _line(row: Row, names: Sequence[str], currency: str | None) -> Line:
    known = [row.values[name].value for name in names if name in row.values]
    scale = scale_for(row.unit, known, currency)
    largest = max((value for value in known if value is not None), default=0.0)
    largest = max(largest, 1.0) if row.unit == "share" else largest
    cells, bars = {}, {}
    for name in names:
        value = row.values.get(name, Estimate(None, None, None))
        apart = row.differences.get(name, Estimate(None, None, None))
        words, bounds = difference(apart, scale, relative=row.relative)
        cells[name] = Cell(
            text=scale.text(value.value),
            value=value.value,
            interval=interval(value, scale),
            difference=words,
            difference_value=apart.value,
            difference_interval=bounds,
            verdict=verdict(apart, row.better),
        )
        bars[name] = round(100 * (value.value or 0.0) / largest, 1) if largest else 0.0
    part = ":" in row.key  # of the row above it
    label = row.label.partition(": ")[2] if part else row.label
    return Line(row.key, label, scale.unit, part, cells, bars)


def _currency(summary: Summary) -> str | None:
    """The currency of all costs; None where there are several, and then their sums say so in the records only."""
    found = {leg.cost.currency for group in summary.groups for leg in group.legs if leg.cost}
    return found.pop() if len(found) == 1 else None


def head_maps(summary: Summary) -> list[dict[str, Any]]:
    """The budgets of each group that trims: rows of KV heads over columns of layers."""
    found = []
    for group in summary.groups:
        heads = next((leg.heads for leg in group.legs if leg.heads), None)
        if heads is None:
            continue
        values = [value for row in heads.budgets for value in row if value is not None]
        full = sum(value == 1.0 for value in values)
        shares = [value for value in values if 0.0 < value < 1.0]
        graded, window = [], []
        if shares:
            low, high = (f"{100 * edge:.0f} %" for edge in (min(shares), max(shares)))
            graded = [f"graded: {len(shares)} keep {low if low == high else f'{low} to {high}'} of it, the best tokens"]
        if heads.sink_tokens is not None and heads.recent_tokens is not None:
            who, sinks, recent = "all but full ones" if shares else "the others", heads.sink_tokens, heads.recent_tokens
            window = [f"{who} keep {number(sinks)} sinks and the last {number(recent)} tokens"]
        found.append(
            {
                "name": group.name,
                "budgets": heads.budgets,
                "layers": len(heads.budgets),
                "kv_heads": len(heads.budgets[0]),
                "words": "; ".join([f"{full} of {len(values)} heads keep the whole context", *graded, *window]),
                "ranked": " by ".join(filter(None, (heads.method, heads.statistic))),
            }
        )
    return found


def verifier_warnings(summary: Summary) -> list[dict[str, Any]]:
    """Every warning once for each leg, how often it came, and where it came first."""
    found: dict[tuple[str, str, str], dict[str, Any]] = {}
    for group in summary.groups:
        for leg in group.legs:
            for text in leg.warnings:
                _count(found, group.name, "leg", text, None)
        for request in group.requests:
            for given in request.verdicts:
                for text in given.warnings:
                    _count(found, group.name, given.name, text, request)
    return list(found.values())


def _count(found: dict[Any, dict[str, Any]], leg: str, source: str, text: str, request: Request | None) -> None:
    entry = found.setdefault(
        (leg, source, text),
        {
            "leg": leg, "source": source, "text": text, "count": 0,
            "document": request.document if request else None, "question": request.question if request else None,
        },
    )  # fmt: skip
    entry["count"] += 1


def document_groups(summary: Summary) -> dict[str, Any]:
    """Questions by document, each with the answers of all legs next to each other."""
    questions: dict[tuple[str | None, str | None], dict[str, list[Request]]] = {}
    for group in summary.groups:
        for request in group.requests:
            if request.question is None and request.output is None and request.error is None:
                continue
            key = request.document, request.question
            questions.setdefault(key, {}).setdefault(group.name, []).append(request)
    documents: dict[str, list[dict[str, Any]]] = {}
    for (document, question), by_leg in list(questions.items())[:MOST_QUESTIONS]:
        answers = [_answer(name, requests) for name, requests in by_leg.items()]
        expected = next((r.expected for requests in by_leg.values() for r in requests if r.expected is not None), None)
        documents.setdefault(document or "", []).append(
            {"question": question, "expected": expected, "answers": answers}
        )
    return {"documents": documents, "left_out": max(0, len(questions) - MOST_QUESTIONS)}


def _answer(name: str, requests: Sequence[Request]) -> dict[str, Any]:
    """The first answer of a leg in full, and how many of its repetitions passed."""
    judged = [bool(found) for request in requests if (found := passed(request)) is not None]
    return {
        "name": name,
        "request": requests[0],
        "passed": sum(judged),
        "judged": len(judged),
        "asked": len(requests),
        "verdict": "" if not judged else "pass" if all(judged) else "mixed" if any(judged) else "fail",
    }


def provenance(summary: Summary) -> list[dict[str, Any]]:
    """For each record what was asked for and where it ran; for each leg what it was."""
    return [
        {
            "experiment": record.experiment,
            "facts": list(_facts(record)),
            "settings": [(key, _setting(value)) for key, value in sorted(record.experiment.settings.items())],
            "versions": sorted(record.provenance.versions.items()),
            "environment": sorted(record.provenance.environment.items()),
            **_legs(record),
            "documents": _documents(record),
        }
        for record in summary.records
    ]


def _facts(record: RunRecord) -> Iterator[tuple[str, str]]:
    made, machine = record.provenance, record.provenance.machine
    dirty = {True: ", with changes", False: "", None: ""}[made.git_dirty]
    yield "kvprofile", record.kvprofile_version
    yield "commit", f"{made.git_commit}{dirty}"
    yield "started", made.started or "unknown"
    yield "finished", made.finished or "unknown"
    yield "system", " ".join(filter(None, (machine.system, machine.architecture))) or "unknown"
    yield "processor", machine.processor or "unknown"
    yield "cores", "unknown" if machine.cores is None else str(machine.cores)
    yield "memory", "unknown" if machine.memory_bytes is None else _bytes(machine.memory_bytes)
    accelerators = machine.accelerators
    yield "accelerators", "unknown" if accelerators is None else ", ".join(accelerators) or "none"


def _legs(record: RunRecord) -> dict[str, Any]:
    """What all legs of a record share, said once, and what differs, as the columns of a table; nothing of the empty."""
    rows = [dict(_leg_facts(leg)) for leg in record.legs]
    own = [name for name in rows[0] if name in _OWN or len({row[name] for row in rows}) > 1]
    shared = [(name, text) for name, text in rows[0].items() if name not in own and text]
    return {"shared": shared, "columns": own, "rows": [[row[name] for name in own] for row in rows]}


def _leg_facts(leg: Leg) -> Iterator[tuple[str, str]]:
    load = leg.load
    yield "leg", leg.name
    yield "repetition", str(leg.repetition + 1)
    yield "status", leg.status if leg.reason is None else f"{leg.status}: {leg.reason}"
    yield "started", leg.started or ""
    yield "kind", " ".join(filter(None, (leg.kind or "unknown", leg.provider)))
    yield "engine", leg.engine or ""
    yield "model", leg.model
    yield "dtype", leg.dtype or ""
    yield "cache dtype", leg.kv_cache_dtype or ""
    yield "device", leg.device or ""
    yield "pool", "" if leg.pool_bytes is None else _bytes(leg.pool_bytes)
    yield "block", "" if leg.block_tokens is None else f"{leg.block_tokens} tokens"
    yield "load", load.mode
    for name, value in (
        ("in flight", load.concurrency),
        ("requests/s", load.request_rate),
        ("burstiness", load.burstiness),
        ("requests", load.requests),
        ("warm-up", load.warmup_requests),
        ("output tokens", load.max_output_tokens),
        ("temperature", load.temperature),
    ):
        yield name, "" if value is None else number(value)
    yield "streaming", _setting(load.streaming) if load.streaming is not None else ""
    yield "prefix caching", _setting(load.prefix_caching) if load.prefix_caching is not None else ""
    yield "seeds", ", ".join(map(str, leg.seeds))
    yield "attention pass", leg.attention.how if leg.attention else ""
    yield "bound", leg.bound.how if leg.bound else ""
    yield "prices", _prices(leg.cost) if leg.cost else ""
    yield "notes", load.description


def _prices(cost: Cost) -> str:
    """Prices per million tokens, in and out."""
    known = (cost.input_per_million_tokens, cost.output_per_million_tokens)
    values = ["unknown" if value is None else number(value) for value in known]
    return f"{values[0]} in, {values[1]} out, {cost.currency} per million tokens"


def _documents(record: RunRecord) -> list[dict[str, Any]]:
    found = {(d.name, d.sha256, d.tokens): d for leg in record.legs for d in leg.documents}
    return [document.model_dump() for document in found.values()]


def _setting(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(_setting, value)) or "none"
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "not set"}[value]
    return f"{value:,.12g}" if isinstance(value, (int, float)) else str(value) or "none"


def _bytes(value: int) -> str:
    scale = scale_for("bytes", [value])
    return f"{scale.text(value)} {scale.unit}"
