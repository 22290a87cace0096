"""What a leg could gain at most over the baseline: by the bytes that a decode step reads."""

from __future__ import annotations

import pytest

from kvprofile.bench.runner import with_bounds
from kvprofile.records import record


def leg(name, retention, cache, **changes):
    heads = None
    if retention < 1:
        heads = record.Heads(budgets=[[1.0, 0.0]], method="kvzip", statistic="max", sink_tokens=50, recent_tokens=50)
    return record.Leg(
        name=name,
        kind="local",
        status="ok",
        model="tiny",
        dtype="bfloat16",
        kv_cache_dtype=cache,
        retention_asked=retention,
        retention_realised=retention,
        load=record.Load(mode="closed"),
        requests=[record.Request(document="a", question="b", output="c", input_tokens=1000, output_tokens=0)],
        metrics=record.Metrics(output_throughput=100.0 / retention),
        heads=heads,
        **changes,
    )


@pytest.mark.parametrize(
    ("retention", "cache", "speedup"), [(0.5, None, 1 / 0.55), (1.0, "fp8", 2.0), (0.5, "fp8_e5m2", 2 / 0.55)]
)
def test_smaller_caches_are_bounded_by_their_bytes(retention, cache, speedup):
    whole, smaller = with_bounds([leg("baseline", 1.0, None), leg("other", retention, cache)])
    assert whole.bound is None
    assert smaller.bound.speedup == pytest.approx(speedup)
    assert smaller.bound.fraction == pytest.approx(1 / retention / speedup)
