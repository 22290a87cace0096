"""What several commands have in common: help, imports that stay light, files of many budgets, names too long."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from kvprofile.budget import store
from tests.helpers import foreign
from tests.helpers.commands import refused, save, shown
from tests.helpers.factories import make_profile

pytestmark = pytest.mark.usefixtures("workplace")


@pytest.mark.parametrize("command", ["show", "diff", "plot", "plan", "validate"])
def test_help_of_each_command(capsys, command):
    assert command in shown(capsys, command, "--help")


@pytest.mark.parametrize(
    "arguments", [["--help"], ["show", "a.json"], ["validate", "a.json"], ["diff", "a.json", "a.json"]]
)
def test_light_commands_load_nothing_heavy(arguments):
    save("a.json")
    heavy = "('torch', 'transformers', 'matplotlib', 'scipy', 'numpy')"
    code = (
        "import sys; from kvprofile.cli import run; run(sys.argv[1:]); "
        f"print([m for m in {heavy} if m in sys.modules], file=sys.stderr)"
    )
    before = os.times()
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True)
    assert done.stderr.splitlines()[-1] == "[]"
    after = os.times()
    used = after.children_user + after.children_system - before.children_user - before.children_system
    assert used < 3  # seconds of a processor, which others on the machine do not change: 0.3 to 0.5


pytestmark = pytest.mark.usefixtures("workplace")


def test_ninety_nine_budgets_are_shown_checked_planned_and_plotted(capsys):
    profile = make_profile(28, 4)
    table = foreign.written(profile, "lu-kv", Path())
    store.save(foreign.read_back(profile, "lu-kv", table), Path("b.json"))
    assert len(store.load(Path("b.json")).budgets) == 99
    assert "stored in the file" in shown(capsys, "show", "b.json", "--retention", "0.37")
    assert "ok " in shown(capsys, "validate", "b.json")
    document = json.loads(shown(capsys, "plan", "b.json", "--gpu-memory", "L4", "--context", "900", "--json"))
    assert [at["retention"] for at in document["at"]] == [1.0, 0.9, 0.7, 0.5, 0.3]
    save("a.json", layers=28)
    for name in ("a", "b"):  # the picture has the presets, as that of the profile it was made from
        shown(capsys, "plot", f"{name}.json", "--output", f"{name}.svg", "--kind", "layers")
    assert len(Path("a.svg").read_bytes()) == pytest.approx(len(Path("b.svg").read_bytes()), rel=0.2)


def test_names_that_are_too_long_are_one_line(capsys):
    save("a.json")
    name = "n" * 300
    assert "no budget file nnn" in refused(capsys, "show", name)
    assert "no budget file nnn" in refused(capsys, "diff", "a.json", name)
    assert "File name too long" in refused(capsys, "plot", "a.json", "--output", f"{name}.png")
    assert "File name too long" in refused(capsys, "plot", "a.json", "--output", f"{name}/a.png")
