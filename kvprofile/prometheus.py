"""What a server says at its /metrics, as numbers by name. Imports prometheus_client only where something is parsed."""

from __future__ import annotations

import urllib.request
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

    Raises ValueError for any other text, InputError where prometheus_client is not installed.
    """
    try:
        from prometheus_client.parser import text_string_to_metric_families
    except ImportError:
        raise InputError("reading /metrics needs prometheus-client: pip install 'kvprofile[bench]'") from None

    found: dict[str, float] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if sample.name == "vllm:cache_config_info":
                for name, label in (("pool_blocks", "num_gpu_blocks"), ("block_tokens", "block_size")):
                    if sample.labels.get(label, "").isdecimal():
                        found[name] = float(sample.labels[label])
            elif sample.name == "vllm:kv_cache_usage_perc":
                found[sample.name] = max(found.get(sample.name, 0.0), sample.value)
            elif not sample.name.endswith("_bucket"):
                found[sample.name] = found.get(sample.name, 0.0) + sample.value
    return found
