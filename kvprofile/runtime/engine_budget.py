"""The budget as vLLM's processes share it: which share of the context each KV head keeps, and how each rank sees that.

The parent process puts it into ``VllmConfig.additional_config``, which travels to every worker and is part of the key
of torch.compile's cache, so no process reads another file and no two budgets share a compiled graph. Where the budget
comes from is ``find``'s business. Standard library only.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from kvprofile.budget.trim import DEFAULT_WINDOW, GRADED, WHOLE

CONFIG_KEY = "kvprofile"


@dataclass(frozen=True)
class RankHeads:
    """KV heads of one layer on one rank, counted from the rank's ``first`` one: by the share that they keep.

    Shares come largest first, heads in rising order.
    """

    first: int
    by_share: Mapping[float, tuple[int, ...]]


@dataclass(frozen=True)
class EngineBudget:
    """Share of the context between sinks and window that each KV head keeps, [L][G] in the model's own numbering.

    None for layers that stay as they are: they slide, or keep a state. A budget with shares between 0 and 1 is graded,
    and has a ``probe`` that chooses their tokens: the bytes of its file, in base 64. ``permute_weights``: projections
    may load their heads part by part, which spares gathering them at every step.
    """

    shares: tuple[tuple[float, ...] | None, ...]
    sink_tokens: int
    recent_tokens: int
    window: str = DEFAULT_WINDOW
    probe: str | None = None
    permute_weights: bool = False

    @classmethod
    def of(cls, additional_config: object) -> EngineBudget:
        """The budget in a ``VllmConfig.additional_config``. Raises ValueError where there is none."""
        found = additional_config.get(CONFIG_KEY) if isinstance(additional_config, Mapping) else None
        if found is None:
            raise ValueError(
                "kvprofile is enabled but this engine's configuration carries no budget; create it with EngineArgs"
            )
        rows = tuple(None if row is None else tuple(row) for row in found["shares"])
        return cls(**{**found, "shares": rows})

    def as_config(self) -> dict[str, Any]:
        """What goes into ``additional_config``, JSON types only."""
        return asdict(self) | {"shares": [None if row is None else list(row) for row in self.shares]}

    @property
    def kind(self) -> str:
        """Whole, or graded where a head keeps a part of the context."""
        return GRADED if any(0.0 < share < 1.0 for share in self._all()) else WHOLE

    @property
    def profiled_layers(self) -> tuple[int, ...]:
        """Layers with full attention, whose heads have budgets."""
        return tuple(layer for layer, row in enumerate(self.shares) if row is not None)

    @property
    def heads(self) -> int:
        """KV heads that have budgets, full or trimmed."""
        return sum(1 for _ in self._all())

    @property
    def full(self) -> int:
        """KV heads that keep the whole context."""
        return sum(share == 1.0 for share in self._all())

    @property
    def retention(self) -> float:
        """Mean share that the heads keep."""
        return sum(self._all()) / self.heads

    def _all(self) -> Iterator[float]:
        return (share for row in self.shares if row is not None for share in row)

    def on_rank(self, layer: int, rank: int, size: int) -> RankHeads | None:
        """Heads of a layer on one of ``size`` tensor-parallel ranks, dealt as vLLM deals them; None if it slides.

        With more ranks than KV heads each rank holds one head, which several ranks share.
        """
        row = self.shares[layer]
        if row is None:
            return None
        first = rank * len(row) // size
        own = row[first : first + max(1, len(row) // size)]
        return RankHeads(
            first,
            {
                share: tuple(head for head, mine in enumerate(own) if mine == share)
                for share in sorted(set(own), reverse=True)
            },
        )

    def uneven_layer(self, size: int) -> int | None:
        """The first layer of which not every one of ``size`` ranks holds the same shares, None if there is none."""
        for layer in self.profiled_layers:
            held = [self.on_rank(layer, rank, size) for rank in range(size)]
            counts = {tuple((share, len(found)) for share, found in each.by_share.items()) for each in held if each}
            if len(counts) > 1:
                return layer
        return None

    def trimmed_heads_per_rank(self, size: int) -> int:
        """KV heads that give something up, on each of ``size`` ranks."""
        found = [self.on_rank(layer, 0, size) for layer in self.profiled_layers]
        return sum(len(heads) for each in found if each for share, heads in each.by_share.items() if share < 1.0)
