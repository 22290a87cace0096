"""Loads that make no sense."""

from __future__ import annotations

import pytest

from kvprofile.bench.bench_options import LoadPlan
from kvprofile.errors import InputError


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"mode": "open"}, "--request-rate"),
        ({"request_rate": 1.0}, "--load open"),
        ({"concurrency": 0}, "--concurrency"),
        ({"temperature": -1.0}, "--temperature"),
        ({"max_output_tokens": 0}, "--max-output-tokens"),
    ],
)
def test_loads_that_make_no_sense_are_refused(changes, said):
    with pytest.raises(InputError, match=said):
        LoadPlan(**changes)
