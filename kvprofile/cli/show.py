"""``kvprofile show``: a profile as a heat map in the terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from kvprofile.cli.output import load_profile, print_json, stdout_console

if TYPE_CHECKING:
    from rich.console import Console

    from kvprofile.budget.profile import HeadBudgets, Profile


def show(
    profile: Annotated[str, typer.Argument(metavar="MODEL_OR_FILE", help="A budget file, or the name of its model.")],
    retention: Annotated[
        float | None, typer.Option(help="Show the heads kept at this retention; 0.5 unless given.", min=0.0, max=1.0)
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the summary as JSON.")] = False,
) -> None:
    """Show which KV heads matter and which keep the whole context."""
    found = load_profile(profile)
    budgets = budgets_at(found, 0.5 if retention is None else retention)
    if as_json:
        print_json(summary(found, budgets))
    else:
        render(found, budgets, stdout_console())


def budgets_at(profile: Profile, retention: float) -> HeadBudgets:
    """The file's budgets at a retention or, where it has none, budgets allocated now from its scores."""
    from kvprofile.budget.allocate import allocate
    from kvprofile.budget.profile import retention_key

    stored = profile.budgets.get(retention_key(retention))
    if stored is not None:
        return stored
    ranked = profile.scores.statistics()
    statistic = profile.scoring.statistic
    return allocate(ranked[statistic], retention, [matrix for name, matrix in ranked.items() if name != statistic])


def summary(profile: Profile, budgets: HeadBudgets) -> dict[str, object]:
    """What ``show --json`` prints."""
    return {
        "model": profile.model.name,
        "method": profile.scoring.method,
        "statistic": profile.scoring.statistic,
        "geometry": profile.model.geometry.model_dump(mode="json"),
        "retention_realised": budgets.retention_realised,
        "heads": budgets.heads,
        "scores": profile.scores.statistics()[profile.scoring.statistic],
    }


def render(profile: Profile, budgets: HeadBudgets, console: Console) -> None:
    """Draw scores and budgets; fits 80 columns."""
    from kvprofile.cli import heatmap

    geometry, scoring = profile.model.geometry, profile.scoring
    scores = profile.scores.statistics()[scoring.statistic]
    console.print(f"[bold]{profile.model.name}[/]  {geometry.describe()}", markup=True)
    if scoring.imported_from:
        source = scoring.imported_from
        console.print(f"imported from {source.repository or source.file}, not verified against weights", markup=False)
    else:
        tokens = sum(corpus.tokens for corpus in scoring.corpora)
        documents = sum(corpus.documents for corpus in scoring.corpora)
        console.print(f"{scoring.method} over {documents} documents, {tokens:,} tokens of context", markup=False)

    values = sorted(value for row in scores for value in row if value is not None)
    console.print(
        f"\nscore ({scoring.statistic}) from {values[0]:.3g} to {values[-1]:.3g}, "
        f"by fifths of the ranking: low {heatmap.SHADES} high",
        markup=False,
    )
    for line in heatmap.score_map(scores, console.width):
        console.print(line)

    kept = sum(value == 1.0 for row in budgets.heads for value in row)
    console.print(
        f"\n{kept} of {len(values)} heads keep the whole context (retention {budgets.retention_realised:.3f}): "
        f"{heatmap.FULL} full {heatmap.TRIMMED} {profile.runtime.sink_tokens} sinks + last {profile.runtime.recent_tokens}",
        markup=False,
    )
    for line in heatmap.budget_map(budgets.heads, console.width):
        console.print(line)
