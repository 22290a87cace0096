"""Charts as geometry: where marks, lines and labels stand in a small picture. Templates turn them into SVG.

A chart draws what a summary and its records hold; places on the paper are all that is computed. Each comes with its
numbers as a table, for readers who do not see it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from kvprofile.records.record import Leg, Sample
from kvprofile.report.compare import Group, Row, Summary
from kvprofile.report.figures import figures
from kvprofile.report.wording import Scale, interval, scale_for
from kvprofile.statistics import Estimate

WIDTH, HEIGHT = 380, 236
LEFT, RIGHT, TOP, BOTTOM = 46, 14, 12, 34
MOST_POINTS = 300
MOST_TABLE_ROWS = 24
_LABEL_WIDTH = 34


@dataclass(frozen=True)
class Mark:
    """A point. ``tip`` shows when it is pointed at; ``low`` and ``high`` are the ends of its whisker."""

    x: float
    y: float
    tip: str
    faint: bool = False
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Series:
    """What is drawn of one group in its colour, ``g0``, ``g1``, ...; ``path`` is an SVG path."""

    name: str
    style: str
    path: str = ""
    marks: tuple[Mark, ...] = ()
    dashed: bool = False


@dataclass(frozen=True)
class Tick:
    """A label on an axis, and where it stands."""

    at: float
    text: str


@dataclass(frozen=True)
class Table:
    """The numbers of a chart. A cell is (what is shown, the number itself or None)."""

    head: tuple[str, ...]
    rows: tuple[tuple[tuple[str, float | None], ...], ...]


@dataclass(frozen=True)
class Chart:
    """A picture of WIDTH x HEIGHT with its words and its numbers."""

    key: str
    title: str
    unit: str
    note: str
    x_label: str
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    series: tuple[Series, ...]
    table: Table
    description: str = field(default="")


@dataclass(frozen=True)
class Axis:
    """Values from ``low`` to ``high`` laid between two places."""

    low: float
    high: float
    start: float
    end: float

    def at(self, value: float) -> float:
        """The place of a value, to a tenth of a unit."""
        span = self.high - self.low or 1.0
        return round(self.start + (value - self.low) / span * (self.end - self.start), 1)


def styles(groups: Sequence[Group]) -> dict[str, str]:
    """The colour class of each group: g0 the first, which is the baseline; 'remote' its own; the others in turn."""
    found, turn = {}, 0
    for number, group in enumerate(groups):
        if group.first.kind == "remote":
            found[group.name] = "gr"
        elif number == 0:
            found[group.name] = "g0"
        else:
            found[group.name] = f"g{turn % 6 + 1}"
            turn += 1
    return found


def charts(summary: Summary) -> list[Chart]:
    """Every chart for which there are numbers, in the order of the page."""
    return [*_against_retention(summary), *_over_time(summary)]


def nice_ticks(low: float, high: float, count: int = 4) -> list[float]:
    """About ``count`` round numbers from ``low`` or below to ``high`` or above."""
    span = (high - low) or abs(high) or 1.0
    rough = span / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [float(f"{step * number:.12g}") for number in range(first, max(last, first + 1) + 1)]


_TITLES = {
    "output_throughput": "Output throughput",
    "median_ttft_ms": "Time to first token",
    "median_tpot_ms": "Time per output token",
    "median_e2el_ms": "End-to-end latency",
    "attention_mean_ms": "Attention latency",
    "pool_bytes_peak": "KV cache in use, peak",
    "eviction_ratio": "Eviction ratio",
    "pass_rate": "Verifier pass rate",
    "warnings": "Warnings per answer",
    "reached": "Speed-up and its bound",
}
_NOTES = {
    "median_ttft_ms": "median",
    "median_tpot_ms": "median",
    "median_e2el_ms": "median",
    "attention_mean_ms": "mean of a decode step, eager pass",
    "eviction_ratio": "blocks freed by trims, of all that prefills took",
    "pass_rate": "answers that every verifier passed",
    "reached": "dashed: the most that trimming can gain",
    "output_throughput": "mean, and each repetition",
    "pool_bytes_peak": "mean of the repetitions' peaks",
}


def _against_retention(summary: Summary) -> Iterator[Chart]:
    for key in _TITLES:
        row = summary.against_baseline.row(key)
        if row is not None:
            yield _retention_chart(summary, row)


def _retention_chart(summary: Summary, row: Row) -> Chart:
    """A row's values: local legs at their retentions, joined; remote ones as lines across; all by name without any."""
    # only groups with a number; the bound is drawn next to what was reached
    groups = [g for g in summary.groups if g.name in row.values and row.values[g.name].value is not None]
    bound = summary.against_baseline.row("bound") if row.key == "reached" else None
    legs = _repetitions(row.key, groups)
    # the vertical axis holds every mark, whisker and repetition; speed-ups start at 1, everything else at 0
    numbers = _numbers(row, groups, bound, legs)
    scale = scale_for(row.unit, numbers)
    ceiling = 1.0 if row.unit == "share" else max(numbers) or 1.0
    ticks = nice_ticks(min(1.0 if bound else 0.0, *numbers) / scale.divisor, ceiling / scale.divisor)
    axis = Axis(ticks[0] * scale.divisor, ticks[-1] * scale.divisor, HEIGHT - BOTTOM, TOP)
    # places from left to right, and a line through the legs that stand at different retentions
    places, x_ticks, x_label = _places(groups)
    local = [group for group in groups if group.name in places]
    series = [_joined(line, places, axis, row) for line in _lines(local)]
    if bound:
        series.insert(0, _bound_line(bound, places, axis))
    # the marks lie over the lines
    style = styles(summary.groups)
    for group in groups:
        series.append(_group_marks(group, row.values[group.name], legs.get(group.name, []), places, axis, scale, style))
    head = ("leg", "retention", _headed(_TITLES[row.key], scale), "95 % interval", *(["bound"] if bound else []))
    rows = tuple(_table_row(group, row, scale, bound) for group in groups)
    return Chart(
        key=row.key,
        title=_TITLES[row.key],
        unit=scale.unit,
        note=_NOTES.get(row.key, ""),
        x_label=x_label,
        x_ticks=tuple(x_ticks),
        y_ticks=tuple(Tick(axis.at(each * scale.divisor), scale.tick(each * scale.divisor)) for each in ticks),
        series=tuple(series),
        table=Table(head, rows),
        description="; ".join(f"{cells[0][0]} {cells[2][0]} {scale.unit}".strip() for cells in rows),
    )


