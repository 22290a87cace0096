"""Options that are declared once, as fields of a dataclass."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

import pytest
import typer
from typer.testing import CliRunner

from kvprofile.cli.declared import options_of
from kvprofile.errors import InputError


def half(text):
    if not text.isdecimal():
        raise InputError(f"--twice {text!r} is not a number")
    return int(text) // 2


@dataclass(frozen=True)
class Inner:
    names: Annotated[tuple[str, ...], typer.Option("--name", help="A name.")] = ()
    half_of: Annotated[int | None, typer.Option("--twice", parser=half, help="Twice the value.")] = None
    hidden: float = 2.5


@dataclass(frozen=True)
class Outer:
    first: Annotated[int, typer.Option(help="Has to be given.")]
    inner: Inner = field(default_factory=Inner)
    last: Annotated[bool, typer.Option("--last/--not-last", help="The last.")] = True


@pytest.fixture
def call():
    seen = []
    app = typer.Typer()

    @app.command()
    @options_of(Outer)
    def command(options: Outer, own: Annotated[str, typer.Option(help="The command's own.")] = "none") -> None:
        """What it does."""
        seen.append((options, own))

    def run(*arguments):
        return CliRunner().invoke(app, arguments, env={"COLUMNS": "120", "TERM": "dumb"}), seen

    return run


def test_fields_become_options_and_come_back_as_the_dataclass(call):
    result, seen = call("--first", "3", "--name", "a", "--name", "b", "--twice", "8", "--not-last", "--own", "x")
    assert result.exit_code == 0, result.output
    assert seen == [(Outer(3, Inner(("a", "b"), 4), last=False), "x")]


def test_defaults_are_those_of_the_fields(call):
    result, seen = call("--first", "3")
    assert result.exit_code == 0, result.output
    assert seen == [(Outer(3), "none")]


def test_a_field_without_a_default_is_required(call):
    result, seen = call()
    assert result.exit_code == 2
    assert not seen


def test_help_lists_options_in_the_order_of_the_fields(call):
    text = call("--help")[0].output
    places = [text.index(name) for name in ("What it does", "--first", "--name", "--twice", "--last", "--own")]
    assert places == sorted(places)
    assert "--hidden" not in text


def test_a_parser_refuses_in_its_own_words(call):
    result, _ = call("--first", "3", "--twice", "many")
    assert isinstance(result.exception, InputError)
    assert str(result.exception) == "--twice 'many' is not a number"
