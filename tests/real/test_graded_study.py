"""The study of graded budgets in its smallest form: a context, the page, and nothing asked twice."""

from __future__ import annotations

import json
import sys

import pytest

from scripts import graded_study

pytestmark = [pytest.mark.real, pytest.mark.usefixtures("folder")]


def study(monkeypatch, tmp_path, *arguments):
    places = ["--runs", tmp_path / "runs", "--output", tmp_path / "studies", "--readme", tmp_path / "README.md"]
    monkeypatch.setattr(sys, "argv", ["graded_study", *map(str, places), *arguments])
    graded_study.main()


def test_a_context_makes_a_page(tmp_path, monkeypatch, capsys):
    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- made by `make study-graded` -->\nold\n<!-- end -->\nafter\n")
    monkeypatch.setattr(graded_study, "PARTS", (graded_study.QUESTIONS,))
    study(monkeypatch, tmp_path, "--first", "2", "--share", "2/2")
    assert "2 of 2: graded, needle/1500/0" in capsys.readouterr().out
    found = json.loads((tmp_path / "studies" / "data" / "graded-budgets.json").read_text())
    assert found["controls"] is None
    loss = {row["name"]: row["kl"][0] for row in found["asked"]["rows"] if row["retention"] in (0.3, None)}
    assert loss["graded"] < loss["kvzip"]
    monkeypatch.setattr(graded_study, "PARTS", (graded_study.CONTROLS,))
    study(monkeypatch, tmp_path, "--first", "1")
    found = json.loads((tmp_path / "studies" / "data" / "graded-budgets.json").read_text())
    loss = {row["name"]: row["kl"][0] for row in found["controls"]["rows"] if row["retention"] in (0.3, None)}
    assert all(loss["graded"] < loss[control] for control in ("any tokens", "reversed", "shuffled", "equal"))
    told = readme.read_text()
    assert told.startswith("before\n<!--")
    assert told.endswith("<!-- end -->\nafter\n")
    assert "graded heads" in told
    assert "old" not in told
    capsys.readouterr()
    study(monkeypatch, tmp_path, "--first", "1")
    assert "of 1" not in capsys.readouterr().out
