"""``kvprofile diff``: two profiles of one geometry side by side."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from kvprofile.budget.choice import choose, has_scores, ranking_scores
from kvprofile.budget.profile import PRESETS, Profile
from kvprofile.budget.profile_diff import DiffAtRetention, ProfileDiff, compare, shared_retentions
from kvprofile.cli import heatmap
from kvprofile.cli.output import load_profile, print_json, stdout_console

_LISTED_HEADS = 12
"""Moved heads are listed by name up to this many; the map shows them all."""


def diff(
    before: Annotated[str, typer.Argument(metavar="A", help="A budget file, or the name of its model.")],
    after: Annotated[str, typer.Argument(metavar="B", help="The budget file to compare with it.")],
    retention: Annotated[
        list[float] | None,
        typer.Option(help="Map the heads that change at this retention; repeatable; 0.5 unless given.", min=0, max=1),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the comparison as JSON.")] = False,
) -> None:
    """Compare two profiles: how far their rankings agree and which heads change at each retention."""
    old, new = load_profile(before), load_profile(after)
    shared = shared_retentions(old, new)
    mapped = tuple(dict.fromkeys(retention or shared or [0.5]))
    found = compare(old, new, sorted({*(shared or PRESETS), *mapped}, reverse=True))
    if as_json:
        print_json({"a": _named(before, old), "b": _named(after, new), **asdict(found)})
    else:
        render((before, old), (after, new), found, mapped, stdout_console())


def render(
    first: tuple[str, Profile],
    second: tuple[str, Profile],
    found: ProfileDiff,
    mapped: tuple[float, ...],
    console: Console,
) -> None:
    """Warnings first, then agreement, the scores of both, and the heads that change at the mapped retentions."""
    (before_file, before), (after_file, after) = first, second
    geometry = before.model.geometry
    for warning in found.warnings:
        console.print(Text(f"warning: {warning}", style="bold"))
    if found.warnings:
        console.print()
    for letter, file, profile in (("A", before_file, before), ("B", after_file, after)):
        console.print(Text(f"{letter}  {profile.model.name}, {profile.scoring.method}"))
        if file != profile.model.name:
            console.print(Text(f"   {file}"), soft_wrap=True)
    console.print(Text(geometry.describe()))
    correlation = "undefined" if found.rank_correlation is None else f"{found.rank_correlation:.3f}"
    console.print(Text(f"\nrank correlation (Spearman) of {found.heads} heads: {correlation}", style="bold"))
    console.print(_table(found))

    if has_scores(before) and has_scores(after):
        _render_scores(before, after, console)
    for at in found.at:
        if at.retention in mapped:
            _render_changes(after, at, console)


def _render_scores(before: Profile, after: Profile, console: Console) -> None:
    geometry = before.model.geometry
    console.print(Text("\nscores", style="bold"))
    console.print(heatmap.score_legend())
    if len(geometry.profiled_layers) < geometry.layers:
        console.print(heatmap.BLANK_NOTE)
    titles = (f"A {before.scoring.statistic}", f"B {after.scoring.statistic}")
    cells = (heatmap.score_cell(ranking_scores(before)), heatmap.score_cell(ranking_scores(after)))
    for row in heatmap.draw_pair(cells, titles, geometry.layers, geometry.kv_heads, console.width):
        console.print(row)


def _render_changes(after: Profile, at: DiffAtRetention, console: Console) -> None:
    geometry = after.model.geometry
    change = f"{len(at.moved) or 'no'} {'head changes' if len(at.moved) == 1 else 'heads change'}"
    console.print(Text(f"\nat retention {at.retention:g}: {change}", style="bold"))
    if not at.moved:
        return
    if len(at.moved) <= _LISTED_HEADS:
        for head in at.moved:
            moved = f"{_class(head.before)} -> {_class(head.after)}"
            console.print(Text(f"layer {head.layer}, KV head {head.kv_head}: {moved}"))
    legend = f"{heatmap.GAINED} keeps more in B   {heatmap.LOST} keeps less in B   "
    console.print(Text(f"{legend}{heatmap.FULL} full in both   {heatmap.TRIMMED} trimmed in both"))
    kept = choose(after, at.retention, kind=at.kind).heads
    old, new = [list(row) for row in kept], [list(row) for row in kept]
    for head in at.moved:  # the map shows the changes that were counted, and no others
        old[head.layer][head.kv_head], new[head.layer][head.kv_head] = head.before, head.after
    cell = heatmap.change_cell(old, new)
    for row in heatmap.draw(cell, geometry.layers, geometry.kv_heads, console.width):
        console.print(row)


def _table(found: ProfileDiff) -> object:
    table = Table(box=SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for name in ("retention", "realised A", "realised B", "top-k in common", "by chance", "heads that change"):
        table.add_column(name, justify="right")
    for at in found.at:
        overlap = "-" if at.top_overlap is None else f"{at.top_overlap:.3f} of {at.top_heads}"
        table.add_row(
            f"{at.retention:g}",
            f"{at.realised_before:.3f}",
            f"{at.realised_after:.3f}",
            overlap,
            f"{at.chance_overlap:.3f}",
            str(len(at.moved)),
        )
    return table


def _class(budget: float) -> str:
    return {1.0: "full", 0.0: "trimmed"}.get(budget, f"{budget:.3g} of the middle")


def _named(reference: str, profile: Profile) -> dict[str, object]:
    return {"file": reference, "model": profile.model.name, "method": profile.scoring.method}
