"""Figures of a summary, on items whose accuracies are known."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from kvprofile.evaluate.item_store import AnswerSpan
from kvprofile.evaluate.summary import Results, summarise
from tests.helpers.evaluations import made_up_items
from tests.helpers.factories import make_profile


def test_figures_of_a_table():
    items, variants = made_up_items(make_profile())
    summary = summarise(Results.of(items, variants))
    rows = {row["name"]: row for row in summary["rows"]}
    assert list(rows) == ["full", "kvzip", "random", "inverted", "uniform", "streaming"]
    assert (summary["exercises"], summary["questions"], summary["questions_outside"]) == (30, 120, 60)
    assert rows["full"]["accuracy"]["value"] == pytest.approx(119 / 120, rel=1e-5)
    kvzip = rows["kvzip"]
    assert kvzip["accuracy"]["value"] == pytest.approx(117 / 120)
    assert kvzip["relative"]["value"] == pytest.approx(117 / 119, rel=1e-5)
    assert (kvzip["lost"], kvzip["gained"], kvzip["seeds"], kvzip["full_heads"]) == (2.0, 0.0, 1, 12)
    assert kvzip["against_random"]["value"] == pytest.approx(57 / 120)
    assert kvzip["against_random"]["low"] > 0.3
    assert kvzip["outside"]["questions"] == 60
    assert kvzip["outside"]["accuracy"]["value"] == 1.0
    assert kvzip["by_task"]["needle"]["questions"] == kvzip["by_length"]["300"]["questions"] == 120
    assert kvzip["loss_rise"]["value"] == pytest.approx(2 * 1.9 / 120, rel=1e-5)
    assert rows["random"]["seeds"] == 2
    assert (rows["random"]["lost"], rows["random"]["gained"]) == (59.0, 0.0)
    assert rows["random"]["against_random"] is None
    accuracy = summary["verdicts"][0]["accuracy"]
    assert (accuracy["retention"], accuracy["nearest"], accuracy["beats_random_at"]) == (None, 0.5, [0.5])
    json.dumps(summary, allow_nan=False)


def test_how_near_a_budget_comes_to_the_full_cache():
    items, variants = made_up_items(make_profile())
    summary = summarise(Results.of(items, variants))
    rows = {row["name"]: row for row in summary["rows"]}
    assert rows["full"]["agreement"] == {"value": 1.0, "low": 1.0, "high": 1.0} | {
        "low": rows["full"]["agreement"]["low"]
    }
    kvzip = rows["kvzip"]
    agreement = (117 + 3 * 3 / 7) / 120
    assert kvzip["agreement"]["value"] == kvzip["tokens_right"]["value"] == pytest.approx(agreement, rel=1e-5)
    assert kvzip["agreement"]["low"] < agreement < kvzip["agreement"]["high"]
    assert kvzip["agreement_against_random"]["value"] == pytest.approx(57 / 120 * 4 / 7, rel=1e-5)
    assert kvzip["agreement_against_random"]["low"] > 0.1
    assert kvzip["kl"]["value"] == 0.5
    assert kvzip["kl_against_random"]["value"] == 0.0
    assert kvzip["by_task"]["needle"]["agreement"] == kvzip["agreement"]
    verdict = summary["verdicts"][0]["agreement"]
    assert (verdict["retention"], verdict["nearest"], verdict["beats_random_at"]) == (None, 0.5, [0.5])
    assert verdict["share"] == kvzip["agreement"]


@pytest.mark.parametrize(("right", "compared"), [(0, False), (11, False), (12, True), (120, True)])
def test_answers_are_compared_where_the_full_cache_has_some(right, compared):
    items, variants = made_up_items(make_profile())
    places = {(item.exercise, item.question) for item in items}
    known = set(sorted(places)[:right])
    items = [
        replace(
            item, right=(item.exercise, item.question) in known, accuracy=float((item.exercise, item.question) in known)
        )
        for item in items
    ]
    summary = summarise(Results.of(items, variants))
    assert summary["answers"]["right"] == right
    assert summary["answers"]["questions"] == 120
    assert summary["answers"]["compared"] is compared
    assert (summary["verdicts"][0]["accuracy"] is not None) is compared
    assert summary["verdicts"][0]["agreement"]["share"] is not None


def test_spans_of_continued_texts_are_told_apart():
    items, variants = made_up_items(make_profile())
    spans = (AnswerSpan(1, 64, 32, 1.0, 0.5, 0.1), AnswerSpan(65, 150, 43, 3.0, 0.25, 0.2))
    items = [
        replace(item, spans=spans[: 1 + (item.question > 1)] if item.variant != "full" else
                tuple(replace(span, agreement=1.0, kl=0.0, nll=1.0) for span in spans[: 1 + (item.question > 1)]))
        for item in items
    ]  # fmt: skip
    row = summarise(Results.of(items, variants))["rows"][1]
    assert {name: span["texts"] for name, span in row["by_span"].items()} == {"1-64": 120, "65-150": 60}
    second = row["by_span"]["65-150"]
    assert [second[name]["value"] for name in ("agreement", "kl", "loss_rise", "tokens_right")] == [0.25, 0.2, 2.0, 0.5]


def test_a_single_context_claims_nothing():
    items, variants = made_up_items(make_profile(), contexts=1)
    summary = summarise(Results.of(items, variants))
    assert summary["rows"][1]["relative"]["low"] is None
    assert summary["verdicts"][0]["accuracy"]["share"] is None
    assert summary["verdicts"][0]["agreement"]["share"] is None


def test_a_thousand_questions_can_keep_99_percent():
    items, variants = made_up_items(make_profile(), contexts=400, questions=4)
    verdict = summarise(Results.of(items, variants))["verdicts"][0]
    for part in (verdict["agreement"], verdict["accuracy"]):
        assert part["retention"] == 0.5
        assert part["share"]["low"] >= 0.99


def test_variants_must_be_asked_the_same():
    items, variants = made_up_items(make_profile(), contexts=2)
    with pytest.raises(ValueError, match="was not asked the same questions"):
        Results.of(items[:-1], variants)
