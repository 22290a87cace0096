"""Head scores and budgets as blocks of text: layers from left to right, KV heads from top to bottom."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator

from rich.text import Text

from kvprofile.budget.profile import Matrix

SHADES = "·░▒▓█"
"""Least to most important fifth of the heads; readable without colour."""

_COLOURS = ("#8a8a8a", "#4f7fb5", "#3a94a6", "#b5762a", "#c8452d")
"""Mid-lightness steps from blue to red: legible on light and dark, distinct to colour-blind readers."""

FULL, TRIMMED, UNPROFILED = "■", "·", " "
_LABEL_COLUMNS = 9


def score_map(scores: Matrix, columns: int) -> Iterator[Text]:
    """Lines that show each head's fifth in the ranking of all heads; sliding layers stay blank."""
    values = sorted(value for row in scores for value in row if value is not None)
    bounds = [values[min(len(values) - 1, len(values) * i // len(SHADES))] for i in range(1, len(SHADES))]

    def cell(layer: int, head: int) -> tuple[str, str]:
        value = scores[layer][head]
        if value is None:
            return UNPROFILED, ""
        step = bisect_right(bounds, value)
        return SHADES[step], _COLOURS[step]

    yield from _bands(scores, columns, cell)


def budget_map(heads: Matrix, columns: int) -> Iterator[Text]:
    """Lines that show which heads keep the whole context."""

    def cell(layer: int, head: int) -> tuple[str, str]:
        value = heads[layer][head]
        if value is None:
            return UNPROFILED, ""
        if value == 1.0:
            return FULL, _COLOURS[4]
        if value == 0.0:
            return TRIMMED, _COLOURS[0]
        return SHADES[min(4, int(value * 5))], _COLOURS[2]

    yield from _bands(heads, columns, cell)


def _bands(matrix: Matrix, columns: int, cell) -> Iterator[Text]:  # type: ignore[no-untyped-def]
    layers, kv_heads = len(matrix), len(matrix[0])
    room = max(8, columns - _LABEL_COLUMNS)
    width = 2 if layers * 2 <= room else 1
    per_band = room // width
    for first in range(0, layers, per_band):
        band = range(first, min(layers, first + per_band))
        yield Text(" " * _LABEL_COLUMNS + _ruler(band, width), style="dim")
        for head in range(kv_heads):
            line = Text(f"  KV {head:>3}".ljust(_LABEL_COLUMNS), style="dim")
            for layer in band:
                glyph, colour = cell(layer, head)
                line.append(glyph * width if glyph in SHADES[1:] else glyph.ljust(width), style=colour)
            yield line


def _ruler(band: range, width: int) -> str:
    ruler = ""
    for layer in band:
        at = (layer - band.start) * width
        if layer % 5 == 0 and len(ruler) <= at:
            ruler = ruler.ljust(at) + str(layer)
    return ruler[: len(band) * width]
