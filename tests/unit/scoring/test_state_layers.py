"""States that are held next to keys: continued, copied for real, and put back for any number of rows."""

from __future__ import annotations

import pytest
import torch

from kvprofile.scoring.reconstruction_cache import ReconstructionCache
from kvprofile.scoring.state_layers import StateLayer

TYPES = ["no_cache", "full_attention", "no_cache"]


def inputs(first, count):
    """Inputs [1, 2, count] of a convolution that tell their position."""
    return torch.arange(float(first), first + count).expand(1, 2, count)


def test_a_convolution_sees_what_came_before():
    layer = StateLayer(1)
    whole = layer.update_conv_state(inputs(1, 2), conv_kernel_size=4)
    assert whole[0, 0].tolist() == [0, 0, 1, 2]  # fewer than the kernel sees: zeros come first, as transformers has it
    whole = layer.update_conv_state(inputs(3, 3))
    assert whole[0, 0].tolist() == [0, 0, 1, 2, 3, 4, 5]
    assert layer.conv_states[0][0, 0].tolist() == [2, 3, 4, 5]
    assert layer.has_previous_state == {0: True}


def test_states_go_back_although_models_change_them_in_place():
    layer = StateLayer(2)
    layer.update_conv_state(inputs(0, 4), conv_kernel_size=4)
    layer.update_recurrent_state(torch.ones(1, 3), state_idx=1)
    layer.keep()
    for _ in range(2):
        layer.conv_states[0].zero_()
        layer.recurrent_states[1].add_(5)
        layer.update_recurrent_state(torch.ones(1, 3), state_idx=0)
        layer.go_back()
        assert layer.conv_states[0][0, 0].tolist() == [0, 1, 2, 3]
        assert layer.recurrent_states[1].tolist() == [[1, 1, 1]]
        assert layer.recurrent_states[0] is None  # was not there when states were kept
    layer.go_back(3)
    layer.recurrent_states[1][1] += 1
    assert layer.recurrent_states[1].tolist() == [[1, 1, 1], [2, 2, 2], [1, 1, 1]]


def test_a_state_stays_in_the_dtype_it_began_in():
    layer = StateLayer(1)
    layer.update_recurrent_state(torch.ones(1, 3, dtype=torch.float32))
    assert layer.update_recurrent_state(torch.ones(1, 3, dtype=torch.bfloat16)).dtype == torch.float32


def test_the_cache_of_a_document_goes_back_with_its_states():
    cache = ReconstructionCache(TYPES, capacity=20, window=None, step_tokens=8, states=[1, 0, 1])
    key = torch.zeros(1, 2, 5, 4)
    cache.update(key, key, 1)
    cache.update_conv_state(inputs(0, 5), 0, conv_kernel_size=3)
    with pytest.raises(ValueError, match="no states were kept"):
        cache.cut_back(5)
    cache.keep_states()
    cache.update(key, key, 1)
    cache.update_conv_state(inputs(9, 5), 0)
    cache.cut_back(5)
    assert cache.get_seq_length() == 5
    assert cache.layers[0].conv_states[0][0, 0].tolist() == [2, 3, 4]
    assert cache.nbytes() == (2 * 2 * 20 * 4 + 2 * 3) * 4
    cache.reset()
    assert cache.layers[0].conv_states == {0: None}
    assert not cache.has_previous_state(0)


def test_a_state_that_no_pass_reaches_does_not_hide_the_others():
    """OLMo asks whether any layer has a state, and transformers looks at the last one alone."""
    cache = ReconstructionCache(TYPES, capacity=20, window=None, step_tokens=8, states=[1, 0, 1])
    cache.update_conv_state(inputs(0, 5), 0, conv_kernel_size=3)
    assert not cache.has_previous_state()  # within the first pass
    cache.past_tokens = 5
    assert cache.has_previous_state()
    assert not cache.has_previous_state(2)
