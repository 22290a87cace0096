"""The parent process's part: find the budget, refuse what cannot be served, and hand the budget to all processes.

Everything that can be refused is refused here, before any worker starts, as one line that vLLM's own error path prints.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from vllm.platforms import current_platform

from kvprofile.runtime import metrics, stats
from kvprofile.runtime.budget import CONFIG_KEY
from kvprofile.runtime.find import Served, find
from kvprofile.runtime.permute import LOAD_FORMATS
from kvprofile.runtime.settings import PREFIX, from_environment, logger

TESTED_PLATFORMS = ("cpu",)

ALIBI_MODELS, SINK_MODELS = ("bloom", "mpt", "baichuan"), ("gpt_oss",)
"""Known by name here, so that the refusal is one line; ``layer`` refuses whatever else has such heads."""


def configuring(stock: Callable[..., Any]) -> Callable[..., Any]:
    """``EngineArgs.create_engine_config`` that adds the budget to the configuration.

    Raises ValueError, or kvprofile's InputError for broken files, where this engine cannot serve with a budget.
    """

    def create_engine_config(self: Any, *args: Any, **kwargs: Any) -> Any:
        config = stock(self, *args, **kwargs)
        settings = from_environment(os.environ)
        found = list(_unsupported(config))
        if not settings.allow_untested:
            found += _untested(config)
        if found:
            raise ValueError(f"kvprofile does not serve with {'; '.join(found)}")
        budget, origin = find(settings, _served(config))
        budget = replace(budget, permute_weights=_may_permute(config))
        stats.share()
        metrics.show(budget)
        config.additional_config = {**config.additional_config, CONFIG_KEY: budget.as_config()}
        logger.info("kvprofile: %d of %d KV heads are full, from %s", budget.full, budget.heads, origin)
        return config

    return create_engine_config


def _may_permute(config: Any) -> bool:
    """Whether weights arrive one by one, and nothing is added to them later that does not know their order."""
    return config.load_config.load_format in LOAD_FORMATS and config.lora_config is None


def refusing_streams(stock: Callable[..., Any]) -> Callable[..., Any]:
    """``InputProcessor.process_inputs`` that refuses streaming input, whose prompt grows after the trim."""

    def process_inputs(self: Any, *args: Any, resumable: bool = False, **kwargs: Any) -> Any:
        if resumable:
            raise ValueError("kvprofile does not serve streaming input: its prompt would grow after the trim")
        return stock(self, *args, resumable=resumable, **kwargs)

    return process_inputs


def _served(config: Any) -> Served:
    model = config.model_config
    served = model.served_model_name
    names = [model.model, *(served if isinstance(served, list) else [served])]
    return Served(
        names=tuple(dict.fromkeys(name for name in names if name)),
        layers=model.model_arch_config.total_num_hidden_layers,
        attention_heads=model.model_arch_config.total_num_attention_heads,
        kv_heads=model.get_total_num_kv_heads(),
        head_size=model.get_head_size(),
        tensor_parallel_size=config.parallel_config.tensor_parallel_size,
    )


def _unsupported(config: Any) -> Iterator[str]:
    """What the runtime would serve wrongly, each as a phrase."""
    model, parallel, scheduler = config.model_config, config.parallel_config, config.scheduler_config
    text = model.hf_text_config
    quantised = config.cache_config.cache_dtype not in ("auto", "float16", "bfloat16", "float32")
    reasons = {
        "multi-head latent attention (MLA)": model.use_mla,
        "a model that is no decoder": model.runner_type != "generate" or model.is_encoder_decoder,
        "a model without attention": model.is_attention_free,
        "a model with Mamba layers": model.is_hybrid,
        "ALiBi": text.model_type in ALIBI_MODELS or getattr(text, "alibi", False),
        "learned attention sinks": text.model_type in SINK_MODELS,
        "layers that share caches": bool(getattr(text, "num_kv_shared_layers", 0)),
        "reference sliding-window attention": model.rswa_window is not None,
        "bidirectional attention inside images": model.is_mm_prefix_lm,
        f"the quantised KV cache {config.cache_config.cache_dtype}": quantised,
        "speculative decoding": config.speculative_config is not None,
        "a KV connector": config.kv_transfer_config is not None,
        "context parallelism": parallel.decode_context_parallel_size > 1 or parallel.prefill_context_parallel_size > 1,
        "hierarchical sparse attention": config.attention_config.hisparse_config is not None,
        "shared KV layers in prefill (kv_sharing_fast_prefill)": config.cache_config.kv_sharing_fast_prefill,
        "scheduler_reserve_full_isl off, which hides where prefill ends": not scheduler.scheduler_reserve_full_isl,
        "an additional_config that is no dictionary": not isinstance(config.additional_config, dict),
    }
    yield from (reason for reason, holds in reasons.items() if holds)


def _untested(config: Any) -> Iterator[str]:
    """What may well work but has not been tried, each as a phrase with the way around it."""
    parallel = config.parallel_config
    reasons = {
        f"platform {current_platform.device_type} (tested: {', '.join(TESTED_PLATFORMS)})": (
            current_platform.device_type not in TESTED_PLATFORMS
        ),
        "pipeline parallelism": parallel.pipeline_parallel_size > 1,
        "data parallelism": parallel.data_parallel_size > 1,
        "overlapped micro-batches": parallel.use_ubatching,
        "LoRA adapters": config.lora_config is not None,
        "several modalities": config.model_config.is_multimodal_model,
    }
    for reason, holds in reasons.items():
        if holds:
            yield f"{reason}, unless {PREFIX}ALLOW_UNTESTED=1"
