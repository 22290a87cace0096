"""Head scores and budgets as blocks of text: layers from left to right, KV heads from top to bottom.

A map is a function from (layer, KV head) to a glyph and its colour; ``draw`` lays one map out in bands that fit the
terminal, ``draw_pair`` two maps next to each other or, where they do not fit, one below the other.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Iterator
from typing import TypeAlias

from rich.text import Text

from kvprofile.budget.profile import Matrix

Cell: TypeAlias = Callable[[int, int], tuple[str, str]]
"""(layer, KV head) -> (one glyph, rich style)."""

SHADES = "·░▒▓█"
"""Least to most important fifth of the heads; readable without colour."""

COLOURS = ("#808080", "#4a7ab5", "#2f8a9c", "#ad6f25", "#c8452d")
"""Steps of middle lightness from grey and blue to red: contrast of 3:1 or more on white, black, light and dark grey."""

FULL, TRIMMED, UNPROFILED = "■", "·", " "
PARTIAL = SHADES[1:]
"""Of heads that keep a part of the context: up to a quarter of it, a half, three quarters, and more."""

GAINED, LOST = "+", "-"
BLANK_NOTE = "blank columns: layers that slide or have no cache, not profiled"


def score_legend() -> Text:
    """What the shades of ``score_cell`` mean, in their colours."""
    line = Text("by fifths of the ranking: low")
    for shade, colour in zip(SHADES, COLOURS, strict=True):
        line.append(f" {shade}", style=colour)
    return line.append(" high")


def score_cell(scores: Matrix) -> Cell:
    """Each head's fifth in the ranking of all heads of ``scores`` [L][G]; other layers stay blank."""
    values = sorted(value for row in scores for value in row if value is not None)
    bounds = [values[min(len(values) - 1, len(values) * i // len(SHADES))] for i in range(1, len(SHADES))]

    def cell(layer: int, head: int) -> tuple[str, str]:
        value = scores[layer][head]
        if value is None:
            return UNPROFILED, ""
        step = bisect_right(bounds, value)
        return SHADES[step], COLOURS[step]

    return cell


def budget_cell(heads: Matrix) -> Cell:
    """Which heads of ``heads`` [L][G] keep the whole context, which a part of it, which only sinks and window."""

    def cell(layer: int, head: int) -> tuple[str, str]:
        value = heads[layer][head]
        if value is None:
            return UNPROFILED, ""
        if value == 1.0:
            return FULL, COLOURS[4]
        if value == 0.0:
            return TRIMMED, COLOURS[0]
        return PARTIAL[min(3, int(value * 4))], COLOURS[2]

    return cell


def change_cell(before: Matrix, after: Matrix) -> Cell:
    """How the budgets [L][G] of the heads move from one file to another: gained, lost, or as they were."""
    unchanged = budget_cell(after)

    def cell(layer: int, head: int) -> tuple[str, str]:
        was, now = before[layer][head], after[layer][head]
        if was is None or now is None or was == now:
            return unchanged(layer, head)[0], COLOURS[0]
        return (GAINED, f"bold {COLOURS[4]}") if now > was else (LOST, f"bold {COLOURS[1]}")

    return cell


def draw(cell: Cell, layers: int, kv_heads: int, columns: int) -> Iterator[Text]:
    """Lines of one map, at most ``columns`` wide; more layers than fit are wrapped into bands of equal length."""
    label = _label_width(kv_heads)
    room = max(8, columns - label)
    width = 2 if layers * 2 <= room else 1
    bands = math.ceil(layers * width / room)
    per_band = min(room // width, math.ceil(layers / bands / 5) * 5)
    for first in range(0, layers, per_band):
        band = range(first, min(layers, first + per_band))
        if first:
            yield Text()
        yield Text(" " * label + _ruler(band, width), style="dim")
        for head in range(kv_heads):
            yield _row(head, label).append_text(_cells(cell, band, head, width))


def draw_pair(
    cells: tuple[Cell, Cell], titles: tuple[str, str], layers: int, kv_heads: int, columns: int
) -> Iterator[Text]:
    """Lines of two maps of one shape: side by side where ``columns`` allow, else the second below the first."""
    label, gap = _label_width(kv_heads), 3
    width = 2 if label + layers * 4 + gap <= columns else 1
    if label + layers * width * 2 + gap > columns:
        for place, (title, cell) in enumerate(zip(titles, cells, strict=True)):
            if place:
                yield Text()
            yield Text(_shorten(title, columns))
            yield from draw(cell, layers, kv_heads, columns)
        return
    band = range(layers)
    blocks = [_shorten(title, layers * width).ljust(layers * width + gap) for title in titles]
    yield Text((" " * label + "".join(blocks)).rstrip())
    ruler = _ruler(band, width)
    yield Text(" " * label + ruler.ljust(layers * width + gap) + ruler, style="dim")
    for head in range(kv_heads):
        line = _row(head, label).append_text(_cells(cells[0], band, head, width))
        yield line.append(" " * gap).append_text(_cells(cells[1], band, head, width))


def _label_width(kv_heads: int) -> int:
    return len(f"KV {kv_heads - 1} ")


def _row(head: int, label: int) -> Text:
    line = Text()
    line.append(f"KV {head:>{label - 4}} ", style="dim")
    return line


def _cells(cell: Cell, band: range, head: int, width: int) -> Text:
    line = Text()
    for layer in band:
        glyph, style = cell(layer, head)
        line.append(glyph * width if glyph in SHADES[1:] else glyph.ljust(width), style=style)
    return line


def _ruler(band: range, width: int) -> str:
    ruler = ""
    for layer in band:
        at = (layer - band.start) * width
        if layer % 5 == 0 and len(ruler) <= at and at + len(str(layer)) <= len(band) * width:
            ruler = ruler.ljust(at) + str(layer)
    return ruler.ljust(len(band) * width)


def _shorten(title: str, columns: int) -> str:
    """The title, its middle left out where it is longer than ``columns``."""
    if len(title) <= columns:
        return title
    kept = max(2, columns - 1)
    return f"{title[: kept - kept // 2]}…{title[len(title) - kept // 2 :]}"
