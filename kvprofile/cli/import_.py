"""``kvprofile import``: head scores or budgets of another tool as a budget file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kvprofile.budget import formats, known_models, store
from kvprofile.budget.formats import FORMATS
from kvprofile.budget.formats.base import Format, Origin, import_profile
from kvprofile.budget.profile import Profile
from kvprofile.cli.output import print_json
from kvprofile.errors import InputError, plain
from kvprofile.files import BUDGET_DIR


def import_(
    paths: Annotated[
        list[Path], typer.Argument(metavar="PATH...", help="Files of one model; a folder for duo-attention.")
    ],
    format_name: Annotated[str, typer.Option("--format", help=f"Form of the files: {', '.join(FORMATS)}.")],
    model: Annotated[
        str | None, typer.Option(help="Hub id of the model, or its checkpoint folder; vllm files name it themselves.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help=f"Budget file to write; {BUDGET_DIR}/<model>.json unless given.")
    ] = None,
    config: Annotated[Path | None, typer.Option(help="config.json of a model that kvprofile does not know.")] = None,
    repository: Annotated[str | None, typer.Option(help="Where the files were published.")] = None,
    commit: Annotated[str | None, typer.Option(help="Commit of that repository (a hash, not a branch).")] = None,
    licence: Annotated[str | None, typer.Option(help="Licence of the files, for example MIT.")] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Replace an output of another model, or take files that name another.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print what was written as JSON.")] = False,
) -> None:
    """Read scores of KVzip, DuoAttention, LU-KV, a runtime file or a table, and write a budget file."""
    form = formats.get(format_name)
    facts = None if form.names_its_model or model is None else known_models.find(model, config)
    if facts is not None and not force:
        _refuse_other_names(form, paths, facts.name)
    provenance = Origin(repository, commit, licence)
    profile = import_profile(form, paths, facts, provenance, model if form.names_its_model else None)
    name = profile.model.name
    target = output or store.default_path(name)
    if not force:
        store.refuse_other_model(target, name, profile.model.geometry)
    store.save(profile, target)
    report = summary(profile, target)
    if as_json:
        print_json(report)
    else:
        typer.echo(f"wrote {report['output']}: {name}, {profile.model.geometry.describe()}")
        typer.echo(f"imported from {report['imported_from']}, not verified against weights")


def _refuse_other_names(form: Format, paths: list[Path], model: str) -> None:
    """Refuse files that name another model than the one they are imported for: of one shape they would fit."""
    for path in paths:
        named = form.model_of(path)
        if named is not None and not known_models.same_name(named, model):
            raise InputError(f"{path} is for {named}, not for {model}; pass --force to import it all the same")


def summary(profile: Profile, target: Path) -> dict[str, object]:
    """What ``import --json`` prints."""
    source = profile.scoring.imported_from
    return {
        "model": profile.model.name,
        "output": plain(target),
        "method": profile.scoring.method,
        "geometry": profile.model.geometry.model_dump(mode="json"),
        "retention_realised": {key: budget.retention_realised for key, budget in profile.budgets.items()},
        "imported_from": source and (source.repository or source.file),
        "verified_against_weights": False,
    }
