"""Numbers of a load are those that vLLM's own benchmark makes of the same requests."""

from __future__ import annotations

import pytest

from kvprofile.bench import chat_client, timings
from kvprofile.records.record import Request

pytest.importorskip("vllm")

from vllm.benchmarks import serve
from vllm.benchmarks.lib.endpoint_request_func import RequestFuncOutput


def answer(sent, arrivals, tokens=None):
    return chat_client.Answer(sent, arrivals[-1], "text", tuple(arrivals), "stop", 100, 0, tokens or len(arrivals))


def test_numbers_are_those_of_vllm_bench_serve():
    answers = [
        answer(1.0, [1.5, 1.6, 1.8, 2.1]),
        answer(1.2, [2.0, 2.5], tokens=5),
        answer(1.3, [3.0]),
    ]
    rows = [
        Request(start_s=a.sent, input_tokens=100, output_tokens=a.output_tokens, output="x", **timings.timings(a))
        for a in answers
    ]
    rows.append(Request(start_s=0.0, error="500: broken"))
    ours = timings.metrics(rows, 4.0)
    outputs = [
        RequestFuncOutput(
            success=True,
            generated_text="x",
            prompt_len=100,
            output_tokens=a.output_tokens,
            start_time=a.sent,
            ttft=a.arrivals[0] - a.sent,
            latency=a.ended - a.sent,
            itl=[b - c for c, b in zip(a.arrivals, a.arrivals[1:], strict=False)],
        )
        for a in answers
    ]
    outputs.append(RequestFuncOutput(success=False, error="500: broken"))
    theirs, _ = serve.calculate_metrics([None] * 4, outputs, 4.0, None, [99.0], {})
    assert (ours.completed, ours.failed) == (theirs.completed, theirs.failed)
    assert ours.total_input_tokens == theirs.total_input
    assert ours.total_output_tokens == theirs.total_output
    for name in ("request_throughput", "output_throughput", "total_token_throughput"):
        assert getattr(ours, name) == pytest.approx(getattr(theirs, name))
    for name in ("ttft", "tpot", "itl", "e2el"):
        for kind in ("mean", "median"):
            assert getattr(ours, f"{kind}_{name}_ms") == pytest.approx(getattr(theirs, f"{kind}_{name}_ms"))
        ((_, theirs_p99),) = getattr(theirs, f"percentiles_{name}_ms")
        assert getattr(ours, f"p99_{name}_ms") == pytest.approx(theirs_p99)
