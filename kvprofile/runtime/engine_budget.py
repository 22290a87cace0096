"""The budget as vLLM's processes share it: which KV heads are full, by layer, and how each rank sees that.

The parent process puts it into ``VllmConfig.additional_config``, which travels to every worker and is part of the key
of torch.compile's cache, so no process reads another file and no two budgets share a compiled graph. Where the budget
comes from is ``find``'s business. Standard library only.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from kvprofile.budget.trim import DEFAULT_WINDOW

CONFIG_KEY = "kvprofile"


@dataclass(frozen=True)
class RankHeads:
    """KV heads of one layer on one rank, counted from the rank's first: those that keep all, and those trimmed."""

    full: tuple[int, ...]
    stream: tuple[int, ...]


@dataclass(frozen=True)
class EngineBudget:
    """Full KV heads by layer, in the model's own numbering; None for layers that stay as they are: they
    slide, or keep a state.

    ``permute_weights``: projections may load their heads half by half, which spares gathering them at every step.
    """

    full_heads: tuple[tuple[int, ...] | None, ...]
    kv_heads: int
    sink_tokens: int
    recent_tokens: int
    window: str = DEFAULT_WINDOW
    permute_weights: bool = False

    @classmethod
    def of(cls, additional_config: object) -> EngineBudget:
        """The budget in a ``VllmConfig.additional_config``. Raises ValueError where there is none."""
        found = additional_config.get(CONFIG_KEY) if isinstance(additional_config, Mapping) else None
        if found is None:
            raise ValueError(
                "kvprofile is enabled but this engine's configuration carries no budget; create it with EngineArgs"
            )
        rows = tuple(None if row is None else tuple(row) for row in found["full_heads"])
        return cls(**{**found, "full_heads": rows})

    def as_config(self) -> dict[str, Any]:
        """What goes into ``additional_config``, JSON types only."""
        return asdict(self) | {"full_heads": [None if row is None else list(row) for row in self.full_heads]}

    @property
    def profiled_layers(self) -> tuple[int, ...]:
        """Layers with full attention, whose heads have budgets."""
        return tuple(layer for layer, row in enumerate(self.full_heads) if row is not None)

    @property
    def heads(self) -> int:
        """KV heads that have budgets, full or trimmed."""
        return len(self.profiled_layers) * self.kv_heads

    @property
    def full(self) -> int:
        """KV heads that keep the whole context."""
        return sum(len(row) for row in self.full_heads if row is not None)

    def on_rank(self, layer: int, rank: int, size: int) -> RankHeads | None:
        """Heads of a layer on one of ``size`` tensor-parallel ranks, dealt as vLLM deals them; None if it slides.

        With more ranks than KV heads each rank holds one head, which several ranks share.
        """
        row = self.full_heads[layer]
        if row is None:
            return None
        count = max(1, self.kv_heads // size)
        first = rank * self.kv_heads // size
        local = range(count)
        return RankHeads(
            tuple(head for head in local if first + head in row),
            tuple(head for head in local if first + head not in row),
        )

    def uneven_layer(self, size: int) -> int | None:
        """The first layer whose full heads are not dealt evenly over ``size`` ranks, None if all are."""
        for layer in self.profiled_layers:
            counts = {len(heads.full) for rank in range(size) if (heads := self.on_rank(layer, rank, size)) is not None}
            if len(counts) > 1:
                return layer
        return None

    def stream_heads_per_rank(self, size: int) -> int:
        """Trimmed KV heads that each of ``size`` ranks holds."""
        found = [self.on_rank(layer, 0, size) for layer in self.profiled_layers]
        return sum(len(heads.stream) for heads in found if heads is not None)
