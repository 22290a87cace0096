"""A key-value cache that is allocated once, for the whole run of a document, and cut back by moving a cursor."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers.cache_utils import CacheLayerMixin

from kvprofile.budget.profile import FULL_ATTENTION, NO_CACHE
from kvprofile.scoring.state_layers import StatefulCache, StateLayer


class PreallocatedLayer(CacheLayerMixin, StateLayer):  # type: ignore[misc]
    """Keys and values [1, G, capacity, D] of a full-attention layer; readers get views of the filled part.

    ``states``: how many states the layer keeps besides.
    """

    is_sliding = False
    is_croppable = True

    def __init__(self, capacity: int, states: int = 0) -> None:
        CacheLayerMixin.__init__(self)
        StateLayer.__init__(self, states)
        self.capacity = capacity
        self.length = 0
        self.allocations = 0

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Allocate on the layer's device when its first keys arrive."""
        self.dtype, self.device = key_states.dtype, key_states.device
        batch, heads, _, key_size = key_states.shape
        self.keys = key_states.new_empty(batch, heads, self.capacity, key_size)
        self.values = value_states.new_empty(batch, heads, self.capacity, value_states.shape[-1])
        self.allocations += 1
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_args: Any, **_kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append [1, G, n, D] at the cursor; returns views [1, G, length, D]. Raises ValueError beyond the capacity."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        end = self.length + key_states.shape[-2]
        if end > self.capacity:
            raise ValueError(f"cache of {self.capacity} tokens cannot hold {end}")
        self.keys[:, :, self.length : end] = key_states
        self.values[:, :, self.length : end] = value_states
        self.length = end
        return self.keys[:, :, :end], self.values[:, :, :end]

    def cut_back(self, length: int) -> None:
        """Forget everything after the first ``length`` tokens; no key or value is copied."""
        self.length = length
        StateLayer.cut_back(self, length)

    def reset(self) -> None:
        """Forget everything but keep the memory for the next document."""
        self.length = 0
        StateLayer.reset(self)

    def get_seq_length(self) -> int:
        """Tokens seen so far."""
        return self.length

    def get_max_length(self) -> int:
        """Tokens the layer can hold."""
        return self.capacity

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(number of keys, position of the first) while ``query_length`` tokens are being added."""
        return self.length + query_length, 0

    def nbytes(self) -> int:
        """Bytes allocated."""
        tensors = (self.keys, self.values) if self.is_initialized else ()
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors) + StateLayer.nbytes(self)


class SlidingLayer(PreallocatedLayer):
    """A sliding-window layer: the last window - 1 tokens before the cursor, and room for one forward pass after them.

    Room is ``step_tokens``. Cutting back to where the last forward pass began loses nothing that a later token sees.
    """

    is_sliding = True

    def __init__(self, window: int, step_tokens: int, states: int = 0) -> None:
        super().__init__(window - 1 + step_tokens, states)
        self.window = window
        self.first = 0  # position of the first key in memory

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_args: Any, **_kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append after dropping what no new token can see; returns views [1, G, kept + new, D]."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        held = self.length - self.first
        surplus = held - (self.window - 1)
        if surplus > 0:
            self.keys[:, :, : held - surplus] = self.keys[:, :, surplus:held].clone()
            self.values[:, :, : held - surplus] = self.values[:, :, surplus:held].clone()
            self.first += surplus
            held -= surplus
        end = held + key_states.shape[-2]
        self.keys[:, :, held:end] = key_states
        self.values[:, :, held:end] = value_states
        self.length = self.first + end
        return self.keys[:, :, :end], self.values[:, :, :end]

    def cut_back(self, length: int) -> None:
        """Forget everything after position ``length``, which must be the point where the last forward pass began.

        Raises ValueError for one that has left the window.
        """
        if length < self.first:
            raise ValueError(f"position {length} has left the window")
        super().cut_back(length)

    def reset(self) -> None:
        """Forget everything but keep the memory."""
        super().reset()
        self.first = 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(number of keys, position of the first) while ``query_length`` tokens are being added."""
        first = max(self.first, self.length - self.window + 1)
        return self.length - first + query_length, first


class ReconstructionCache(StatefulCache):
    """The cache of one document: full layers hold every token, sliding layers their window, others a state.

    ``states`` says how many states each layer keeps, next to keys and values or alone; empty where none does.
    """

    def __init__(
        self,
        layer_types: Sequence[str],
        capacity: int,
        window: int | None,
        step_tokens: int,
        states: Sequence[int] = (),
    ) -> None:
        def layer(kind: str, count: int) -> StateLayer:
            if kind == NO_CACHE:
                return StateLayer(count)
            if kind == FULL_ATTENTION or window is None:
                return PreallocatedLayer(capacity, count)
            return SlidingLayer(window, step_tokens, count)

        counts = states or [0] * len(layer_types)
        super().__init__(layers=[layer(kind, count) for kind, count in zip(layer_types, counts, strict=True)])

    def keep_states(self) -> None:
        """Copy all states, for :meth:`cut_back`, which can then go back to this length and to no other."""
        for layer in self.layers:
            layer.keep()

    def cut_back(self, length: int) -> None:
        """Forget everything after the first ``length`` tokens in every layer. Raises ValueError without kept states."""
        for layer in self.layers:
            layer.cut_back(length)

    def nbytes(self) -> int:
        """Bytes allocated over all layers."""
        return sum(layer.nbytes() for layer in self.layers)
