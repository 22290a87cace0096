"""``kvprofile doctor``: whether vLLM finds the plugin, would apply budgets, and whether running servers do."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from kvprofile.cli.output import print_json, say, stdout_console
from kvprofile.runtime import doctor as checks
from kvprofile.runtime.doctor import Check

_MARKS = {True: ("ok", "green"), False: ("bad", "red"), None: ("--", "dim")}


def doctor(
    url: Annotated[
        list[str] | None,
        typer.Option(
            "--url",
            metavar="URL",
            help="A running vLLM server, like http://127.0.0.1:8000; repeatable, to compare the budgets of several.",
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON.")] = False,
) -> int:
    """Look at this installation, or at running servers if asked; exit 1 if something is wrong."""
    if not url:
        say("looking at the installation; importing vLLM takes a few seconds")
        found = [*checks.installed(), *checks.checks()]
        ok = all(check.good is not False for check in found)
    else:
        found = list(checks.servers(url))
        ok = all(check.good is True for check in found)  # what cannot be told is not proof
    if as_json:
        listed = [{"name": check.name, "good": check.good, "detail": check.detail} for check in found]
        print_json({"checks": listed, "ok": ok})
    else:
        _print(found)
    return 0 if ok else 1


def _print(found: list[Check]) -> None:
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    for check in found:
        word, style = _MARKS[check.good]
        table.add_row(Text(word, style), check.name, Text(check.detail))
    stdout_console().print(table)
