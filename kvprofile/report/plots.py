"""Profiles as pictures: scores and shares as heat maps, the sorted scores, and what each layer keeps at each preset.

The bytes of a picture depend on the profile and on matplotlib's version only: no date, no random ids. matplotlib and
pydantic are imported by the functions that draw, so that the command line can read the kinds at once; no window
system is ever touched.
"""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Callable, Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from kvprofile.budget.allocate import full_head_count
from kvprofile.budget.choice import ranking_scores
from kvprofile.budget.profile import PRESETS
from kvprofile.errors import InputError
from kvprofile.files import write_atomically

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure

    from kvprofile.budget.profile import Matrix, Profile


class Kind(StrEnum):
    """The panels of a picture."""

    heatmap = "heatmap"
    shares = "shares"
    scores = "scores"
    layers = "layers"


Picture: TypeAlias = Literal["png", "svg"]

SCORE_COLOURS = "cividis"
PRESET_COLOURS = "viridis"
DEFAULT_DPI = 150
SHOWN_RETENTION = 0.3
_MAX_PIXELS = 30_000
_WIDTH = 10.0
_UNPROFILED: dict[str, Any] = {"facecolor": "#d9d9d9", "hatch": "////", "edgecolor": "#9a9a9a", "linewidth": 0.0}
_STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "hatch.color": "#9a9a9a",
    "hatch.linewidth": 0.6,
    "svg.hashsalt": "kvprofile",
    "svg.fonttype": "path",
    "text.parse_math": False,
    "path.simplify": False,
}


def write(profiles: Sequence[Profile], output: Path, kinds: Sequence[Kind] = (), dpi: int = DEFAULT_DPI) -> None:
    """Draw profiles into a .png or .svg file, atomically. Raises InputError for another ending or too many pixels."""
    write_atomically(output, render(profiles, picture_of(output), kinds, dpi))


def render(profiles: Sequence[Profile], picture: Picture, kinds: Sequence[Kind] = (), dpi: int = DEFAULT_DPI) -> bytes:
    """The bytes of a picture with the given panels (all of them unless given) of each profile, one below the other."""
    title = f"kvprofile: {', '.join(profile.model.name for profile in profiles)}"
    return to_bytes(lambda: _draw(profiles, list(dict.fromkeys(kinds)) or list(Kind)), title, picture, dpi)


def picture_of(output: Path) -> Picture:
    """The kind of picture that a file's name asks for. Raises InputError for another ending than .png and .svg."""
    ending = output.suffix.lower()
    if ending not in (".png", ".svg"):
        raise InputError(f"cannot draw {output.name or output}: its name must end in .png or .svg")
    return "png" if ending == ".png" else "svg"


