"""Every function of vLLM and its libraries that is replaced, in one list; PATCHES.md says why.

Nothing is replaced before ``install``.
"""

from __future__ import annotations

from prometheus_client.multiprocess import MultiProcessCollector
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.model_loader.base_loader import BaseModelLoader
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine.input_processor import InputProcessor
from vllm.v1.worker.gpu.model_runner import GPUModelRunner as GPUModelRunnerV2
from vllm.v1.worker.gpu_model_runner import GPUModelRunner

from kvprofile.runtime import backend, configure, grouping, layer, metrics, moves, permute, stream_cache
from kvprofile.runtime.patching import Patch

try:
    from vllm.v1.core import kv_cache_planning
except ImportError:  # before 0.33
    from vllm.v1.core import kv_cache_utils as kv_cache_planning

PATCHES = (
    Patch(EngineArgs, "create_engine_config", configure.configuring),
    Patch(InputProcessor, "process_inputs", configure.refusing_streams),
    Patch(Attention, "__init__", layer.splitting),
    Patch(BaseModelLoader, "create_model", permute.permuting),
    Patch(kv_cache_planning, "get_kv_cache_groups", grouping.budgeted),
    Patch(Scheduler, "schedule", moves.carrying),
    Patch(GPUModelRunner, "initialize_kv_cache", moves.preparing),
    Patch(GPUModelRunnerV2, "initialize_kv_cache", moves.preparing),
    Patch(GPUModelRunner, "_update_states", moves.moving),
    Patch(GPUModelRunnerV2, "update_requests", moves.moving_v2),
    Patch(GPUModelRunner, "_build_attention_metadata", backend.noting_rows),
    Patch(GPUModelRunnerV2, "prepare_attn", backend.noting_rows_v2),
    Patch(MultiProcessCollector, "collect", metrics.joining),
)

_installed: list[Patch] = []


def install(*, poison: bool) -> None:
    """Register the cache spec and apply all patches, once in this process; ``poison`` adds those for debugging."""
    if _installed:
        return
    stream_cache.register()
    wanted = list(PATCHES)
    if poison:
        from kvprofile.runtime import poison as debugging

        wanted += debugging.PATCHES
    for patch in wanted:
        patch.apply()
        _installed.append(patch)
