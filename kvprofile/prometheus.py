"""What a server says at its /metrics, as numbers by name. Imports prometheus_client only where something is parsed."""

from __future__ import annotations

import urllib.request
from collections.abc import Iterator
from http.client import HTTPException

from kvprofile.errors import InputError

TIMEOUT_S = 5.0
MOST_BYTES = 16 * 2**20
"""Of a page that are read; vLLM's has some 100 KiB."""


def scrape(url: str) -> str:
    """The text of the /metrics of a server at ``url``, with or without /v1. Raises OSError."""
    address = f"{url.rstrip('/').removesuffix('/v1')}/metrics"
    try:
        with urllib.request.urlopen(address, timeout=TIMEOUT_S) as answer:  # noqa: S310 - callers check for http(s)
            return str(answer.read(MOST_BYTES).decode("utf-8", "replace"))
    except (HTTPException, ValueError) as error:  # an answer that is not HTTP, an address that is not one
        raise OSError(f"{type(error).__name__}: {error}") from error


def metric_values(text: str) -> dict[str, float]:
    """Prometheus text as numbers by name, summed over labels; ``pool_blocks`` and ``block_tokens`` are vLLM's pool.

    ``replicas`` are the engines behind the server: under data parallelism each has a pool. vLLM then says the blocks of
    all pools at every engine, and ``vllm:kv_cache_usage_perc`` is the mean here.

    Raises ValueError for any other text, InputError where prometheus_client is not installed.
    """
    found: dict[str, float] = {}
    blocks: dict[str, float] = {}
    usage: dict[str, float] = {}
    for name, labels, value in _samples(text):
        engine = labels.get("engine", "")
        if name == "vllm:cache_config_info":
            if labels.get("num_gpu_blocks", "").isdecimal():
                blocks[engine] = float(labels["num_gpu_blocks"])
            if labels.get("block_size", "").isdecimal():
                found["block_tokens"] = float(labels["block_size"])
        elif name == "vllm:kv_cache_usage_perc":
            usage[engine] = max(usage.get(engine, 0.0), value)
        elif name == "kvprofile_kv_block_bytes":
            found[name] = max(found.get(name, 0.0), value)
        elif not name.endswith("_bucket"):
            found[name] = found.get(name, 0.0) + value
    if blocks:
        found |= {"pool_blocks": max(blocks.values()), "replicas": len(blocks)}
    if usage:
        found["vllm:kv_cache_usage_perc"] = sum(usage.values()) / len(usage)
    return found


def labels_of(text: str, name: str) -> list[dict[str, str]]:
    """The labels of each series of that name. Raises as ``metric_values``."""
    return [labels for found, labels, _ in _samples(text) if found == name]


def _samples(text: str) -> Iterator[tuple[str, dict[str, str], float]]:
    try:
        from prometheus_client.parser import text_string_to_metric_families
    except ImportError:
        raise InputError("reading /metrics needs prometheus-client: pip install 'kvprofile[bench]'") from None

    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            yield sample.name, dict(sample.labels), float(sample.value)
