"""The tables of an evaluation."""

from __future__ import annotations

import pytest

from tests.helpers.evaluations import made_up_summary


@pytest.fixture
def summary():
    return made_up_summary()


def test_the_tables_fit_80_columns(summary, capsys):
    from kvprofile.cli import evaluate

    for row in summary["rows"]:
        if row["kind"] == "profile":
            row["name"] = "a-rather-long-method-name"
        row["by_task"] |= dict.fromkeys(("multi_key", "my_own_exercises.jsonl", *"abcdefgh"), row["by_task"]["needle"])
    evaluate.render(summary)
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 80
    assert "a-rather… 0.5" in out
    assert "evidence outside of sinks and window: 60 of 120 (50%)" in out
    assert "at no retention is it certain that 99% of the accuracy is kept" in out