def to_bytes(draw: Callable[[], Figure], title: str, picture: Picture, dpi: int = DEFAULT_DPI) -> bytes:
    """The bytes of a figure in the house's style, whatever the caller's settings. Raises InputError if too large."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    metadata = (
        {"Title": title, "Software": None} if picture == "png" else {"Title": title, "Creator": None, "Date": None}
    )
    stream = io.BytesIO()
    with matplotlib.rc_context(), warnings.catch_warnings():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_STYLE)
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure = draw()
        width, height = figure.get_size_inches()
        if picture == "png" and max(width, height) * dpi > _MAX_PIXELS:
            raise InputError(
                f"the picture would be {width * dpi:.0f} x {height * dpi:.0f} pixels; "
                "give a smaller --dpi, fewer files, or an .svg output"
            )
        FigureCanvasAgg(figure)
        figure.savefig(stream, format=picture, dpi=dpi, metadata=metadata, facecolor="white")
    return stream.getvalue()


def _draw(profiles: Sequence[Profile], kinds: list[Kind]) -> Figure:
    """A figure with one block for each profile; in a block the heat map spans the width, the others share a row."""
    from matplotlib.figure import Figure

    heights = [_block_height(profile, kinds) for profile in profiles]
    figure = Figure(figsize=(_WIDTH, sum(heights)), layout="constrained")
    blocks = figure.subfigures(len(profiles), 1, height_ratios=heights, squeeze=False)
    for block, profile in zip(blocks[:, 0], profiles, strict=True):
        _draw_block(block, profile, kinds)
    return figure


def _draw_block(block: SubFigure, profile: Profile, kinds: list[Kind]) -> None:
    geometry = profile.model.geometry
    heading = f"{_shorten(profile.model.name, 90)}\n{geometry.describe()}; {_shorten(_provenance(profile), 62)}"
    block.suptitle(heading, x=0.01, ha="left", fontsize=11)
    kinds = _kinds_of(profile, kinds)
    mosaic = _mosaic(kinds)
    ratios = [_heatmap_height(profile) if row[0] in _MAPS else _CURVES_HEIGHT for row in mosaic]
    axes = block.subplot_mosaic(mosaic, height_ratios=ratios)
    painters: dict[Kind, Callable[[SubFigure, Axes, Profile], None]] = {
        Kind.heatmap: _scores_map,
        Kind.shares: _shares_map,
        Kind.scores: _sorted_scores,
        Kind.layers: _heads_per_layer,
    }
    for kind in kinds:
        painters[kind](block, axes[kind.value], profile)


_CURVES_HEIGHT = 3.2
_HEADING_HEIGHT = 0.6


_MAPS = (Kind.heatmap, Kind.shares)


def _kinds_of(profile: Profile, kinds: list[Kind]) -> list[Kind]:
    """The panels that a profile has: shares only where its budgets are graded, and never none."""
    return [kind for kind in kinds if kind != Kind.shares or profile.probe is not None] or [Kind.heatmap]


def _mosaic(kinds: list[Kind]) -> list[Any]:
    curves = [kind.value for kind in kinds if kind not in _MAPS]
    rows = [[kind.value] * max(1, len(curves)) for kind in _MAPS if kind in kinds]
    return [*rows, curves] if curves else rows


def _block_height(profile: Profile, kinds: list[Kind]) -> float:
    rows = _mosaic(_kinds_of(profile, kinds))
    return _HEADING_HEIGHT + sum(_heatmap_height(profile) if row[0] in _MAPS else _CURVES_HEIGHT for row in rows)


def _heatmap_height(profile: Profile) -> float:
    """Inches: cells are square where that gives a panel between 1.9 and 8 inches high."""
    geometry = profile.model.geometry
    cell = min(0.3, (_WIDTH - 2.0) / geometry.layers)
    return min(8.0, max(1.2, geometry.kv_heads * cell, geometry.kv_heads * 0.16) + 1.0)


def _scores_map(block: SubFigure, axes: Axes, profile: Profile) -> None:
    """Scores of the heads."""
    statistic = profile.scoring.statistic
    title = f"Score of each KV head ({statistic})"
    _heatmap(block, axes, profile, ranking_scores(profile), title, f"score ({statistic})")


def _shares_map(block: SubFigure, axes: Axes, profile: Profile) -> None:
    """Shares of the graded budget that is nearest to SHOWN_RETENTION."""
    key = min(profile.budgets, key=lambda each: abs(float(each) - SHOWN_RETENTION))
    title = f"What each KV head keeps at retention {key}, of the tokens between sinks and window"
    _heatmap(block, axes, profile, profile.budgets[key].heads, title, "share kept", (0.0, 1.0))


def _heatmap(
    block: SubFigure,
    axes: Axes,
    profile: Profile,
    matrix: Matrix,
    title: str,
    label: str,
    reach: tuple[float | None, float | None] = (None, None),
) -> None:
    """A matrix, layers from left to right, KV heads from top to bottom; layers without values grey and hatched."""
    import numpy as np
    from matplotlib.patches import Patch

    geometry = profile.model.geometry
    values = np.array([[math.nan if value is None else value for value in row] for row in matrix]).T
    low, high = reach
    image = axes.imshow(
        values, aspect="auto", cmap=SCORE_COLOURS, interpolation="nearest", origin="upper", vmin=low, vmax=high
    )
    if _hatch_unprofiled(axes, profile):
        axes.legend(
            handles=[Patch(label="sliding window or no cache, not profiled", **_UNPROFILED)],
            loc="lower right", bbox_to_anchor=(1.0, 1.0), frameon=False, borderpad=0.0, fontsize=9,
        )  # fmt: skip
    axes.set_title(title)
    axes.set_xlabel("layer")
    axes.set_ylabel("KV head")
    axes.set_xticks(_ticks(geometry.layers, 28))
    axes.set_yticks(_ticks(geometry.kv_heads, 9))
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    bar = block.colorbar(image, ax=axes, pad=0.01, fraction=0.05, aspect=15)
    bar.set_label(label)
    bar.outline.set_visible(False)


def _hatch_unprofiled(axes: Axes, profile: Profile) -> bool:
    """Hatch the columns of layers that have no scores; whether there are any."""
    geometry = profile.model.geometry
    unprofiled = [layer for layer in range(geometry.layers) if layer not in geometry.profiled_layers]
    for layer in unprofiled:
        axes.axvspan(layer - 0.5, layer + 0.5, zorder=0, **_UNPROFILED)
    return bool(unprofiled)


def _sorted_scores(_block: SubFigure, axes: Axes, profile: Profile) -> None:
    """Scores from best to worst, and how many heads each preset keeps full."""
    from matplotlib.ticker import MaxNLocator

    values = sorted((value for row in ranking_scores(profile) for value in row if value is not None), reverse=True)
    edges = [rank + 0.5 for rank in range(len(values) + 1)]
    axes.stairs(values, edges, fill=True, color="#c9d3e6")
    axes.stairs(values, edges, color="black", linewidth=1.4, baseline=None)
    labels: dict[float, list[str]] = {}
    for key, colour in _presets(profile):
        if profile.probe is not None and float(key) not in PRESETS:  # of graded budgets alone
            continue
        count = full_head_count(float(key), len(values))
        among_equals = 0 < count < len(values) and values[count - 1] == values[count]
        labels.setdefault(count + 0.5, []).insert(0, f"{key}*" if among_equals else key)
        axes.axvline(count + 0.5, color=colour, linewidth=1.6)
    for place, keys in labels.items():
        axes.annotate(
            ", ".join(keys), (place, 1.0), xycoords=("data", "axes fraction"), xytext=(-2, 3),
            textcoords="offset points", ha="center", fontsize=9,
        )  # fmt: skip
    axes.set_title("Scores, best first, and the heads kept at each retention", pad=20)
    ties = values.count(values[0])
    tied = f"; the first {ties} tie" if ties > 1 else ""
    starred = any(key.endswith("*") for keys in labels.values() for key in keys)
    note = "\n* the cut falls among equal scores" if starred else ""
    axes.set_xlabel(f"rank of the KV head (1 to {len(values)}{tied}){note}")
    axes.set_ylabel(f"score ({profile.scoring.statistic})")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.set_xlim(0.5, len(values) + 0.5)
    axes.set_ylim(bottom=0)


def _heads_per_layer(_block: SubFigure, axes: Axes, profile: Profile) -> None:
    """Bars of what each layer keeps, in heads; a lower retention stands in front of a higher one."""
    from matplotlib.ticker import MaxNLocator

    geometry = profile.model.geometry
    presets = _presets(profile)
    _hatch_unprofiled(axes, profile)
    width = 0.9 if geometry.layers <= 48 else 1.0  # thinner gaps than a pixel would flicker
    for key, colour in presets:
        counts = [sum(value or 0.0 for value in row) for row in profile.budgets[key].heads]
        axes.bar(range(geometry.layers), counts, width=width, color=colour, label=key, linewidth=0)
    graded = any(
        0.0 < (value or 0.0) < 1.0 for key, _ in presets for row in profile.budgets[key].heads for value in row
    )
    axes.set_title(f"{'Kept by' if graded else 'Full heads of'} each layer at each retention", pad=20)
    axes.set_xlabel("layer")
    axes.set_ylabel(f"{'KV heads kept, in shares' if graded else 'full KV heads'} (of {geometry.kv_heads})")
    axes.set_xticks(_ticks(geometry.layers, 14))
    axes.set_xlim(-0.6, geometry.layers - 0.4)
    axes.set_ylim(0, geometry.kv_heads)
    axes.yaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.legend(
        loc="lower left", bbox_to_anchor=(0.0, 1.0), ncols=len(presets), frameon=False, fontsize=9,
        handlelength=1.0, columnspacing=1.2, borderpad=0.0,
    )  # fmt: skip


def _presets(profile: Profile) -> list[tuple[str, tuple[float, float, float, float]]]:
    """The file's retentions, highest first, each with its colour, light to dark."""
    import matplotlib

    keys = sorted(profile.budgets, key=float, reverse=True)
    colours = matplotlib.colormaps[PRESET_COLOURS]
    return [(key, colours(0.9 - 0.85 * i / max(1, len(keys) - 1))) for i, key in enumerate(keys)]


def _provenance(profile: Profile) -> str:
    scoring = profile.scoring
    if scoring.imported_from:
        return f"imported ({scoring.imported_from.format}), not verified against weights"
    return f"{scoring.method}, {sum(corpus.tokens for corpus in scoring.corpora):,} tokens scored"


def _ticks(count: int, at_most: int) -> range:
    steps = (step * scale for scale in (1, 10, 100, 1000) for step in (1, 2, 4, 5))
    return range(0, count, next(step for step in steps if math.ceil(count / step) <= at_most))


def _shorten(text: str, length: int) -> str:
    return text if len(text) <= length else f"{text[: length // 2]}…{text[len(text) - length // 2 + 1 :]}"
