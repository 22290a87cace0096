"""What capturing cannot do with an engine, found from its configuration, each as a phrase."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from kvprofile.capture import WORKER

TESTED_VERSIONS = ("0.32.0",)
TESTED_BACKENDS = ("CPU_ATTN",)


def problems(config: Any) -> Iterator[str]:
    """Reasons not to open a session on an engine of this ``VllmConfig``."""
    model, parallel, cache = config.model_config, config.parallel_config, config.cache_config
    reasons = {
        f"an engine started without worker_extension_cls={WORKER!r}": parallel.worker_extension_cls != WORKER,
        "multi-head latent attention (MLA), which has no per-head cache": model.use_mla,
        "a model that is no decoder": model.runner_type != "generate" or model.is_encoder_decoder,
        "a model without attention": model.is_attention_free,
        "a model with Mamba layers": model.is_hybrid,
        "a model of several modalities": model.is_multimodal_model,
        "reference sliding-window attention": model.rswa_window is not None,
        "speculative decoding": config.speculative_config is not None,
        f"the quantised KV cache {cache.cache_dtype}": cache.cache_dtype not in _PLAIN_CACHES,
        "a KV connector": config.kv_transfer_config is not None,
        "context parallelism": parallel.decode_context_parallel_size > 1 or parallel.prefill_context_parallel_size > 1,
        "data parallelism": parallel.data_parallel_size > 1,
        "overlapped micro-batches": parallel.use_ubatching,
        "shared KV layers in prefill (kv_sharing_fast_prefill)": cache.kv_sharing_fast_prefill,
        "budgets in force (unset LLM_KVZIP_ENABLED)": "kvprofile" in (config.additional_config or {}),
    }
    yield from (reason for reason, holds in reasons.items() if holds)


_PLAIN_CACHES = ("auto", "float16", "bfloat16", "float32")
