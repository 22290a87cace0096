"""``kvprofile validate``: every problem of every budget file, listed at once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kvprofile.cli.output import print_json


def validate(
    files: Annotated[
        list[Path] | None, typer.Argument(metavar="FILE...", help="Files or folders; models/kv_budget unless given.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON.")] = False,
) -> None:
    """Check budget files; exit 2 if any has a problem."""
    from kvprofile.budget import store
    from kvprofile.budget.profile import Profile
    from kvprofile.errors import InputError

    checked = store.find(files or [store.BUDGET_DIR])
    if not checked:
        places = ", ".join(str(place) for place in files or [store.BUDGET_DIR])
        raise InputError(f"no budget files in {places}; run 'kvprofile score MODEL' to make one")
    found = {path: store.problems(path) for path in checked}
    broken = {path: result for path, result in found.items() if not isinstance(result, Profile)}
    if as_json:
        print_json({"files": {str(path): broken.get(path, []) for path in checked}, "ok": not broken})
    else:
        for path, result in found.items():
            if isinstance(result, Profile):
                typer.echo(f"ok   {path}  {result.model.geometry.describe()}")
            else:
                typer.echo("\n".join(f"bad  {path}: {problem}" for problem in result))
    if broken:
        raise InputError(f"{len(broken)} of {len(checked)} budget files have problems")
