"""What holds for every command: exit codes, one line for an error, pipes, files that try to command the terminal."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys

import pytest

from kvprofile import __version__, cli
from kvprofile.budget import store
from kvprofile.cli import COMMANDS, load, run
from kvprofile.errors import InputError, plain
from tests.helpers.factories import make_profile

KVPROFILE = [sys.executable, "-m", "kvprofile"]


def test_version_and_help(capsys):
    assert run(["--version"]) == 0
    assert capsys.readouterr().out.strip() == __version__
    assert run(["--help"]) == 0


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_and_json(capsys, command):
    assert run([command, "--help"]) == 0
    out = capsys.readouterr().out
    assert "--json" in out


@pytest.mark.parametrize(("command", "told"), COMMANDS.items())
def test_the_list_of_commands_tells_what_each_tells_itself(command, told):
    assert load(command).help == told


def test_only_the_command_that_is_asked_for_is_loaded():
    code = (
        "import sys; from kvprofile.cli import run; run(sys.argv[1:]); "
        "print(*sorted(m for m in sys.modules if m.startswith('kvprofile.')), file=sys.stderr)"
    )
    loaded = {}
    for words in ("--help", "scoer", "validate --help"):
        done = subprocess.run([sys.executable, "-c", code, *words.split()], capture_output=True, text=True, check=True)
        loaded[words] = done.stderr.splitlines()[-1].split()
    assert loaded["--help"] == loaded["scoer"] == ["kvprofile.cli", "kvprofile.errors"]
    others = {f"kvprofile.cli.{name}" for name in COMMANDS} - {"kvprofile.cli.validate"}
    assert "kvprofile.cli.validate" in loaded["validate --help"]
    assert not others & {*loaded["validate --help"]}


@pytest.mark.parametrize(
    ("typed", "completed"),
    [("s", ["score", "show"]), ("score --cont", ["--context-tokens"]), ("show --statistic m", ["max", "mean"])],
)
def test_a_shell_can_complete_what_is_typed(typed, completed):
    words = f"kvprofile {typed}"
    asked = {"_KVPROFILE_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(words.count(" "))}
    code = "from kvprofile.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **asked}, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == completed


def test_no_command_prints_the_help_and_ends_with_2(capsys):
    assert run([]) == 2
    captured = capsys.readouterr()
    assert "Usage: kvprofile" in captured.out + captured.err
    assert "kvprofile:" not in captured.err


def test_unknown_command(capsys):
    assert run(["scoer"]) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1


def test_a_bug_is_one_line_unless_debugging(capsys, monkeypatch):
    def broken(*_):
        raise RuntimeError("first\nsecond")

    monkeypatch.setattr(store, "load", broken)
    monkeypatch.setattr("kvprofile.cli.output.resolve_profile", broken)
    monkeypatch.delenv("KVPROFILE_DEBUG", raising=False)
    assert run(["show", "x"]) == 1
    assert (
        capsys.readouterr().err
        == "kvprofile: RuntimeError: first second; run with kvprofile --debug for the traceback\n"
    )
    monkeypatch.setenv("KVPROFILE_DEBUG", "1")
    with pytest.raises(RuntimeError):
        run(["show", "x"])


@pytest.mark.parametrize("options", [[], ["--json"]])
def test_a_reader_that_leaves_is_not_an_error(tmp_path, options):
    store.save(make_profile(60, 8), tmp_path / "file.json")
    command = subprocess.Popen(
        [*KVPROFILE, "show", str(tmp_path / "file.json"), *options], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    command.stdout.close()
    errors = command.stderr.read()
    assert command.wait() == 0
    assert errors == b""


def test_errors_are_printable():
    assert str(InputError("a\x1b[31m\nb\udcff")) == "a\\x1b[31m\\nb\\xff"
    assert plain("Größe 日本") == "Größe 日本"


@pytest.mark.parametrize(
    "place",
    [
        ("model", "name"),
        ("model", "architecture"),
        ("scoring", "method"),
        ("scoring", "device"),
        ("kvprofile_version",),
    ],
)
def test_a_budget_file_cannot_command_the_terminal(tmp_path, place):
    raw = json.loads(store.to_bytes(make_profile(2, 2)))
    inner = raw
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = "x\x1b[31m\ny"
    file = tmp_path / "file.json"
    file.write_text(json.dumps(raw))
    with pytest.raises(InputError, match="holds characters that a terminal cannot print"):
        store.load(file)


@pytest.mark.loopback
def test_the_doctor_says_what_is_wrong_and_exits_with_one(capsys):
    assert run(["doctor", "--url", "http://127.0.0.1:9", "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["ok"] is False
    assert "does not answer" in found["checks"][0]["detail"]


@pytest.mark.parametrize(
    ("error", "alone"), [(ModuleNotFoundError("half of a library"), 1), (InputError("cannot load the weights"), 2)]
)
def test_what_a_library_makes_of_an_interruption_is_one(error, alone, monkeypatch, capsys):
    """Libraries that are being imported, or that load files, may turn Ctrl-C into an error of their own."""

    def fails(*_args, **_options):
        raise error

    monkeypatch.setattr(cli, "app", fails)
    assert cli.run([]) == alone
    monkeypatch.setattr(cli, "_interrupts", [signal.SIGINT])
    assert cli.run([]) == 130
    assert capsys.readouterr().err.splitlines()[-1].startswith("kvprofile: interrupted; finished work is kept")
