"""Scores of a chunk by their definition, and one model at a time."""

from __future__ import annotations

import pytest
import torch

from kvprofile.budget.profile import Geometry
from kvprofile.scoring.attention import chunk_scores


def test_chunk_scores_are_the_largest_weight_over_rows_and_group():
    query, key = torch.randn(1, 4, 6, 8), torch.randn(1, 2, 5, 8)
    normaliser = torch.randn(1, 4, 6) + 4
    found = chunk_scores(query, key, normaliser, 0.3, None)
    weights = (query @ key.repeat_interleave(2, 1).transpose(-1, -2) * 0.3 - normaliser[..., None]).exp()
    expected = weights[0].amax(1).view(2, 2, 5).amax(1).clamp(max=1)
    torch.testing.assert_close(found, expected)


def test_a_model_cannot_be_scored_twice_at_once():
    from kvprofile.scoring.attention import recording
    from tests.helpers.models import random_model

    model = random_model("llama")
    geometry = Geometry(layers=3, attention_heads=4, kv_heads=2, head_size=16, layer_types=["full_attention"] * 3)
    with (
        recording(model, geometry),
        pytest.raises(RuntimeError, match="being scored already"),
        recording(model, geometry),
    ):
        pass
