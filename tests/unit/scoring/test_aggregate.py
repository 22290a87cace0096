"""Statistics of heads over chunks and documents."""

from __future__ import annotations

import math

import torch
from hypothesis import given
from hypothesis import strategies as st

from kvprofile.budget.profile import Geometry
from kvprofile.scoring.aggregate import DocumentScores, HeadStatistics, merge_documents


@given(st.lists(st.integers(1, 50), min_size=1, max_size=5), st.integers(0, 99))
def test_statistics_of_chunks_add_up(sizes, seed):
    generator = torch.Generator().manual_seed(seed)
    parts = [torch.rand(2, 3, size, generator=generator) ** 4 for size in sizes]
    total = HeadStatistics.of(parts[0])
    for part in parts[1:]:
        total = total + HeadStatistics.of(part)
    whole = torch.cat(parts, -1).double()
    torch.testing.assert_close(total.maximum.double(), whole.amax(-1))
    torch.testing.assert_close(total.mean(), whole.mean(-1))
    rank = math.ceil(0.99 * whole.shape[-1]) - 1
    exact = whole.sort(-1).values[..., rank].clamp_min(1e-9)
    torch.testing.assert_close(total.quantile(), exact, rtol=0.02, atol=1e-9)


def document(token_scores):
    return DocumentScores.of(HeadStatistics.of(torch.tensor(token_scores)), None, None, 2)


def test_documents_are_merged_and_sliding_layers_left_null():
    geometry = Geometry(
        layers=2, attention_heads=2, kv_heads=2, head_size=4, layer_types=["sliding_attention", "full_attention"]
    )
    first = document([[[0.2, 0.4], [0.1, 0.1]]])
    second = document([[[0.8, 0.0], [0.1, 0.3]]])
    scores = merge_documents([first, second], geometry)
    assert scores.max == [[None, None], [0.8, 0.3]]
    assert scores.mean == [[None, None], [0.35, 0.15]]
    assert scores.spread == [[None, None], [0.2, 0.1]]
    assert merge_documents([first], geometry).spread is None
