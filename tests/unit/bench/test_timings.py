"""Numbers of a load from the times of its requests."""

from __future__ import annotations

from kvprofile.bench import chat_client, timings
from kvprofile.records.record import Request


def test_what_is_unknown_stays_unknown():
    whole = chat_client.Answer(1.0, 3.0, "text", (), "stop")
    assert timings.timings(whole) == {"ttft_ms": None, "tpot_ms": None, "e2el_ms": 2000.0, "itl_ms": None}
    found = timings.metrics([Request(start_s=0.0, output="x", **timings.timings(whole))], 2.0)
    assert found.total_output_tokens is None
    assert found.output_throughput is None
    assert found.mean_ttft_ms is None
    assert found.mean_e2el_ms == 2000.0
    assert found.max_concurrent_requests is None


def test_most_at_once_counts_overlaps():
    spans = [(0.0, 1.0, 3.0), (0.0, 2.0, 4.0), (0.0, 3.5, 5.0)]
    rows = [Request(start_s=s, ttft_ms=(f - s) * 1000, e2el_ms=(e - s) * 1000) for s, f, e in spans]
    assert timings.most_at_once(rows) == 2
