"""From requests to numbers, under the keys and by the formulas of `vllm bench serve`. Nothing here runs anything."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from kvprofile.bench.chat_client import Answer
from kvprofile.records.record import LATENCIES, Metrics, Request


def timings(answer: Answer) -> dict[str, float | list[float] | None]:
    """ttft_ms, tpot_ms, e2el_ms and itl_ms of an answer; None for what was not streamed or is a single token.

    Between tokens is between pieces of the stream, of which some hold several tokens.
    """
    total = (answer.ended - answer.sent) * 1000
    if not answer.arrivals:
        return {"ttft_ms": None, "tpot_ms": None, "e2el_ms": total, "itl_ms": None}
    first = (answer.arrivals[0] - answer.sent) * 1000
    gaps = [(b - a) * 1000 for a, b in zip(answer.arrivals, answer.arrivals[1:], strict=False)]
    several = answer.output_tokens is not None and answer.output_tokens > 1
    per_token = (total - first) / ((answer.output_tokens or 2) - 1) if several else None
    return {"ttft_ms": first, "tpot_ms": per_token, "e2el_ms": total, "itl_ms": gaps}


def metrics(requests: Sequence[Request], duration_s: float) -> Metrics:
    """The metrics of a load that took ``duration_s``. Counts of tokens are None where a server did not say them."""
    # of requests that were answered; failed ones are only counted
    done = [request for request in requests if request.error is None]
    read, written = _total(r.input_tokens for r in done), _total(r.output_tokens for r in done)
    latencies: dict[str, float | None] = {}
    for name in LATENCIES:
        values = [value for request in done for value in _values(request, name)]
        latencies[f"mean_{name}_ms"] = float(np.mean(values)) if values else None
        latencies[f"median_{name}_ms"] = float(np.median(values)) if values else None
        latencies[f"p99_{name}_ms"] = float(np.percentile(values, 99)) if values else None
    return Metrics(
        duration=duration_s,
        completed=len(done),
        failed=len(requests) - len(done),
        total_input_tokens=read,
        total_output_tokens=written,
        request_throughput=_rate(len(done), duration_s),
        output_throughput=_rate(written, duration_s),
        total_token_throughput=_rate(None if read is None or written is None else read + written, duration_s),
        max_concurrent_requests=most_at_once(done),
        **latencies,
    )


def most_at_once(requests: Iterable[Request]) -> float | None:
    """The most requests that were decoding at the same moment: between their first token and their last."""
    spans = [
        (request.start_s + request.ttft_ms / 1000, request.start_s + request.e2el_ms / 1000)
        for request in requests
        if request.start_s is not None and request.ttft_ms is not None and request.e2el_ms is not None
    ]
    # +1 where a request gets its first token, -1 where it ends; an end sorts before a start of the same moment
    events = sorted([(start, 1) for start, _ in spans] + [(stop, -1) for _, stop in spans])
    now = most = 0
    for _, change in events:
        now += change
        most = max(most, now)
    return float(most) if spans else None


def _values(request: Request, name: str) -> list[float]:
    found = getattr(request, f"{name}_ms")
    if found is None:
        return []
    return list(found) if isinstance(found, list) else [found]


def _total(values: Iterable[int | None]) -> int | None:
    found = list(values)
    return None if any(value is None for value in found) else sum(value for value in found if value is not None)


def _rate(count: int | None, duration_s: float) -> float | None:
    return None if count is None or duration_s <= 0 else count / duration_s
