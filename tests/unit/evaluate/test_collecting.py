"""Rows of different lengths side by side: no state takes in another row's padding."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from kvprofile.evaluate.collecting import CollectingCache


def cache_with(states):
    return CollectingCache(["no_cache", "full_attention"], states, lambda: 0)


def read(cache, counts, tokens):
    """As a model that sums its tokens would read padded rows: its state is the sum so far."""
    for step in cache.steps(counts):
        held = cache.layers[0].recurrent_states[0]
        cache.update_recurrent_state(held + tokens[:, step].sum(1, keepdim=True), 0)


@given(st.lists(st.lists(st.integers(0, 5), min_size=3, max_size=3).filter(any), min_size=1, max_size=4), st.data())
def test_every_row_ends_with_its_own_state(turns, data):
    cache = cache_with([1, 0])
    cache.update_recurrent_state(torch.full((1, 1), 1000.0), 0)
    cache.keep_states()
    for _ in range(2):  # the next branch starts from the context again
        cache.start(3)
        expected = [1000.0] * 3
        for counts in turns:
            row = st.lists(st.integers(1, 99), min_size=max(counts), max_size=max(counts))
            tokens = data.draw(st.lists(row, min_size=3, max_size=3))
            read(cache, counts, torch.tensor(tokens).float())
            ours = [sum(mine[:count]) for mine, count in zip(tokens, counts, strict=True)]
            expected = [was + new for was, new in zip(expected, ours, strict=True)]
        assert cache.layers[0].recurrent_states[0][:, 0].tolist() == expected


def test_without_states_all_columns_are_read_at_once():
    assert list(cache_with([]).steps([3, 0, 5])) == [slice(0, 5)]
    assert not cache_with([]).keeps_states


def test_steps_end_where_rows_end():
    cache = cache_with([1, 0])
    cache.update_recurrent_state(torch.zeros(1, 1), 0)
    cache.keep_states()
    cache.start(4)
    assert list(cache.steps([2, 5, 0, 2])) == [slice(0, 2), slice(2, 5)]
