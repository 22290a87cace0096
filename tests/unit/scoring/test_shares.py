"""Shares of heads against the plain way: sort every entry of a document and count."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvprofile.budget.profile import GRADED_PRESETS
from kvprofile.scoring.aggregate import histogram
from kvprofile.scoring.shares import document_shares, graded_budgets, preset_shares
from tests.helpers.factories import make_geometry


def scores(seed, layers=3, heads=2, tokens=400):
    generator = torch.Generator().manual_seed(seed)
    spread = torch.rand(layers, heads, 1, generator=generator) * 4
    return torch.rand(layers, heads, tokens, generator=generator) ** (1 + spread)


@pytest.mark.parametrize("retention", GRADED_PRESETS)
def test_shares_are_those_above_the_pooled_threshold(retention):
    found = scores(1)
    threshold = found.flatten().sort(descending=True).values[round(retention * found.numel()) - 1]
    expected = (found >= threshold).double().mean(-1)
    got = document_shares(histogram(found), retention)
    assert got.mean().item() == pytest.approx(retention, abs=1e-9)
    torch.testing.assert_close(got, expected, atol=0.02, rtol=0)  # a bin is 2 % wide


@settings(deadline=None)
@given(st.integers(0, 1000), st.integers(1, 60), st.floats(0.01, 1.0))
def test_the_mean_is_the_retention_and_no_share_leaves_its_range(seed, tokens, retention):
    got = document_shares(histogram(scores(seed, tokens=tokens)), retention)
    assert got.mean().item() == pytest.approx(retention, abs=1e-9)
    assert 0.0 <= got.min() <= got.max() <= 1.0 + 1e-12


def test_equal_scores_give_equal_shares():
    got = document_shares(histogram(torch.full((2, 2, 50), 0.3)), 0.3)
    torch.testing.assert_close(got, torch.full((2, 2), 0.3, dtype=torch.float64))


def test_budgets_keep_the_retention_to_the_last_digit_and_rise_with_it():
    geometry = make_geometry(4, 2, sliding=[1])
    found = graded_budgets([preset_shares(histogram(scores(seed))) for seed in (1, 2, 3)], geometry)
    assert [float(key) for key in found] == list(GRADED_PRESETS)
    before = None
    for key, budget in found.items():
        assert budget.retention_realised == float(key)
        assert budget.heads[1] == [None, None]
        values = [value for row in budget.heads for value in row if value is not None]
        assert before is None or all(low <= high for low, high in zip(values, before, strict=True))
        before = values
