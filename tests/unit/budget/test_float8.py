"""Caches of 8-bit floats: what is stored is the nearest number that there is, or the nearest towards zero."""

from __future__ import annotations

import pytest
import torch

from kvprofile.budget.float8 import Float8, of_cache

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
KINDS = (E4M3, E5M2)


def every_number(dtype):
    """All finite numbers that a byte can be, in order."""
    found = torch.arange(256, dtype=torch.uint8).view(dtype).float()
    return found[found.isfinite()].unique()


def drawn():
    return torch.cat([torch.randn(4000) * scale for scale in (1e-6, 1e-3, 1.0, 30.0, 1e5)])


@pytest.mark.parametrize("dtype", KINDS)
def test_what_is_stored_is_the_nearest_number(dtype):
    numbers, cache = drawn(), Float8(dtype)
    found = cache.rounded(numbers)
    assert torch.equal((found - numbers).abs(), (numbers[:, None] - every_number(dtype)).abs().min(1).values)
    assert torch.equal(cache.rounded(found), found)


@pytest.mark.parametrize("dtype", KINDS)
def test_towards_zero_is_the_nearest_that_is_not_larger(dtype):
    numbers, cache, known = drawn(), Float8(dtype, toward_zero=True), every_number(dtype)
    found = cache.rounded(numbers)
    below = known[known >= 0]
    expected = below[torch.searchsorted(below, numbers.abs(), right=True) - 1]
    assert torch.equal(found.abs(), expected)
    assert torch.equal(found.signbit(), numbers.signbit())
    assert torch.equal(cache.rounded(found), found)


@pytest.mark.parametrize("dtype", KINDS)
def test_half_way_goes_to_the_even_one(dtype):
    known = every_number(dtype)
    middles = (known[1:].double() + known[:-1]) / 2
    assert (Float8(dtype).stored(middles.float()).view(torch.uint8) % 2 == 0).all()


@pytest.mark.parametrize("dtype", KINDS)
@pytest.mark.parametrize("toward_zero", [False, True])
def test_what_is_too_large_becomes_the_largest(dtype, toward_zero):
    most = torch.finfo(dtype).max
    found = Float8(dtype, toward_zero).rounded(torch.tensor([1e9, -1e9, most * 1.2]))
    assert found.tolist() == [most, -most, most]


def test_scales_are_divided_by_and_multiplied_with():
    numbers, cache = torch.randn(1000, dtype=torch.bfloat16), Float8(E4M3)
    found = cache.rounded(numbers, 0.25)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, cache.rounded(numbers * 4) / 4)


def test_names_and_platforms():
    assert of_cache("auto") is of_cache("bfloat16") is None
    assert of_cache("fp8") == of_cache("fp8_e4m3", "cuda") == Float8(E4M3)
    assert of_cache("fp8_e5m2", "cpu") == Float8(E5M2, toward_zero=True)
