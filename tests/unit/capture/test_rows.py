"""The largest weights of a row's attention against a naive loop."""

from __future__ import annotations

import pytest
import torch

from kvprofile.capture import rows


def naive_weights(query, keys, scored, visible, scaling, softcap=None, sinks=None):
    """One row, one head at a time."""
    count, heads, _ = query.shape
    group = heads // len(keys)
    best = torch.zeros(len(keys), scored.stop - scored.start, dtype=torch.float64)
    for head in range(heads):
        for row in range(count):
            logits = keys[head // group, : visible + row].double() @ query[row, head].double() * scaling
            if softcap:
                logits = softcap * torch.tanh(logits / softcap)
            if sinks is not None:
                logits = torch.cat([logits, sinks[head : head + 1].double()])
            weights = logits.softmax(0)[scored]
            best[head // group] = torch.maximum(best[head // group], weights)
    return best


@pytest.mark.parametrize("most", [rows.MOST_LOGITS, 200])
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("sinks", [False, True])
def test_largest_weights(most, softcap, sinks, monkeypatch):
    monkeypatch.setattr(rows, "MOST_LOGITS", most)
    generator = torch.Generator().manual_seed(3)
    query = torch.randn(11, 6, 8, generator=generator) * 3
    keys = torch.randn(2, 25, 8, generator=generator)
    learned = torch.randn(6, generator=generator) * 4 if sinks else None
    found = rows.largest_weights(query, keys, slice(4, 12), 15, 0.5, softcap, learned)
    expected = naive_weights(query, keys, slice(4, 12), 15, 0.5, softcap, learned)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, atol=1e-6, rtol=1e-5)


def test_rows_do_not_see_later_keys():
    query, keys = torch.ones(2, 1, 4), torch.ones(1, 6, 4)
    keys[0, 5] = 100.0  # the second row alone sees it
    first = rows.largest_weights(query[:1], keys[:, :5], slice(0, 3), 5, 1.0)
    torch.testing.assert_close(first, torch.full((1, 3), 0.2))
    torch.testing.assert_close(rows.largest_weights(query, keys, slice(0, 3), 5, 1.0), first)


def test_values_that_are_not_numbers_stay_visible():
    query, keys = torch.ones(2, 1, 4), torch.ones(1, 6, 4)
    keys[0, 1] = torch.nan
    assert rows.largest_weights(query, keys, slice(0, 3), 5, 1.0).isnan().any()


def test_summaries_of_states_are_means_and_norms():
    states = torch.tensor([[[3.0, 4.0], [0.0, 1.0]]])
    found = rows.summarise(states.to(torch.bfloat16))
    assert found["mean"].tolist() == [[1.5, 2.5]]
    assert [found[f"norm_{name}"].item() for name in ("mean", "std", "min", "max")] == [3.0, 2.0, 1.0, 5.0]
