"""Figures of a summary, on items whose accuracies are known."""

from __future__ import annotations

import json

import pytest

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
    assert summary["verdicts"][0]["retention"] is None
    assert summary["verdicts"][0]["nearest"] == 0.5
    assert summary["verdicts"][0]["beats_random_at"] == [0.5]
    json.dumps(summary, allow_nan=False)


def test_a_single_context_claims_nothing():
    items, variants = made_up_items(make_profile(), contexts=1)
    summary = summarise(Results.of(items, variants))
    assert summary["rows"][1]["relative"]["low"] is None
    assert summary["verdicts"][0]["relative"] is None


def test_a_thousand_questions_can_keep_99_percent():
    items, variants = made_up_items(make_profile(), contexts=400, questions=4)
    verdict = summarise(Results.of(items, variants))["verdicts"][0]
    assert verdict["retention"] == 0.5
    assert verdict["relative"]["low"] >= 0.99


def test_variants_must_be_asked_the_same():
    items, variants = made_up_items(make_profile(), contexts=2)
    with pytest.raises(ValueError, match="was not asked the same questions"):
        Results.of(items[:-1], variants)