def _numbers(row: Row, groups: Sequence[Group], bound: Row | None, legs: dict[str, list[float]]) -> list[float]:
    """Everything that a chart draws: means, the ends of their intervals, repetitions, bounds."""
    shown = [row.values[group.name] for group in groups]
    found = [each for value in shown for each in (value.value, value.low, value.high) if each is not None]
    found += [each.value for each in bound.values.values() if each.value is not None] if bound else []
    return found + [value for values in legs.values() for value in values]


def _table_row(group: Group, row: Row, scale: Scale, bound: Row | None) -> tuple[tuple[str, float | None], ...]:
    value = row.values[group.name]
    cells: list[tuple[str, float | None]] = [
        (group.name, None),
        (Scale("", percent=True).text(group.retention), group.retention),
        (scale.text(value.value), value.value),
        (interval(value, scale), None),
    ]
    if bound:
        most = bound.values[group.name].value
        cells.append((scale.text(most), most))
    return tuple(cells)


def _places(groups: Sequence[Group]) -> tuple[dict[str, float], list[Tick], str]:
    """Where groups stand from left to right: by retention where two are known, else side by side."""
    left, right = LEFT + 16, WIDTH - RIGHT - 16
    known = {g.name: g.retention for g in groups if g.retention is not None and g.first.kind != "remote"}
    if len(set(known.values())) > 1:
        axis = Axis(min(known.values()), max(known.values()), left, right)
        ticks: list[Tick] = []
        for retention in sorted(set(known.values()), reverse=True):
            place = axis.at(retention)
            if not ticks or ticks[-1].at - place >= _LABEL_WIDTH:
                ticks.append(Tick(place, Scale("", percent=True).text(retention)))
        return {name: axis.at(retention) for name, retention in known.items()}, ticks, "retention"
    axis = Axis(-0.5, len(groups) - 0.5, left, right)
    places = {group.name: axis.at(number) for number, group in enumerate(groups)}
    longest = int((right - left) / max(1, len(groups)) / 6)
    return places, [Tick(places[g.name], _shortened(g.name, longest)) for g in groups], ""


