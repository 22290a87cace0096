"""The parent process's part: find the budget, refuse what cannot be served, and hand the budget to all processes.

Everything that can be refused is refused here, before any worker starts, as one line that vLLM's own error path prints.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import vllm
from vllm.platforms import current_platform

from kvprofile import unsupported
from kvprofile.budget.dtypes import FLOAT8_NAMES
from kvprofile.budget.trim import GRADED
from kvprofile.environment import PREFIX
from kvprofile.runtime import here, metrics, stats
from kvprofile.runtime.backend import SERVED_CACHES, blocks_refused
from kvprofile.runtime.engine_budget import CONFIG_KEY
from kvprofile.runtime.find import Served, file_of, find, model_name
from kvprofile.runtime.permute import LOAD_FORMATS
from kvprofile.runtime.settings import STATE_RELEASE, from_environment, logger, release_of

TESTED_PLATFORMS = ("cpu",)

ALIBI_MODELS, SINK_MODELS = ("bloom", "mpt", "baichuan"), ("gpt_oss",)
"""Known by name here, so that the refusal is one line; ``layer`` refuses whatever else has such heads."""

BYPASS_MODELS = ("muse_spark", "muse_spark_text")
"""Types whose layers may write the cache before attention, which then is given no keys (vLLM 0.33)."""

DEFAULT_GROUPING = "DefaultKVCacheConfigBuilder"
"""Of vLLM's classes that put layers into cache groups: the one that a platform takes that has none of its own."""

STATE_MODELS = ("granitemoehybrid", "nemotron_h")
"""Types of models with layers that keep a state whose tokens were compared with transformers'."""


def configuring(stock: Callable[..., Any]) -> Callable[..., Any]:
    """``EngineArgs.create_engine_config`` that adds the budget to the configuration.

    Raises ValueError, or kvprofile's InputError for broken files, where this engine cannot serve with a budget.
    """

    def create_engine_config(self: Any, *args: Any, **kwargs: Any) -> Any:
        config = stock(self, *args, **kwargs)
        settings = from_environment(os.environ)
        found = _unsupported(config)
        if settings.poison and not can_poison(config):
            found.append(f"{PREFIX}POISON=1, which is for debugging on a CPU with model runner V1")
        untested = _untested(config)
        allowed = [what for name, what in untested.items() if name in settings.allow_untested]
        refused = {name: what for name, what in untested.items() if name not in settings.allow_untested}
        platform = refused.pop("platform", None)  # may be attested
        found += [f"{what}, unless {PREFIX}ALLOW_UNTESTED={name}" for name, what in refused.items()]
        if found:
            raise ValueError(f"kvprofile does not serve with {'; '.join(found)}")
        if allowed:
            logger.warning("kvprofile serves with what it was not tested with: %s", "; ".join(allowed))
        served = _served(config)
        budget, origin = find(settings, served)
        budget = replace(budget, permute_weights=_may_permute(config))
        ours: dict[str, Any] = {CONFIG_KEY: budget.as_config()}
        if platform is not None:
            path = file_of(settings, served)
            ours[here.ATTESTED] = here.attested(config, path, model_name(path) or "", budget, platform)
            logger.info("kvprofile: %s, attested in %s", platform, ours[here.ATTESTED]["path"])
        stats.share()
        metrics.show(budget, _engines(config.parallel_config))
        config.additional_config = {**config.additional_config, **ours}
        whole = f"{budget.full} of {budget.heads} KV heads are full"
        heads = f"{budget.heads} graded KV heads" if budget.kind == GRADED else whole
        logger.info("kvprofile: %s, from %s", heads, origin)
        return config

    return create_engine_config


def can_poison(config: Any) -> bool:
    """Whether freed blocks can be filled with NaN. Model runner V2 would take their marked numbers for other blocks."""
    return current_platform.device_type == "cpu" and not config.use_v2_model_runner


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


def _engines(parallel: Any) -> range:
    """The replicas of this machine, by the numbers that vLLM's own metrics have."""
    first = parallel.data_parallel_index
    return range(first, first + max(1, parallel.data_parallel_size_local))


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


