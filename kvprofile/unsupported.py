"""What kvprofile cannot work with in a vLLM engine, whether it serves or scores there, by name.

``runtime.configure`` and ``capture.refuse`` add what only one of them cannot. Imports nothing of vLLM.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

PLAIN_CACHES = ("auto", "float16", "bfloat16", "float32")
"""Values of vLLM's ``kv_cache_dtype`` with which keys and values are stored as they are."""


def of_config(config: Any, caches: Collection[str]) -> dict[str, bool]:
    """By phrase, whether it holds of a ``VllmConfig``; ``caches`` are the dtypes of caches that are handled."""
    model, parallel, cache = config.model_config, config.parallel_config, config.cache_config
    return {
        "multi-head latent attention (MLA)": model.use_mla,
        "a model that is not a decoder": model.runner_type != "generate" or model.is_encoder_decoder,
        "a model without attention": model.is_attention_free,
        "reference sliding-window attention": model.rswa_window is not None,
        f"the quantised KV cache {cache.cache_dtype}": cache.cache_dtype not in caches,
        "speculative decoding": config.speculative_config is not None,
        "a KV connector": config.kv_transfer_config is not None,
        "context parallelism": parallel.decode_context_parallel_size > 1 or parallel.prefill_context_parallel_size > 1,
        "shared KV layers in prefill (kv_sharing_fast_prefill)": cache.kv_sharing_fast_prefill,
    }


def holding(reasons: Mapping[str, object]) -> list[str]:
    """The phrases that hold, in their order."""
    return [reason for reason, holds in reasons.items() if holds]