def _lines(groups: Sequence[Group]) -> Iterator[list[Group]]:
    """Legs that one line joins: of one kind of heads and one dtype of the cache, and those whose heads are all full."""
    lines: dict[tuple[bool, str | None], list[Group]] = {}
    for group in groups:
        if group.retention != 1.0:
            lines.setdefault((_is_graded(group), group.first.kv_cache_dtype), []).append(group)
    for (_, dtype), line in lines.items():
        line += [group for group in groups if group.retention == 1.0 and group.first.kv_cache_dtype == dtype]
        if len({group.retention for group in line} - {None}) > 1:
            yield line


def _is_graded(group: Group) -> bool:
    heads = group.first.heads
    return heads is not None and any(0.0 < (value or 0.0) < 1.0 for row in heads.budgets for value in row)


def _joined(groups: Sequence[Group], places: dict[str, float], axis: Axis, row: Row) -> Series:
    ordered = sorted(groups, key=lambda group: places[group.name])
    values = [(places[g.name], row.values[g.name].value) for g in ordered]
    return Series("", "joined", _path([(x, axis.at(y)) for x, y in values if y is not None]))


def _bound_line(bound: Row, places: dict[str, float], axis: Axis) -> Series:
    """A short line across each leg's place, joined by a long one."""
    found = sorted((places[n], e.value) for n, e in bound.values.items() if n in places and e.value is not None)
    points = [(x, axis.at(y)) for x, y in found]
    return Series("bound", "bound", "".join(f"M{x - 9:g},{y:g}h18" for x, y in points) + _path(points), dashed=True)


def _group_marks(
    group: Group,
    value: Estimate,
    repetitions: Sequence[float],
    places: dict[str, float],
    axis: Axis,
    scale: Scale,
    style: dict[str, str],
) -> Series:
    """A group's mean with its interval, its repetitions faintly; a line across for a group without a place."""
    words = f"{group.name}: {scale.text(value.value)} {scale.unit}".strip()
    if bounds := interval(value, scale):
        words += f" ({bounds})"
    y = axis.at(value.value or 0.0)
    x = places.get(group.name)
    if x is None:
        path = _path([(LEFT, y), (WIDTH - RIGHT, y)])
        return Series(group.name, style[group.name], path, (Mark(WIDTH - RIGHT - 4, y, words),), dashed=True)
    marks = [
        Mark(x, axis.at(each), f"{group.name}: {scale.text(each)} {scale.unit}", faint=True) for each in repetitions
    ]
    low, high = (
        None if each is None else min(max(axis.at(each), TOP), HEIGHT - BOTTOM) for each in (value.low, value.high)
    )
    return Series(group.name, style[group.name], "", (*marks, Mark(x, y, words, low=low, high=high)))


def _repetitions(key: str, groups: Sequence[Group]) -> dict[str, list[float]]:
    """What each repetition of a group stated for a figure, where there are several."""
    of = next((figure.of for figure in figures() if figure.key == key), None)
    if of is None:
        return {}
    found = {g.name: [value for leg in g.legs if (value := of(leg)) is not None] for g in groups if len(g.legs) > 1}
    return {name: values for name, values in found.items() if values}


_TIMELINES: tuple[tuple[str, str, str, Callable[[Sample], float | None]], ...] = (
    ("pool", "KV cache in use", "bytes", lambda sample: sample.pool_bytes_in_use),
    ("eviction", "Eviction ratio over time", "share", lambda sample: sample.eviction_ratio),
    ("device", "Device memory", "bytes", lambda sample: sample.device_memory_bytes),
    ("process", "Process memory", "bytes", lambda sample: sample.process_memory_bytes),
    ("attention", "Attention latency over time", "ms", lambda sample: sample.attention_ms),
)


