"""``kvprofile merge``: the budget file and probe of a run whose documents several processes have scored."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kvprofile.budget import store
from kvprofile.budget.probe import path_of, require_replaceable
from kvprofile.cli import show
from kvprofile.cli.output import print_json, say, stdout_console
from kvprofile.files import BUDGET_DIR, LOCK, alone, require_writable


def merge(
    shards: Annotated[list[Path], typer.Argument(metavar="SHARD...", help="Files of all shards, in any order.")],
    output: Annotated[Path | None, typer.Option(help=f"Budget file; {BUDGET_DIR}/<model>.json unless given.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the budget file of another model.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print a summary as JSON.")] = False,
) -> None:
    """Put the shards of one 'score --shard' run together: its budget file and probe. No model needed."""
    from kvprofile.scoring import shard_file  # torch: seconds that wrong usage need not wait

    made = shard_file.merge(shards)
    model = made.profile.model
    target = output or store.default_path(model.name)
    require_writable(target)
    if not force:
        store.refuse_other_model(target, model.name, model.geometry)
    if made.probe is not None:
        require_replaceable(path_of(target), force)
    with alone(target.with_name(f".{target.name}{LOCK}"), target):
        made.write(target)
    say(f"wrote {made.written(target)} from {len(shards)} shards; review and commit{' both' if made.probe else ''}")
    choice = show.choice_for(made.profile, 0.5)
    if as_json:
        print_json({**show.summary(made.profile, choice), "file": str(target), "shards": len(shards)})
    else:
        show.render(made.profile, choice, stdout_console())
