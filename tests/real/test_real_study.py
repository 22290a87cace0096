"""The study on the pretrained model in its smallest form: a context, the page, and nothing asked twice."""

from __future__ import annotations

import json
import sys

import pytest

from scripts import real_study

pytestmark = [pytest.mark.real, pytest.mark.usefixtures("folder")]


def study(monkeypatch, tmp_path, *arguments):
    places = ["--runs", tmp_path / "runs", "--output", tmp_path / "studies", "--readme", tmp_path / "README.md"]
    monkeypatch.setattr(sys, "argv", ["real_study", *map(str, places), *arguments])
    real_study.main()


def test_a_context_makes_a_page(tmp_path, monkeypatch, capsys):
    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- made by `make study-real` -->\nold\n<!-- end -->\nafter\n")
    study(monkeypatch, tmp_path, "--first", "2")
    assert "2 of 2: main, needle/1500/0" in capsys.readouterr().out
    page = (tmp_path / "studies" / "real-model.md").read_text()
    assert "questions on 2" in page
    assert (tmp_path / "studies" / "real-model.png").stat().st_size > 10_000
    found = json.loads((tmp_path / "studies" / "data" / "real-model.json").read_text())["main"]
    half = {row["name"]: row["kl"][0] for row in found["rows"] if row["retention"] in (0.5, None)}
    assert half["full"] == 0
    assert half["kvzip"] < half["random"]
    assert half["kvzip"] < half["inverted"]
    told = readme.read_text()
    assert told.startswith("before\n<!--")
    assert told.endswith("<!-- end -->\nafter\n")
    assert "| 45 of 90 (0.5) |" in told
    assert "old" not in told
    study(monkeypatch, tmp_path, "--first", "2")
    assert "of 2" not in capsys.readouterr().out
    assert (tmp_path / "studies" / "real-model.md").read_text() == page


def test_controls_keep_as_many_heads_and_random_ones_differ():
    kvzip, drawn, again = (
        real_study.Piece(real_study.MAIN, "needle", 1500, number, 8).contenders(real_study.ROOT) for number in (0, 0, 1)
    )
    by_name = {contender.label: contender.heads(0.5) for contender in kvzip}
    counts = {name: sum(value == 1.0 for row in heads for value in row) for name, heads in by_name.items()}
    assert counts == {"kvzip": 45, "kvzip-mean": 45, "random": 45, "inverted": 45, "streaming": 0}
    random = [next(c.heads(0.5) for c in found if c.label == "random") for found in (kvzip, drawn, again)]
    assert random[0] == random[1] != random[2]