def _over_time(summary: Summary) -> Iterator[Chart]:
    style = styles(summary.groups)
    for key, title, unit, of in _TIMELINES:
        lines: dict[str, list[tuple[float, float]]] = {}
        for group in summary.groups:
            points = next(filter(None, (_points(leg, of) for leg in group.legs)), [])
            if points:
                lines[group.name] = points
        if lines:
            yield _timeline(key, title, unit, lines, style)


def _points(leg: Leg, of: Callable[[Sample], float | None]) -> list[tuple[float, float]]:
    return [(sample.t_s, value) for sample in leg.samples if (value := of(sample)) is not None]


def _timeline(
    key: str, title: str, unit: str, lines: dict[str, list[tuple[float, float]]], style: dict[str, str]
) -> Chart:
    values = [value for points in lines.values() for _, value in points]
    times = [time for points in lines.values() for time, _ in points]
    # both axes: values from 0, times from the warm-up's first sample or from 0
    scale = scale_for(unit, values)  # type: ignore[arg-type]
    ceiling = 1.0 if unit == "share" else max(values) or 1.0
    ticks = nice_ticks(0.0, ceiling / scale.divisor)
    axis = Axis(0.0, ticks[-1] * scale.divisor, HEIGHT - BOTTOM, TOP)
    x_ticks = [each for each in nice_ticks(min(0.0, *times), max(times), 5) if min(0.0, *times) <= each <= max(times)]
    x_axis = Axis(min(0.0, *times), max(times), LEFT, WIDTH - RIGHT)
    series = [
        Series(name, style[name], _path([(x_axis.at(t), axis.at(v)) for t, v in thinned(points)]))
        for name, points in lines.items()
    ]
    described = (
        f"{name}: {len(p)} samples, at most {scale.text(max(v for _, v in p))} {scale.unit}"
        for name, p in lines.items()
    )
    return Chart(
        key=key,
        title=title,
        unit=scale.unit,
        note="one repetition of each leg",
        x_label="seconds since the leg began",
        x_ticks=tuple(Tick(x_axis.at(each), Scale("").tick(each)) for each in x_ticks),
        y_ticks=tuple(Tick(axis.at(each * scale.divisor), scale.tick(each * scale.divisor)) for each in ticks),
        series=tuple(series),
        table=Table(("leg", "seconds", _headed(title, scale)), _timeline_rows(lines, scale)),
        description="; ".join(described).strip(),
    )


def _timeline_rows(
    lines: dict[str, list[tuple[float, float]]], scale: Scale
) -> tuple[tuple[tuple[str, float | None], ...], ...]:
    """About MOST_TABLE_ROWS samples in all, evenly taken from every line."""
    rows: list[tuple[tuple[str, float | None], ...]] = []
    for name, points in lines.items():
        step = math.ceil(len(points) / max(1, MOST_TABLE_ROWS // len(lines)))
        rows += [((name, None), (Scale("").text(t), t), (scale.text(v), v)) for t, v in points[::step]]
    return tuple(rows)


def thinned(points: Sequence[tuple[float, float]], most: int = MOST_POINTS) -> list[tuple[float, float]]:
    """At most ``most`` points that keep the lowest and the highest of every stretch, in their order."""
    if len(points) <= most:
        return list(points)
    size = math.ceil(len(points) / (most // 2))
    found: list[tuple[float, float]] = []
    for start in range(0, len(points), size):
        stretch = range(start, min(start + size, len(points)))
        ends = {min(stretch, key=lambda i: points[i][1]), max(stretch, key=lambda i: points[i][1])}
        found += [points[i] for i in sorted(ends)]
    return found


def _path(points: Sequence[tuple[float, float]]) -> str:
    return "M" + "L".join(f"{x:g},{y:g}" for x, y in points) if points else ""


def _headed(title: str, scale: Scale) -> str:
    return f"{title}, {scale.unit}" if scale.unit else title


def _shortened(text: str, length: int) -> str:
    return text if len(text) <= length else f"{text[: max(1, length - 1)]}…"
