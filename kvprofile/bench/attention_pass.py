"""Attention latency, in a pass of its own: an eager engine in a process of its own, whose workers time each layer.

Inside CUDA graphs operations cannot be timed one by one, and a timer slows what it times; so this pass measures
attention and nothing else. Runs as ``python -m kvprofile.bench.attention_pass`` with a job as JSON on stdin; prints
``RESULT`` and JSON. ``AttentionTimer`` is what vLLM adds to its workers.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from typing import Any, cast

RESULT = "RESULT"
TIMER = "kvprofile.bench.attention_pass.AttentionTimer"
OUTPUT_TOKENS = 33


class AttentionTimer:
    """Methods of a vLLM worker (``worker_extension_cls``): time every layer's kernel, step by step.

    A step is decoding where each of its rows brings one token.
    """

    def start_attention_timer(self) -> int:
        """Wrap the kernels of all layers; gives how many there are."""
        layers = self.vllm_config.compilation_config.static_forward_context  # type: ignore[attr-defined]
        self._spans: list[tuple[str, bool, Any]] = []
        kernels = [(name, layer.impl) for name, layer in layers.items() if hasattr(layer, "impl")]
        for name, kernel in kernels:
            kernel.forward = self._timed(name, kernel.forward)
        return len(kernels)

    def attention_steps(self) -> list[tuple[bool, float]]:
        """(whether it decoded, milliseconds over all layers) of each step so far."""
        steps: list[tuple[bool, float]] = []
        first = self._spans[0][0] if self._spans else None
        for name, decodes, span in self._spans:
            taken = _milliseconds(span)
            if name == first:
                steps.append((decodes, taken))
            else:
                steps[-1] = (steps[-1][0], steps[-1][1] + taken)
        return steps

    def _timed(self, name: str, stock: Any) -> Any:
        import torch

        spans, event = self._spans, cast("Any", torch.cuda.Event)

        def on_gpu(*args: Any, **kwargs: Any) -> Any:
            start, stop = (event(enable_timing=True) for _ in range(2))
            start.record()
            found = stock(*args, **kwargs)
            stop.record()
            spans.append((name, _decodes(args, kwargs), (start, stop)))
            return found

        def on_cpu(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            found = stock(*args, **kwargs)
            spans.append((name, _decodes(args, kwargs), (time.perf_counter() - start) * 1000))
            return found

        return on_gpu if torch.cuda.is_available() else on_cpu


def _decodes(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    metadata = kwargs.get("attn_metadata", args[5] if len(args) > 5 else None)
    return getattr(metadata, "max_query_len", None) == 1


def _milliseconds(span: Any) -> float:
    if isinstance(span, float):
        return span
    start, stop = span
    stop.synchronize()
    return float(start.elapsed_time(stop))


def summary(steps: list[tuple[bool, float]]) -> dict[str, float | int | None]:
    """Mean, median and 99th percentile of the decode steps in milliseconds, and how many there were."""
    decoding = sorted(taken for decodes, taken in steps if decodes)
    if not decoding:
        return {"mean_ms": None, "median_ms": None, "p99_ms": None, "steps": 0}
    return {
        "mean_ms": statistics.fmean(decoding),
        "median_ms": statistics.median(decoding),
        "p99_ms": decoding[min(len(decoding) - 1, int(0.99 * len(decoding)))],
        "steps": len(decoding),
    }


def main() -> None:
    """Read a job, run one request after another, print what attention took."""
    job = json.load(sys.stdin)
    from vllm import LLM, SamplingParams

    llm = LLM(**job["engine"], enforce_eager=True, worker_extension_cls=TIMER)
    options = SamplingParams(temperature=0, max_tokens=OUTPUT_TOKENS, ignore_eos=True)
    conversations = [[{"role": "user", "content": prompt}] for prompt in job["prompts"]]
    llm.chat(conversations[:1], options, use_tqdm=False)  # warm up before the timer is in place
    llm.collective_rpc("start_attention_timer")
    # one request at a time: each decode step is one request's
    tokens = [len(llm.chat([each], options, use_tqdm=False)[0].prompt_token_ids) for each in conversations]
    # [ranks][steps] of (whether it decoded, milliseconds): a step takes as long as its slowest rank
    ranks = llm.collective_rpc("attention_steps")
    slowest = [(step[0][0], max(taken for _, taken in step)) for step in zip(*ranks, strict=True)]
    print(RESULT, json.dumps({**summary(slowest), "context_tokens": round(statistics.fmean(tokens))}), flush=True)


if __name__ == "__main__":
    main()
