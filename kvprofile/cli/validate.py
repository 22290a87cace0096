"""``kvprofile validate``: every problem of every budget file, listed at once."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated

import typer

from kvprofile.budget import probe, store
from kvprofile.budget.profile import Profile
from kvprofile.cli.output import print_json
from kvprofile.errors import InputError, plain
from kvprofile.files import BUDGET_DIR
from kvprofile.runtime import attestation

_BUDGET_FILE_KEYS = {"schema_version", "model", "scoring", "scores", "budgets", "runtime"}


def validate(
    files: Annotated[
        list[Path] | None,
        typer.Argument(metavar="FILE...", help=f"Files or folders, searched deeply; {BUDGET_DIR} unless given."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON.")] = False,
) -> None:
    """Check budget files and the folders they lie in; exit 2 if there is a problem."""
    places = files or [BUDGET_DIR]
    found, folders = collect(places if files or BUDGET_DIR.exists() else [])
    if not found and not folders:
        raise InputError(f"no budget files in {', '.join(map(str, places))}; run 'kvprofile score MODEL' to make one")
    results = {path: _check(path) for path in found}
    profiles = {path: result for path, result in results.items() if isinstance(result, Profile)}
    problems = {path: result for path, result in results.items() if not isinstance(result, Profile) and result}
    for folder, duplicates in duplicate_models(profiles).items():
        folders.setdefault(folder, []).extend(duplicates)
    ok = not problems and not folders
    if as_json:
        listed = {plain(path): list(map(plain, problems.get(path, []))) for path in results}
        named = {plain(path): list(map(plain, findings)) for path, findings in folders.items()}
        print_json({"files": listed, "folders": named, "ok": ok})
    else:
        for path in results:
            _print_findings(path, problems.get(path, []), profiles.get(path))
        for folder, findings in folders.items():
            _print_findings(folder, findings, None)
    if not ok:
        counts = [f"{len(problems)} of {len(results)} budget files"] if problems else []
        counts += [f"{len(folders)} {'folder' if len(folders) == 1 else 'folders'}"] if folders else []
        raise InputError(f"problems in {' and '.join(counts)}")


def collect(places: list[Path]) -> tuple[list[Path], dict[Path, list[str]]]:
    """The .json files in files and folders, each once, sorted within a folder; and the folders that cannot be read.

    Links to folders are not followed below a place that was given, so a loop of links ends.
    """
    found: dict[str, Path] = {}
    unreadable: dict[Path, list[str]] = {}

    def note(error: OSError) -> None:
        unreadable[Path(error.filename)] = [f"cannot read the folder: {error.strerror}"]

    for place in places:
        if not store.is_dir(place):
            found.setdefault(os.path.abspath(place), place)  # noqa: PTH100 -- a link stays a file of its own
            continue
        for folder, subfolders, names in os.walk(place, onerror=note):
            subfolders.sort()
            for name in sorted(names):
                if name.lower().endswith(".json"):
                    path = Path(folder, name)
                    found.setdefault(os.path.abspath(path), path)  # noqa: PTH100
    return list(found.values()), unreadable


def duplicate_models(profiles: dict[Path, Profile]) -> dict[Path, list[str]]:
    """By folder, the models that several of its files are for: the runtime finds files by model and refuses two."""
    by_model: dict[tuple[Path, str], list[str]] = {}
    for path, profile in profiles.items():
        by_model.setdefault((path.parent, profile.model.name), []).append(path.name)
    found: dict[Path, list[str]] = {}
    for (folder, model), names in by_model.items():
        if len(names) > 1:
            problem = f"{' and '.join(names)} are for one model, {model}; the runtime refuses to choose, keep one here"
            found.setdefault(folder, []).append(problem)
    return found


def _check(path: Path) -> Profile | list[str]:
    """The profile in a file or its problems, none for attestations; JSON that is something else is called so."""
    if store.exists(path) and not store.is_file(path):  # a pipe would wait for ever
        return ["not a regular file"]
    if attestation.is_attestation(path):
        try:
            attestation.load(path)
        except InputError as error:
            return [str(error).removeprefix(f"{path}: ")]
        return []
    result = store.problems(path)
    if isinstance(result, list):
        try:
            content = json.loads(path.read_bytes()) if path.stat().st_size <= store.MAX_FILE_BYTES else None
        except (OSError, ValueError, RecursionError):
            return result
        if isinstance(content, dict) and not _BUDGET_FILE_KEYS & content.keys():
            keys = ", ".join(repr(key) for key in list(content)[:3]) or "no keys"
            return [f"not a budget file: JSON with {keys} and no schema_version; move it elsewhere"]
    if isinstance(result, Profile) and result.probe is not None:
        try:
            probe.read(probe.path_of(path), result)
        except InputError as error:
            return [str(error)]
    return result


def _print_findings(path: Path, findings: list[str], profile: Profile | None) -> None:
    if profile is not None:
        imported = "  (imported, not verified against weights)" if profile.scoring.imported_from else ""
        typer.echo(f"ok   {plain(path)}  {profile.model.geometry.describe()}{imported}")
    if attestation.is_attestation(path) and not findings:
        typer.echo(f"ok   {plain(path)}  attestations")
    for problem in findings:
        typer.echo(f"bad  {plain(path)}: {plain(problem)}")
