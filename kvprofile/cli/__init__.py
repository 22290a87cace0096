"""The command line: one module for each command, which parses, calls the library and renders.

``main`` is the only place where an error becomes an exit code: 0 ok, 1 the work failed, 2 wrong usage or input.
"""

from __future__ import annotations

import io
import os
import signal
import sys
from typing import Annotated

import typer

from kvprofile import __version__
from kvprofile.cli import bench, diff, doctor, evaluate, export, import_, plan, plot, report, score, show, validate
from kvprofile.errors import InputError

app = typer.Typer(
    name="kvprofile",
    help="Profile once which KV heads of a language model need the whole context, and keep the file beside your code.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command("score")(score.score)
app.command("show")(show.show)
app.command("diff")(diff.diff)
app.command("plot")(plot.plot)
app.command("plan")(plan.plan)
app.command("validate")(validate.validate)
app.command("export")(export.export)
app.command("import")(import_.import_)
app.command("evaluate")(evaluate.evaluate)
app.command("bench")(bench.bench)
app.command("doctor")(doctor.doctor)
app.command("report")(report.report)

_INTERRUPTED = 130


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _options(
    _version: Annotated[
        bool, typer.Option("--version", help="Print the version.", is_eager=True, callback=_print_version)
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show a traceback when something fails.")] = False,
) -> None:
    if debug:
        os.environ["KVPROFILE_DEBUG"] = "1"


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit; every failure is one line on stderr unless --debug is given."""
    _mend_streams()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: keep what is finished, leave nothing about
    sys.exit(run(sys.argv[1:] if arguments is None else arguments))


def _mend_streams() -> None:
    """Print somewhere even where streams are closed, and something even where they cannot encode a glyph."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115 - open until the process ends
        elif isinstance(stream := getattr(sys, name), io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def run(arguments: list[str]) -> int:
    """Run one command and return its exit code."""
    try:
        result = app(arguments, prog_name="kvprofile", standalone_mode=False)
    except InputError as error:
        return _fail(str(error), 2)
    except KeyboardInterrupt:
        result = _INTERRUPTED
    except SystemExit as stop:  # typer and rich leave this way when nobody reads stdout any more
        if not isinstance(stop.__context__, BrokenPipeError):
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        if hasattr(error, "format_message"):  # a usage error of typer's parser
            message = error.format_message()  # empty where the help was printed instead
            return _fail(f"{message} Try 'kvprofile --help'.", 2) if message else 2
        if os.environ.get("KVPROFILE_DEBUG"):
            raise
        return _fail(f"{type(error).__name__}: {error}; run with kvprofile --debug for the traceback", 1)
    if result == _INTERRUPTED:  # typer turns Ctrl-C into this code
        return _fail("interrupted; finished work is kept, run the same command again to continue", _INTERRUPTED)
    return result if isinstance(result, int) else 0


def _fail(message: str, code: int) -> int:
    print(f"kvprofile: {' '.join(message.split())}", file=sys.stderr)
    return code
