"""``kvprofile report``: run records and other tools' results as an HTML page, a short table, or all of it as JSON."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer
from rich import box
from rich.table import Table
from rich.text import Text

from kvprofile.cli.output import print_json, say, stdout_console
from kvprofile.errors import InputError, plain
from kvprofile.files import require_writable
from kvprofile.records import run_files
from kvprofile.report import html
from kvprofile.report.compare import Summary, summarise
from kvprofile.report.page import cards


def report(
    places: Annotated[
        list[Path],
        typer.Argument(
            metavar="DIR_OR_FILE...",
            help="Run records; results of `vllm bench serve`, `vllm bench sweep serve`, guidellm, aiperf or SGLang's "
            "bench_serving; or folders, searched deeply.",
        ),
    ],
    output: Annotated[Path, typer.Option(help="The page to write.")] = Path("report.html"),
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the comparison as JSON, the page's numbers in full.")
    ] = False,
) -> None:
    """Put the legs of a benchmark side by side on one page that needs no network."""
    collected = run_files.collect(places)
    found, others = collected.records, collected.others
    if os.path.realpath(output) in map(os.path.realpath, found):
        raise InputError(f"--output {output} is one of the run records; choose another name")
    require_writable(output)
    summary = summarise(list(found.values()), collected.notes)
    html.write(summary, output)
    if others:
        what = "file that is not a run record" if len(others) == 1 else "files that are not run records"
        say(f"skipped {len(others)} JSON {what}, first {plain(others[0])}")
    for warning in summary.warnings:
        say(f"warning: {warning}")
    if as_json:
        print_json({"output": str(output), "records": [plain(path) for path in found], **summary.document()})
    else:
        stdout_console().print(_table(summary))
    legs = sum(len(group.legs) for group in summary.groups)
    say(f"wrote {plain(output)}: {legs} legs of {len(found)} {'record' if len(found) == 1 else 'records'}")


def _table(summary: Summary) -> Table:
    """The page's cards, one in each row."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("")
    for group in summary.groups:
        table.add_column(Text(group.name), justify="right")
    for card in cards(summary):
        line = card["line"]
        label = f"{card['title']}, {line.unit}" if line.unit else card["title"]
        cells = [line.cells.get(group.name) for group in summary.groups]
        table.add_row(label, *("" if cell is None else cell.text for cell in cells))
    return table
