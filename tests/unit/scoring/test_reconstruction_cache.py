"""The cache of a document: allocated once, cut back without copies, and a window that holds what is seen."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvprofile.scoring.reconstruction_cache import ReconstructionCache


def test_cache_is_allocated_once_and_cut_back_without_copies():
    cache = ReconstructionCache(["full_attention"] * 2, capacity=20, window=None, step_tokens=8)
    key = torch.arange(8.0)[None, None, :, None].expand(1, 2, 8, 4)
    for _ in range(2):
        held, _ = cache.update(key, -key, 0)
    address = held.data_ptr()
    assert held.shape == (1, 2, 16, 4)
    cache.cut_back(10)
    held, values = cache.update(key[:, :, :3] + 100, -key[:, :, :3], 0)
    assert held.data_ptr() == address
    assert held[0, 0, :, 0].tolist() == [*range(8), 0, 1, 100, 101, 102]
    assert values.shape == held.shape
    assert cache.layers[0].allocations == 1
    cache.reset()
    assert cache.get_seq_length() == 0
    with pytest.raises(ValueError, match="cannot hold"):
        cache.update(torch.zeros(1, 2, 21, 4), torch.zeros(1, 2, 21, 4), 0)


@given(st.lists(st.integers(1, 9), min_size=1, max_size=8), st.integers(2, 6), st.integers(1, 9))
def test_sliding_layer_holds_what_a_new_token_may_see(steps, window, repeat):
    cache = ReconstructionCache(["sliding_attention"], capacity=1, window=window, step_tokens=9)
    layer = cache.layers[0]

    def positions(start, count):
        return torch.arange(float(start), start + count)[None, None, :, None]

    length = 0
    for count in steps:
        held, _ = cache.update(positions(length, count), positions(length, count), 0)
        first = int(held[0, 0, 0, 0])
        assert held[0, 0, :, 0].tolist() == list(range(first, length + count))
        assert first <= max(0, length - window + 1)
        length += count
    for _ in range(2):
        held, _ = cache.update(positions(length, repeat), positions(length, repeat), 0)
        assert held[0, 0, :, 0].tolist() == list(range(max(0, length - window + 1), length + repeat))
        layer.cut_back(length)
    assert layer.allocations == 1
