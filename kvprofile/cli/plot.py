"""``kvprofile plot``: profiles as a PNG or SVG picture."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kvprofile.budget.choice import require_scores
from kvprofile.budget.profile import GRADED_PRESETS, Profile
from kvprofile.cli.output import load_profile, print_json, say
from kvprofile.errors import InputError
from kvprofile.files import require_writable
from kvprofile.report import plots
from kvprofile.report.plots import DEFAULT_DPI, Kind


def plot(
    files: Annotated[list[str], typer.Argument(metavar="FILE...", help="Budget files, or names of their models.")],
    output: Annotated[Path, typer.Option(help="The picture to write; it ends in .png or .svg.")],
    kind: Annotated[
        list[Kind] | None, typer.Option(help="Panel to draw; repeatable; all in one picture unless given.")
    ] = None,
    dpi: Annotated[int, typer.Option(help="Dots per inch of a PNG; a picture is 10 inches wide.", min=30, max=600)] = (
        DEFAULT_DPI
    ),
    as_json: Annotated[bool, typer.Option("--json", help="Print what was written as JSON.")] = False,
) -> None:
    """Draw profiles: scores, shares of graded heads, sorted scores, what each layer keeps at each retention."""
    found = [load_profile(file) for file in files]
    for profile in found:
        require_scores(profile)
    whole = [file for file, profile in zip(files, found, strict=True) if profile.probe is None]
    if kind and Kind.shares in kind and whole:
        raise InputError(f"{whole[0]} has no graded budgets, whose shares could be drawn; leave out --kind shares")
    profiles = [_with_presets_only(profile) for profile in found]
    require_writable(output)
    kinds = kind or list(Kind)
    plots.write(profiles, output, kinds, dpi)
    if as_json:
        models = [profile.model.name for profile in profiles]
        print_json({"output": str(output), "models": models, "kinds": [str(each) for each in kinds], "dpi": dpi})
    else:
        say(f"wrote {output}")


def _with_presets_only(profile: Profile) -> Profile:
    """The profile without its other budgets, as an LU-KV table brings 99; as it is where it has no preset."""
    presets = {key: budgets for key, budgets in profile.budgets.items() if float(key) in GRADED_PRESETS}
    return profile.model_copy(update={"budgets": presets}) if presets else profile
