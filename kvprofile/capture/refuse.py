"""What capturing cannot do with an engine, found from its configuration, each as a phrase."""

from __future__ import annotations

from typing import Any

from kvprofile import unsupported
from kvprofile.capture import WORKER
from kvprofile.environment import ENABLED

TESTED_VERSIONS = ("0.32.0",)
"""Others are said in the run's reasons and not refused: what they do wrong the workers' own checks find."""

TESTED_BACKENDS = ("CPU_ATTN",)


def problems(config: Any) -> list[str]:
    """Reasons not to open a session on an engine of this ``VllmConfig``."""
    model, parallel = config.model_config, config.parallel_config
    return unsupported.holding(
        {
            f"an engine started without worker_extension_cls={WORKER!r}": parallel.worker_extension_cls != WORKER,
            **unsupported.of_config(config, unsupported.PLAIN_CACHES),
            "layers that keep a state (linear attention, Mamba, convolutions)": model.is_hybrid,
            "a model of several modalities": model.is_multimodal_model,
            "data parallelism": parallel.data_parallel_size > 1,
            "overlapped micro-batches": parallel.use_ubatching,
            f"budgets in force (unset {ENABLED})": "kvprofile" in (config.additional_config or {}),
        }
    )
