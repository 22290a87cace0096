"""Results of SGLang's serving benchmark (sglang/benchmark/serving.py, 0.5.23; `python -m sglang.bench_serving`).

A file holds one line for each run, added to whatever it held. The tool names neither the model nor its own release nor
how many requests it sent, so failures are known only from the details (``--output-details``).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kvprofile.records.foreign import (
    CHAT,
    COMPLETIONS,
    DATASET,
    ENDPOINT,
    INPUT_ASKED,
    OUTPUT_ASKED,
    UNKNOWN_MODEL,
    ResultFormat,
    at,
    make_record,
    measured,
    metrics,
    name_of,
    numbers,
    scaled,
    without_folders,
)
from kvprofile.records.record import Leg, Request, RunRecord

TOOL = "sglang.bench_serving"

_KEYS = {"backend", "dataset_name", "request_rate", "duration", "completed", "total_throughput", "mean_e2e_latency_ms"}
_ENDPOINTS = {
    **dict.fromkeys(("vllm", "lmdeploy", "sglang-oai"), COMPLETIONS),
    **dict.fromkeys(("vllm-chat", "lmdeploy-chat", "sglang-oai-chat"), CHAT),
}
"""Backends that send OpenAI requests."""

_SAME = (
    *("duration", "completed", "total_input_tokens", "total_output_tokens", "request_throughput"),
    *("output_throughput",),
    *(f"{statistic}_{name}_ms" for statistic in ("mean", "median", "p99") for name in ("ttft", "tpot", "itl")),
)
"""Metrics that have the same name and unit in a run record."""


class SGLangServing(ResultFormat):
    """Files of `--output-file`: a JSON object a line."""

    tool = TOOL

    def recognises(self, raw: Any) -> bool:
        """A run, or several below each other."""
        runs = raw if isinstance(raw, list) else [raw]
        return bool(runs) and all(isinstance(each, Mapping) and each.keys() >= _KEYS for each in runs)

    def to_record(self, raw: Any, name: str) -> RunRecord:
        """A record of one leg for each line; lines of one load are repetitions."""
        runs = raw if isinstance(raw, list) else [raw]
        loads = [_load_words(run) for run in runs]
        legs: list[Leg] = []
        for run, words in zip(runs, loads, strict=True):
            own = run.get("tag") or (f"{name} {words}" if len(set(loads)) > 1 else name)
            leg = _leg(run, name_of(own))
            legs.append(leg.model_copy(update={"repetition": sum(earlier.name == leg.name for earlier in legs)}))
        first = runs[0]
        random = str(first["dataset_name"]).startswith(("random", "image"))
        settings = {
            ENDPOINT: _ENDPOINTS.get(str(first["backend"]), first["backend"]),
            DATASET: first["dataset_name"],
            INPUT_ASKED: first.get("random_input_len") if random else None,
            OUTPUT_ASKED: first.get("random_output_len") if random else None,
            "backend": first["backend"],
            "random_range_ratio": first.get("random_range_ratio") if random else None,
        }
        return make_record(TOOL, legs, settings)


FORMAT = SGLangServing()


def _load_words(run: Mapping[str, Any]) -> str:
    """What makes two lines of one file two legs."""
    words = [f"rate {run['request_rate']}"]
    words += [f"concurrency {run['max_concurrency']}"] if run.get("max_concurrency") is not None else []
    words += [f"{run.get('random_input_len')}/{run.get('random_output_len')}", str(run["dataset_name"])]
    return " ".join(words)


def _leg(run: Mapping[str, Any], name: str) -> Leg:
    rate = run["request_rate"]
    open_ = isinstance(rate, (int, float))
    errors = numbers(run.get("errors"))
    failed = sum(bool(error) for error in errors) if errors else None
    found = {key: run.get(key) for key in _SAME} | {
        "failed": failed,
        "total_token_throughput": run.get("total_throughput"),
        **{f"{each}_e2el_ms": run.get(f"{each}_e2e_latency_ms") for each in ("mean", "median", "p99")},
    }
    return Leg.model_validate(
        {
            "name": name,
            "kind": None,
            "status": "ok",
            "model": without_folders(at(run, "server_info", "model_path")) or UNKNOWN_MODEL,
            "load": {
                "mode": "unknown" if rate == "trace" else "open" if open_ else "closed",
                "concurrency": run.get("max_concurrency"),
                "request_rate": rate if open_ else None,
                "requests": len(errors) or None,
                "description": "as sglang.bench_serving sent it",
            },
            "metrics": metrics(found),
            "requests": _requests(run),
            "warnings": _warnings(run),
        }
    )


def _warnings(run: Mapping[str, Any]) -> list[str]:
    """A benchmark that does not ask the server for its count takes the length that it asked for as the answer's."""
    stated, counted = run.get("total_output_tokens"), run.get("total_output_tokens_retokenized")
    if not isinstance(stated, int) or not isinstance(counted, int) or stated == counted:
        return []
    return [
        f"output tokens are as many as were asked for, where the server's stream does not count them: {stated:,}; "
        f"the client's tokenizer finds {counted:,} in the answers"
    ]


def _requests(run: Mapping[str, Any]) -> list[Request]:
    """One row for each request, where the tool was asked for them (--output-details)."""
    rows = []
    for number, error in enumerate(numbers(run.get("errors"))):
        good = not error
        gaps = numbers(at(run, "itls", number))
        rows.append(
            Request.model_validate(
                {
                    "output": at(run, "generated_texts", number),
                    "error": error or None,
                    "ttft_ms": scaled(measured(at(run, "ttfts", number)), 1000) if good else None,
                    "itl_ms": [scaled(gap, 1000) for gap in gaps] if good else None,
                    "input_tokens": at(run, "input_lens", number),
                    "output_tokens": at(run, "output_lens", number),
                }
            )
        )
    return rows
