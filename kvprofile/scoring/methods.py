"""The scoring methods by name: which statistic ranks heads, and what beyond the reconstruction scores it costs.

Every method computes token scores, so every profile holds max, mean and p99: KVzip's, but for ``kvzip-plus``, which
weighs them. Loss-aware methods add ``loss``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kvprofile.budget.profile import Geometry

GATE_STEPS = 4
"""Openings of all gates (1, 3/4, 1/2, 1/4) at which the slope of the loss is taken."""


@dataclass(frozen=True)
class Method:
    """A way to rank heads: its statistic in the profile, and one line on what it is.

    ``weighs``: its token scores are attention times what the value adds to the layer's output.
    """

    statistic: str
    summary: str
    weighs: bool = False

    @property
    def token_score(self) -> str:
        """What the method's token scores are, to which the probe is fitted."""
        return "x / (1 + x) of KVzip+" if self.weighs else "KVzip score"

    @property
    def loss_aware(self) -> bool:
        """Whether it differentiates or measures the reconstruction loss."""
        return self.statistic == "loss"

    @property
    def needs_modules(self) -> bool:
        """Whether it needs gates, gradients or weights inside the model, which vLLM does not give."""
        return self.loss_aware or self.weighs


METHODS = {
    "gate": Method("loss", "slope of the reconstruction loss along closing gates, one backward pass for each opening"),
    "kvzip": Method("max", "largest attention that a context token gets while the context is repeated (KVzip)"),
    "kvzip-mean": Method("mean", "the same, the mean over context tokens: it does not saturate"),
    "kvzip-plus": Method(
        "max", "largest attention times length of what the value adds, over that of the row (KVzip+)", weighs=True
    ),
    "ablation": Method("loss", "rise of the reconstruction loss when one head alone is trimmed: exact and slow"),
}


def repeats_read(method: str, geometry: Geometry) -> int:
    """How often a loss-aware method reads every repeat, for progress bars; 0 where it reads none."""
    heads = len(geometry.profiled_layers) * geometry.kv_heads
    return {"gate": GATE_STEPS, "ablation": heads + 1}.get(method, 0)
