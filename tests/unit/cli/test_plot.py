"""kvprofile plot."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kvprofile.cli import run
from tests.helpers.commands import refused, save, shown

pytestmark = pytest.mark.usefixtures("workplace")


def test_plot_writes_each_kind(capsys):
    save("a.json")
    for name in ("a.png", "b.svg"):
        assert run(["plot", "a.json", "--output", name, "--kind", "scores", "--kind", "layers", "--dpi", "40"]) == 0
        assert Path(name).stat().st_size > 1000
    assert "wrote b.svg" in capsys.readouterr().err
    document = json.loads(shown(capsys, "plot", "a.json", "--output", "c.png", "--dpi", "40", "--json"))
    assert document["kinds"] == ["heatmap", "shares", "scores", "layers"]


def test_plot_refuses_and_leaves_what_is_there(capsys):
    save("a.json")
    Path("a.pdf").write_text("mine")
    assert ".png or .svg" in refused(capsys, "plot", "a.json", "--output", "a.pdf")
    assert Path("a.pdf").read_text() == "mine"
    assert "nothing.json" in refused(capsys, "plot", "nothing.json", "--output", "a.png")
    assert "pie" in refused(capsys, "plot", "a.json", "--output", "a.png", "--kind", "pie")
    Path("folder.png").mkdir()
    assert "it is a folder" in refused(capsys, "plot", "a.json", "--output", "folder.png")
    assert not Path("a.png").exists()
