"""The command line: one module for each command, which parses, calls the library and renders.

``COMMANDS`` is the only place that loads them: a command's module is imported when the command runs or its own help is
asked for. ``main`` is the only place where an error becomes an exit code: 0 ok, 1 the work failed, 2 wrong usage or
input.
"""

from __future__ import annotations

import importlib
import io
import keyword
import os
import signal
import sys
from types import FrameType
from typing import Annotated, Any

import typer
import typer.completion
from typer.core import TyperCommand

from kvprofile import __version__
from kvprofile.errors import InputError

COMMANDS = {
    "score": "Profile a checkpoint and write its budget file. Run it again after an interruption to continue.",
    "merge": "Put the shards of one 'score --shard' run together: its budget file and probe. No model needed.",
    "show": "Show which KV heads matter and how much of the context each keeps.",
    "diff": "Compare two profiles: how far their rankings agree and which heads change at each retention.",
    "plot": "Draw profiles: scores, shares of graded heads, sorted scores, what each layer keeps at each retention.",
    "plan": "Count what fits at each retention: cache bytes, requests in flight, the bound on speed. "
    "No weights needed.",
    "validate": "Check budget files and the folders they lie in; exit 2 if there is a problem.",
    "export": "Write a budget file in the form of vLLM's plugin, KVzip, DuoAttention, LU-KV or a table.",
    "import": "Read scores of KVzip, DuoAttention, LU-KV, a runtime file or a table, and write a budget file.",
    "evaluate": "Measure how much of a model's answers each retention keeps. "
    "Run it again after an interruption to continue.",
    "bench": "Compare vLLM with and without budgets, and remote providers. "
    "Run it again after an interruption to continue.",
    "verify": "Prove on this machine that vLLM serves budgets right, and attest it next to the budget file.",
    "doctor": "Look at this installation, or at running servers if asked; exit 1 if something is wrong.",
    "report": "Put the legs of a benchmark side by side on one page that needs no network.",
}
"""Each command with its help in one line: the docstring of the function of its name, in the module of its name."""


class LazyCommand(TyperCommand):
    """A name and a line of help until it runs or its own help is asked for; then the command in its module."""

    def make_context(self, *args: Any, **kwargs: Any) -> Any:
        """The context of the real command, in which it runs."""
        return load(str(self.name)).make_context(*args, **kwargs)


def load(name: str) -> Any:
    """A command with its arguments and options, its module imported."""
    function = f"{name}_" if keyword.iskeyword(name) else name
    alone = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    alone.command(name)(getattr(importlib.import_module(f"kvprofile.cli.{function}"), function))
    return typer.main.get_command(alone)


app = typer.Typer(
    name="kvprofile",
    help="Profile once which KV heads of a language model need the whole context, and keep the file next to your code.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for _name, _help in COMMANDS.items():
    app.command(_name, cls=LazyCommand, help=_help)(lambda: None)

COMPLETE = "_KVPROFILE_COMPLETE"
_INTERRUPTED = 130
_KEPT = "interrupted; finished work is kept, run the same command again to continue"
_interrupts: list[int] = []


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
    if COMPLETE in os.environ:  # a shell asks what a word may become; typer's own options for it are left out
        typer.completion.completion_init()  # type: ignore[attr-defined]
    signal.signal(signal.SIGTERM, _interrupt)  # as Ctrl-C: keep what is finished, leave nothing about
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # in the background it may be ignored
        signal.signal(signal.SIGINT, _interrupt)
    sys.exit(run(sys.argv[1:] if arguments is None else arguments))


def _interrupt(number: int, frame: FrameType | None) -> None:
    """Stop, and remember it: libraries that are being imported may turn the exception into one of their own."""
    _interrupts.append(number)
    signal.default_int_handler(number, frame)


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
        if not _interrupts:
            return _fail(str(error), 2)
        result = _INTERRUPTED
    except KeyboardInterrupt:
        result = _INTERRUPTED
    except SystemExit as stop:  # typer and rich leave this way when nobody reads stdout any more
        if not isinstance(stop.__context__, BrokenPipeError):
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        if _interrupts:
            return _fail(_KEPT, _INTERRUPTED)
        if hasattr(error, "format_message"):  # a usage error of typer's parser
            message = error.format_message()  # empty where the help was printed instead
            return _fail(f"{message} Try 'kvprofile --help'.", 2) if message else 2
        if os.environ.get("KVPROFILE_DEBUG"):
            raise
        return _fail(f"{type(error).__name__}: {error}; run with kvprofile --debug for the traceback", 1)
    if result == _INTERRUPTED:  # typer turns Ctrl-C into this code
        return _fail(_KEPT, _INTERRUPTED)
    return result if isinstance(result, int) else 0


def _fail(message: str, code: int) -> int:
    print(f"kvprofile: {' '.join(message.split())}", file=sys.stderr)
    return code