def _unsupported(config: Any) -> list[str]:
    """What the runtime would serve wrongly, each as a phrase."""
    model, text = config.model_config, config.model_config.hf_text_config
    reasons = {
        **unsupported.of_config(config, SERVED_CACHES),
        "layers whose cache is not quantised like the others' (kv_cache_dtype_skip_layers)": bool(
            getattr(config.cache_config, "kv_cache_dtype_skip_layers", ())
        ),
        "8-bit floats of a kind of their own (fnuz)": (
            config.cache_config.cache_dtype in FLOAT8_NAMES and current_platform.is_fp8_fnuz()
        ),
        "ALiBi": text.model_type in ALIBI_MODELS or getattr(text, "alibi", False),
        "learned attention sinks": text.model_type in SINK_MODELS,
        "layers that share caches": bool(getattr(text, "num_kv_shared_layers", 0)),
        "prefix caching of a model with layers that keep a state; add --no-enable-prefix-caching": (
            model.is_hybrid and config.cache_config.enable_prefix_caching
        ),
        "overlapped micro-batches, whose rows do not say where their prompts end": config.parallel_config.use_ubatching,
        "bidirectional attention inside images": model.is_mm_prefix_lm,
        "layers that write their cache before attention": text.model_type in BYPASS_MODELS,
        f"a model that groups its caches itself ({text.model_type})": getattr(
            model, "supports_kv_cache_grouping", False
        ),
        f"platform {current_platform.device_type}, which groups caches in its own way": _groups_itself(config),
        **_blocks_refused(config),
        "hierarchical sparse attention": config.attention_config.hisparse_config is not None,
        "scheduler_reserve_full_isl off, which hides where prefill ends": (
            not config.scheduler_config.scheduler_reserve_full_isl
        ),
        "--disable-hybrid-kv-cache-manager, because trimmed heads need cache groups of their own": (
            config.scheduler_config.disable_hybrid_kv_cache_manager
        ),
        "an additional_config that is not a dictionary": not isinstance(config.additional_config, dict),
    }
    return unsupported.holding(reasons)


def _groups_itself(config: Any) -> bool:
    """Whether the platform brings its own cache groups, as it may from vLLM 0.33 on."""
    named = getattr(current_platform, "get_kv_cache_config_builder_cls", None)
    return named is not None and not named(config).endswith(f".{DEFAULT_GROUPING}")


def _blocks_refused(config: Any) -> dict[str, bool]:
    """What an attention backend that was asked for by name says to the size of blocks; workers ask one that was not."""
    backend, block_tokens = config.attention_config.backend, config.cache_config.block_size
    if backend is None or block_tokens is None:
        return {}
    try:
        refused = blocks_refused(backend.get_class(), block_tokens)
    except ImportError:  # vLLM says so itself
        return {}
    return {refused: True} if refused else {}


def _untested(config: Any) -> dict[str, str]:
    """What may well work but has not been tried: a phrase for each, by its name in ``settings.UNTESTED``."""
    parallel, model = config.parallel_config, config.model_config
    kind, device = model.hf_text_config.model_type, current_platform.device_type
    found = {
        "platform": (
            f"platform {device} (tested: {', '.join(TESTED_PLATFORMS)})",
            device not in TESTED_PLATFORMS,
        ),
        "pipeline-parallelism": ("pipeline parallelism", parallel.pipeline_parallel_size > 1),
        "data-parallelism": (
            f"data parallelism of a mixture of experts, over Ray, or on another vLLM than {STATE_RELEASE}",
            parallel.data_parallel_size > 1
            and (
                model.is_moe or parallel.data_parallel_backend == "ray" or release_of(vllm.__version__) != STATE_RELEASE
            ),
        ),
        "lora": ("LoRA adapters", config.lora_config is not None),
        "modalities": ("several modalities", model.is_multimodal_model),
        "states": (
            f"layers that keep a state in a model of type {kind} (tested: {', '.join(STATE_MODELS)}, on vLLM "
            f"{STATE_RELEASE})",
            model.is_hybrid and (kind not in STATE_MODELS or release_of(vllm.__version__) != STATE_RELEASE),
        ),
    }
    return {name: what for name, (what, holds) in found.items() if holds}
