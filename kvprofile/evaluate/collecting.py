"""The cache that a simulation gives a model: keys and values pass through it, and states start each branch anew."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from transformers.cache_utils import CacheLayerMixin

from kvprofile.budget.profile import NO_CACHE
from kvprofile.scoring.state_layers import StatefulCache, StateLayer


class _Collecting(CacheLayerMixin, StateLayer):  # type: ignore[misc]
    """Hands new keys and values to the attention function unchanged; what is kept is the simulation's business."""

    is_sliding = False
    is_croppable = False

    def __init__(self, length: Callable[[], int], states: int) -> None:
        CacheLayerMixin.__init__(self)
        StateLayer.__init__(self, states)
        self.tokens_before = length

    def lazy_initialization(self, *_args: Any, **_kwargs: Any) -> None:
        """Nothing is allocated here."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_args: Any, **_kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The new keys and values."""
        return key_states, value_states

    def get_seq_length(self) -> int:
        """Tokens before the current ones."""
        return self.tokens_before()

    def get_max_length(self) -> int:
        """No bound of its own."""
        return -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(number of keys, position of the first); masks are never built from it."""
        return self.tokens_before() + query_length, 0


class CollectingCache(StatefulCache):
    """One layer for each of ``layer_types``, with ``states`` states; ``length`` tells the tokens read before."""

    def __init__(self, layer_types: Sequence[str], states: Sequence[int], length: Callable[[], int]) -> None:
        counts = states or [0] * len(layer_types)
        super().__init__(
            layers=[
                StateLayer(count) if kind == NO_CACHE else _Collecting(length, count)
                for kind, count in zip(layer_types, counts, strict=True)
            ]
        )

    def forget_states(self) -> None:
        """Start another context."""
        for layer in self.layers:
            layer.reset()

    def keep_states(self) -> None:
        """The context has been read: every branch starts from the states that it left."""
        for layer in self.layers:
            layer.keep()

    def start(self, count: int) -> None:
        """Start ``count`` rows after the context."""
        for layer in self.layers:
            layer.go_back(count)

    def pick(self, rows: Sequence[int]) -> None:
        """Go on with the states of these rows alone, in this order."""
        for layer in self.layers:
            layer.pick(rows)

    def steps(self, counts: Sequence[int]) -> Iterator[slice]:
        """Columns to read at once of padded rows of ``counts`` tokens each, so that no state takes in padding.

        Without states all columns are read at once. With them a step ends where a row ends; that row is read on with
        the others and gets the states of its end back after the last step.
        """
        width, start = max(counts), 0
        ended: list[tuple[list[int], list[Any]]] = []
        for stop in sorted({0, *counts}) if self.keeps_states else [width]:
            if stop > start:
                yield slice(start, stop)
                start = stop
            rows = [row for row, count in enumerate(counts) if count == stop < width]
            if rows:
                ended.append((rows, [layer.copied(rows) for layer in self.layers]))
        for rows, copies in ended:
            for layer, saved in zip(self.layers, copies, strict=True):
                layer.put_rows(saved, rows)
