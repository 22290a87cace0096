from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvprofile.sizes import parse_size


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("64MiB", 2**26),
        ("24GiB", 24 * 2**30),
        ("80 GB", 80 * 10**9),
        ("1.5 GB", 1_500_000_000),
        ("2kib", 2048),
        (" 3 tb ", 3 * 10**12),
        ("0GiB", 0),
    ],
)
def test_sizes_are_read(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text", ["", "64", "MiB", "-1GiB", "24G", "lots", "64MiB and more", "8GiB;rm", "8Gbit", "1e3GB", "nan GB", ".5GiB"]
)
def test_what_is_not_a_size_gives_none(text):
    assert parse_size(text) is None


@given(st.integers(0, 10**6), st.integers(0, 3), st.booleans(), st.sampled_from(["", " ", "  "]))
def test_every_whole_number_with_a_unit_is_read_exactly(count, power, binary, space):
    unit = "KMGT"[power] + ("iB" if binary else "B")
    assert parse_size(f"{count}{space}{unit}") == count * (1024 if binary else 1000) ** (power + 1)


def test_a_number_too_large_for_a_float_is_larger_than_any_bound():
    assert parse_size("9" * 400 + "GiB") == float("inf")
