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
    told = " ".join(out.split())
    assert max(map(len, out.splitlines())) <= 80
    assert "a-rather-l… 0.5" in out
    assert "agreement %" in out.splitlines()[3]
    assert "evidence outside of sinks and window: 60 of 120 (50%)" in out
    assert "kvzip keeps 99% of the full cache's first choices at no retention with certainty" in told
    assert "keeps 99% of the full cache's accuracy at no retention with certainty" in told


def printed(summary, capsys):
    from kvprofile.cli import evaluate

    evaluate.render(summary)
    return capsys.readouterr().out


@pytest.mark.parametrize(
    ("generate", "told"),
    [
        (True, "The full cache answers 0 of 120 questions right, so answers are left out"),
        (
            False,
            "The full cache writes the reference in 0 of 120 questions, so exact answers are left out; --generate",
        ),
    ],
)
def test_answers_that_the_full_cache_does_not_know_are_left_out(summary, capsys, generate, told):
    summary["settings"]["generate"] = generate
    summary["answers"] = {"questions": 120, "right": 0, "exact": 0, "accuracy": 0.0, "compared": False}
    summary["verdicts"][0]["accuracy"] = None
    out = printed(summary, capsys)
    assert told in " ".join(out.split())
    assert "accuracy" not in out
    assert "kvzip 0.5" in out
    assert "first choices at no retention with certainty" in " ".join(out.split())


def test_texts_that_are_continued_have_tables_of_their_own(summary, capsys):
    figures = {"value": 0.1234, "low": 0.1, "high": 0.2}
    for row in summary["rows"]:
        row["by_span"] = {
            name: dict.fromkeys(("agreement", "kl", "loss_rise", "tokens_right"), figures)
            for name in ("1-64", "65-150", "151-")
        }
    out = printed(summary, capsys)
    assert max(map(len, out.splitlines())) <= 80
    assert "KL, tokens                1-64            65-150              151-\n" in out
    assert "0.123 0.100-0.200" in out
