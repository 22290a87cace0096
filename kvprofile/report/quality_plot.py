"""An evaluation as a picture: accuracy against the share of the cache that is kept, profiles next to their controls.

Where the full cache's answers are too seldom right to be compared, it is agreement with the full cache.

It draws what ``summary.json`` of an evaluation holds and computes nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvprofile.files import write_atomically
from kvprofile.report.plots import DEFAULT_DPI, Picture, picture_of, to_bytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PROFILE_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#000000")
"""Okabe and Ito's palette, which colour-blind readers can tell apart; markers tell more profiles apart."""

_MARKERS = "osD^vPX"
_GREY = "#8a8a8a"
_CONTROLS: dict[str, dict[str, Any]] = {
    "uniform": {"color": "#56b4e9", "linestyle": (0, (6, 2, 1, 2)), "marker": "d"},
    "inverted": {"color": "#b58900", "linestyle": (0, (1, 1.5)), "marker": "v"},
    "any tokens": {"color": "#56b4e9", "linestyle": (0, (1, 1.5)), "marker": "d"},
    "reversed": {"color": "#b58900", "linestyle": (0, (6, 2, 1, 2)), "marker": "v"},
    "key norms": {"color": "#8a8a8a", "linestyle": (0, (6, 2, 1, 2)), "marker": "s"},
    "shuffled": {"color": "#cc79a7", "linestyle": (0, (1, 1.5)), "marker": "P"},
    "equal": {"color": "#cc79a7", "linestyle": (0, (6, 2, 1, 2)), "marker": "X"},
    "own scores": {"color": "#000000", "linestyle": (0, (6, 2, 1, 2)), "marker": "^"},
}


def write(summary: Mapping[str, Any], output: Path, dpi: int = DEFAULT_DPI) -> None:
    """Draw an evaluation into a .png or .svg file, atomically. Raises InputError for another ending."""
    write_atomically(output, render(summary, picture_of(output), dpi))


def render(summary: Mapping[str, Any], picture: Picture, dpi: int = DEFAULT_DPI) -> bytes:
    """The bytes of a picture, the same for the same summary and version of matplotlib."""
    return to_bytes(lambda: _draw(summary), f"kvprofile evaluate: {summary['model']['name']}", picture, dpi)


def _draw(summary: Mapping[str, Any]) -> Figure:
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter

    figure = Figure(figsize=(8.0, 5.0), layout="constrained")
    axes = figure.subplots()
    shown = "accuracy" if summary["answers"]["compared"] else "agreement"
    rows = [{**row, "shown": row[shown], "shown_by_seed": row[f"{shown}_by_seed"]} for row in summary["rows"]]
    full = next(row for row in rows if row["kind"] == "full")["shown"]["value"]
    axes.axhline(full, color="black", linewidth=1.0, linestyle=(0, (5, 3)), label="full cache")
    names = dict.fromkeys(row["name"] for row in rows if row["kind"] == "profile")
    for number, name in enumerate(names):
        colour = PROFILE_COLOURS[number % len(PROFILE_COLOURS)]
        style = {"color": colour, "marker": _MARKERS[number % len(_MARKERS)], "linewidth": 2.0, "markersize": 6}
        _line(axes, [row for row in rows if row["name"] == name and row["kind"] == "profile"], style, bars=True)
    _band(axes, [row for row in rows if row["kind"] == "random"])
    for kind, style in _CONTROLS.items():
        _line(axes, [row for row in rows if row["kind"] == kind], {"linewidth": 1.2, "markersize": 5, **style})
    for row in rows:
        if row["kind"] == "streaming":
            place = row["retention_realised"], row["shown"]["value"]
            axes.plot(*place, "x", color="black", markersize=7, label="no head full")
    axes.set_ylim(-0.03, 1.04)
    axes.set_xlim(right=1.01)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.grid(axis="y", color="#e4e4e4", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.set_xlabel("share of the cache kept, sinks and window included")
    axes.set_ylabel("accuracy" if shown == "accuracy" else "first choices that are the full cache's")
    axes.set_title(_title(summary), fontsize=10)
    _legend(figure, axes, ["full cache", *names])
    return figure


def _legend(figure: Figure, axes: Axes, first: Sequence[str]) -> None:
    """Names below the axes, those of ``first`` before the controls."""
    found = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    labels = [*(name for name in first if name in found), *(name for name in found if name not in first)]
    handles = [found[label] for label in labels]
    figure.legend(handles, labels, loc="outside lower center", ncols=6, frameon=False, fontsize=9, columnspacing=1.6)


def _line(axes: Axes, rows: Sequence[Mapping[str, Any]], style: Mapping[str, Any], bars: bool = False) -> None:
    """What is drawn of one name at its retentions, with interval bars if wanted and where they are known."""
    if not rows:
        return
    places = [row["retention_realised"] for row in rows]
    values = [row["shown"]["value"] for row in rows]
    reach = None
    if bars:
        bounds = [_bounds(row["shown"]) for row in rows]
        reach = list(
            zip(*((value - low, high - value) for value, (low, high) in zip(values, bounds, strict=True)), strict=True)
        )
    axes.errorbar(places, values, yerr=reach, label=rows[0]["name"], capsize=2.5, elinewidth=1.0, zorder=3, **style)


def _bounds(estimate: Mapping[str, float]) -> tuple[float, float]:
    """An interval that holds its value; the value alone where the interval is unknown."""
    value, low, high = estimate["value"], estimate["low"], estimate["high"]
    return (value, value) if low is None or high is None else (min(value, low), max(value, high))


def _band(axes: Axes, rows: Sequence[Mapping[str, Any]]) -> None:
    """Random heads: the mean over the draws, and the range from the worst to the best of them."""
    if not rows:
        return
    places = [row["retention_realised"] for row in rows]
    values = [row["shown"]["value"] for row in rows]
    low, high = ([pick(row["shown_by_seed"]) for row in rows] for pick in (min, max))
    seeds = rows[0]["seeds"]
    label = f"random, {seeds} draw{'s' if seeds > 1 else ''}"
    axes.fill_between(places, low, high, color="#d9d9d9", linewidth=0, zorder=1)
    axes.plot(places, values, color=_GREY, linewidth=1.2, marker=".", label=label, zorder=2)


def _title(summary: Mapping[str, Any]) -> str:
    settings = summary["settings"]
    shortest, longest = summary["context_tokens"]
    tokens = f"{shortest:,}" if shortest == longest else f"{shortest:,} to {longest:,}"
    return (
        f"{summary['model']['name']}: {summary['questions']:,} questions on {summary['exercises']:,} contexts of "
        f"{tokens} tokens\ntrimmed heads keep {settings['sink_tokens']} sinks and the last "
        f"{settings['recent_tokens']} tokens; bars: 95 % intervals; band: range of the draws"
    )
