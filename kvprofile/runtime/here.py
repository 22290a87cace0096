"""What the code that serves depends on, of an engine that is being made: the key of an attestation, and its refusals.

The process that configures the engine knows most of it. Which attention backend each worker chose, on which device,
and how many tokens a block has in the end, only the workers know, so what was attested of these travels to them in
``VllmConfig.additional_config``.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import vllm
from vllm.platforms import current_platform

from kvprofile.environment import PREFIX
from kvprofile.errors import InputError
from kvprofile.runtime import attestation, metrics
from kvprofile.runtime.engine_budget import EngineBudget

ATTESTED = "kvprofile_attested"
"""In ``additional_config`` where a platform is attested: path, device, pairs of attention backend and block size."""

TO_DO = "run 'kvprofile verify MODEL' on this machine"


def of_config(config: Any, model: str, budget: EngineBudget) -> dict[str, str | int]:
    """Of a key what is known before any worker starts; ``model`` is the name in the budget file."""
    compilation = config.compilation_config
    return {
        **of_machine(),
        "model": model,
        "budget": metrics.identity(budget),
        "kind": budget.kind,
        "window": budget.window,
        "model_runner": "V2" if config.use_v2_model_runner else "V1",
        "dtype": str(config.model_config.dtype).removeprefix("torch."),
        "kv_cache_dtype": str(config.cache_config.cache_dtype),
        "quantization": str(config.model_config.quantization or "none"),
        "head_order": "loaded" if budget.permute_weights else "gathered",
        "head_size": int(config.model_config.get_head_size()),
        "tensor_parallel_size": int(config.parallel_config.tensor_parallel_size),
        "graphs": f"{_name(compilation.mode)}, {_name(compilation.cudagraph_mode)}",
    }


def of_machine() -> dict[str, str | int]:
    """Of a key what is known without an engine."""
    return {
        "runtime": attestation.runtime_sha256(),
        "vllm": vllm.__version__,
        "torch": torch.__version__,
        "platform": current_platform.device_type,
        "device": device(),
        "driver": driver(),
    }


def of_worker(worker: Any) -> dict[str, str | int]:
    """Of a key what a worker knows once its caches are there."""
    return of_runner(worker.model_runner)


def of_runner(runner: Any) -> dict[str, str | int]:
    """The same of a worker's model runner."""
    layers = runner.vllm_config.compilation_config.static_forward_context
    names = {layer.attn_backend.get_name() for layer in layers.values() if hasattr(layer, "budget")}
    sizes = {group.kv_cache_spec.block_size for group in runner.kv_cache_config.kv_cache_groups}
    return {
        "attention_backend": "+".join(sorted(names)),
        "block_size": int(min(sizes)),
        "device": device(),
    }


def device() -> str:
    """The name of this process's device."""
    index = torch.cuda.current_device() if current_platform.is_cuda_alike() and torch.cuda.is_initialized() else 0  # type: ignore[no-untyped-call]
    return str(current_platform.get_device_name(index))


def driver() -> str:
    """The driver of the device, and what torch was built for."""
    if current_platform.is_cuda():
        from vllm.third_party import pynvml

        pynvml.nvmlInit()
        try:
            return f"{pynvml.nvmlSystemGetDriverVersion()}, CUDA {torch.version.cuda}"
        finally:
            pynvml.nvmlShutdown()
    hip = getattr(torch.version, "hip", None)
    return f"HIP {hip}" if hip else "none"


def attested(config: Any, budget_file: Path, model: str, budget: EngineBudget, what: str) -> dict[str, Any]:
    """What workers are to check, where an attestation next to the budget file is about this engine.

    Raises ValueError, one line, where none is; ``what`` says what would have to be attested.
    """
    path = attestation.path_of(budget_file)
    try:
        found = attestation.holding(path, of_config(config, model, budget))
    except InputError as error:
        raise ValueError(
            f"kvprofile does not serve with {what}: {error}; {TO_DO}, or set {PREFIX}ALLOW_UNTESTED=platform"
        ) from error
    pairs = [[each.key[name] for name in attestation.CHECKED_IN_WORKERS] for each in found]
    return {"path": str(path), "device": device(), "pairs": pairs}


def require_attested(additional_config: Mapping[str, Any], backend: str, block_size: int | None = None) -> None:
    """Raise ValueError, one line, in a worker that is not as attested; without ``block_size`` that is not known yet."""
    found = additional_config.get(ATTESTED)
    if found is None:
        return
    differs = []
    if device() != found["device"]:
        differs.append(f"device is {device()}, attested is {found['device']}")
    backends = sorted({name for name, _ in found["pairs"]})
    sizes = sorted({size for name, size in found["pairs"] if name == backend})
    if backend not in backends:
        differs.append(f"attention_backend is {backend}, attested is {' or '.join(backends)}")
    elif block_size is not None and block_size not in sizes:
        differs.append(f"block_size is {block_size}, attested is {' or '.join(map(str, sizes))}")
    if differs:
        raise ValueError(f"kvprofile does not serve here: {found['path']} does not hold: {', '.join(differs)}; {TO_DO}")


def require_attested_caches(runner: Any) -> None:
    """As ``require_attested``, once a model runner has its caches, for their block size too."""
    additional = runner.vllm_config.additional_config
    if ATTESTED in (additional or ()):
        found = of_runner(runner)
        if found["attention_backend"]:  # a stage of a pipeline may have no layer with budgets
            require_attested(additional, str(found["attention_backend"]), int(found["block_size"]))


def _name(value: Any) -> str:
    return str(getattr(value, "name", value))
