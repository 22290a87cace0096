"""``kvprofile report``: run records as one HTML page, or what follows from them as JSON."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kvprofile.cli.output import print_json, say


def report(
    places: Annotated[
        list[Path],
        typer.Argument(
            metavar="DIR_OR_FILE...", help="Run records, results of `vllm bench serve`, or folders, searched deeply."
        ),
    ],
    output: Annotated[Path, typer.Option(help="The page to write.")] = Path("report.html"),
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the comparison as JSON too, the page's numbers in full.")
    ] = False,
) -> None:
    """Put the legs of a benchmark side by side on one page that needs no network."""
    from kvprofile.errors import InputError, plain
    from kvprofile.files import require_writable
    from kvprofile.report import html, run_files
    from kvprofile.report.compare import summarise

    found, others = run_files.collect(places)
    if output.resolve() in {path.resolve() for path in found}:
        raise InputError(f"--output {output} is one of the run records; choose another name")
    require_writable(output)
    summary = summarise(list(found.values()))
    html.write(summary, output)
    if others:
        what = "file that is" if len(others) == 1 else "files that are"
        say(f"passed over {len(others)} JSON {what} no run record, first {plain(others[0])}")
    for warning in summary.warnings:
        say(f"warning: {warning}")
    if as_json:
        print_json({"output": str(output), "records": [plain(path) for path in found], **summary.document()})
    else:
        legs = sum(len(group.legs) for group in summary.groups)
        say(f"wrote {plain(output)}: {legs} legs of {len(found)} {'record' if len(found) == 1 else 'records'}")
