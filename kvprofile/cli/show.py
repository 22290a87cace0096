"""``kvprofile show``: a profile as a heat map in the terminal."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer
from rich.console import Console
from rich.text import Text

from kvprofile.budget import probe
from kvprofile.budget.choice import Choice, choose, has_scores, ranking_scores
from kvprofile.budget.profile import Matrix, Profile
from kvprofile.budget.trim import GRADED
from kvprofile.cli import heatmap
from kvprofile.cli.output import load_profile, percent, print_json, resolve_profile, say, stdout_console


class Statistic(StrEnum):
    """The statistics of a budget file that can rank heads."""

    max = "max"
    mean = "mean"
    p99 = "p99"
    loss = "loss"


def show(
    profile: Annotated[str, typer.Argument(metavar="MODEL_OR_FILE", help="A budget file, or the name of its model.")],
    retention: Annotated[
        float | None,
        typer.Option(help="Preview the heads kept at this retention, writing nothing; 0.5 unless given.", min=0, max=1),
    ] = None,
    kind: Annotated[
        str | None, typer.Option(help="whole or graded heads; graded unless given, where the file has a probe.")
    ] = None,
    statistic: Annotated[
        Statistic | None, typer.Option(help="Draw and rank by this statistic; the file's own unless given.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the summary as JSON.")] = False,
) -> None:
    """Show which KV heads matter and how much of the context each keeps."""
    found = load_profile(profile)
    choice = choice_for(found, retention, None if statistic is None else statistic.value, kind)
    if as_json:
        print_json(summary(found, choice))
        return
    render(found, choice, stdout_console())
    missing = probe.problem(resolve_profile(profile), found) if choice.kind == GRADED else None
    if missing is not None:
        say(f"these heads cannot be served: {missing}")


def choice_for(
    profile: Profile, retention: float | None, statistic: str | None = None, kind: str | None = None
) -> Choice:
    """The choice at a retention; without one at 0.5 or, where the file has no scores, the one it states nearest to it.

    Raises InputError as ``budget.choice.choose``.
    """
    if retention is None:
        stated = [0.5] if has_scores(profile) else map(float, profile.budgets)
        retention = min(stated, key=lambda each: abs(each - 0.5))
    return choose(profile, retention, statistic=statistic, kind=kind)


def provenance(profile: Profile) -> str:
    """One phrase: how and over how much text the scores were made, or where they were imported from."""
    scoring = profile.scoring
    if scoring.imported_from:
        source = scoring.imported_from
        return f"imported from {source.repository or source.file}, not verified against weights"
    tokens = sum(corpus.tokens for corpus in scoring.corpora)
    documents = sum(corpus.documents for corpus in scoring.corpora)
    told = f"{scoring.method} over {documents} documents, {tokens:,} tokens of context"
    return told if scoring.shortcuts is None else f"{told}; fast: {scoring.shortcuts.describe()}"


def heads_tied_at_the_cut(scores: Matrix, heads: Matrix) -> int:
    """How many heads share a score of which some are full and some trimmed; 0 where the scores alone decide.

    ``scores`` and ``heads`` are [L][G].
    """
    pairs = [pair for rows in zip(scores, heads, strict=True) for pair in zip(*rows, strict=True)]
    full = {score for score, budget in pairs if budget == 1.0}
    trimmed = {score for score, budget in pairs if budget == 0.0}
    split = (full & trimmed) - {None}
    return sum(score in split for score, _ in pairs) if len(split) == 1 else 0


def summary(profile: Profile, choice: Choice) -> dict[str, object]:
    """What ``show --json`` prints; ``scores`` are null where the file has none."""
    scores = ranking_scores(profile, choice.statistic)
    return {
        "model": profile.model.name,
        "method": profile.scoring.method,
        "provenance": provenance(profile),
        "statistic": choice.statistic,
        "geometry": profile.model.geometry.model_dump(mode="json"),
        "kind": choice.kind,
        "retention_realised": choice.retention_realised,
        "budgets": choice.origin,
        "heads_tied_at_the_cut": 0 if choice.kind == GRADED else heads_tied_at_the_cut(scores, choice.heads),
        "probe": None if profile.probe is None else profile.probe.model_dump(mode="json"),
        "sink_tokens": profile.runtime.sink_tokens,
        "recent_tokens": profile.runtime.recent_tokens,
        "heads": choice.heads,
        "scores": scores if has_scores(profile) else None,
    }


def render(profile: Profile, choice: Choice, console: Console) -> None:
    """Draw scores and budgets; every line fits 80 columns unless a name is longer."""
    geometry, runtime = profile.model.geometry, profile.runtime
    scores = ranking_scores(profile, choice.statistic)
    values = sorted(value for row in scores for value in row if value is not None)
    kept = [value for row in choice.heads for value in row if value is not None]
    partial = sum(0.0 < value < 1.0 for value in kept)

    def line(text: str = "", style: str = "") -> None:
        console.print(Text(text, style=style))

    line(profile.model.name, "bold")
    line(geometry.describe())
    line(provenance(profile))
    line()
    if has_scores(profile):
        line(f"score ({choice.statistic}) from {values[0]:.3g} to {values[-1]:.3g}", "bold")
        console.print(heatmap.score_legend())
    else:
        line("no scores: a runtime file states the full heads only")
    if len(geometry.profiled_layers) < geometry.layers:
        line(heatmap.BLANK_NOTE)
    if has_scores(profile):
        for row in heatmap.draw(heatmap.score_cell(scores), geometry.layers, geometry.kv_heads, console.width):
            console.print(row)
    line()
    if choice.kind == GRADED:
        told = f"heads keep {choice.retention_realised:.1%} of what lies between sinks and window"
        count = len({*kept})
        line(f"{told}, in {count} {'class' if count == 1 else 'classes'}", "bold")
        line(", ".join(f"{percent(share)} % in {kept.count(share)}" for share in sorted({*kept}, reverse=True)))
        if partial:
            line(probe_words(profile))
    else:
        whole = sum(value == 1.0 for value in kept)
        realised = choice.retention_realised
        line(f"{whole} of {len(values)} heads keep the whole context (retention {realised:.3f})", "bold")
    line(choice.origin)
    tied = 0 if choice.kind == GRADED else heads_tied_at_the_cut(scores, choice.heads)
    if tied:
        line(f"the cut falls among {tied} equal scores: other statistics decide, then layer and head")
    if partial:
        line(f"{partial} {'heads' if choice.kind == GRADED else 'more'} keep a part of it: {' '.join(heatmap.PARTIAL)}")
    line(f"{heatmap.FULL} full   {heatmap.TRIMMED} {runtime.sink_tokens} sinks + last {runtime.recent_tokens} tokens")
    for row in heatmap.draw(heatmap.budget_cell(choice.heads), geometry.layers, geometry.kv_heads, console.width):
        console.print(row)


def probe_words(profile: Profile) -> str:
    """What is known of the probe: how many tokens it was fitted to, and how well it does on others."""
    record = profile.probe
    if record is None:
        return "no probe"
    known = [value for value in record.r2 if value is not None]
    told = f"which tokens: a probe of {record.features}, fitted to {record.tokens:,} tokens of each head"
    return f"{told}; R2 on other documents {sum(known) / len(known):.2f}" if known else told
