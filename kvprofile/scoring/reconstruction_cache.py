"""A key-value cache that is allocated once, for the whole run of a document, and cut back by moving a cursor."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin

from kvprofile.budget.profile import FULL_ATTENTION


def cache_argument(module: torch.nn.Module) -> str:
    """The name by which a model's forward takes its cache: ``past_key_values``, or ``cache`` where it was renamed.

    transformers 5.24 takes both and warns about the old name, which it says goes in 5.40.
    """
    return "cache" if "cache" in inspect.signature(module.forward).parameters else "past_key_values"


class PreallocatedLayer(CacheLayerMixin):  # type: ignore[misc]
    """Keys and values [1, G, capacity, D] of a full-attention layer; readers get views of the filled part."""

    is_sliding = False
    is_croppable = True

    def __init__(self, capacity: int) -> None:
        super().__init__()
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
        """Forget everything after the first ``length`` tokens; nothing is copied."""
        self.length = length

    def reset(self) -> None:
        """Forget everything but keep the memory for the next document."""
        self.length = 0

    def get_seq_length(self) -> int:
        """Tokens seen so far."""
        return self.length

    def get_max_length(self) -> int:
        """Tokens the layer can hold."""
        return self.capacity

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(number of keys, position of the first) while ``query_length`` tokens are being added."""
        return self.length + query_length, 0


class SlidingLayer(PreallocatedLayer):
    """A sliding-window layer: the last window - 1 tokens before the cursor, and room for one forward pass after them.

    Room is ``step_tokens``. Cutting back to where the last forward pass began loses nothing that a later token sees.
    """

    is_sliding = True

    def __init__(self, window: int, step_tokens: int) -> None:
        super().__init__(window - 1 + step_tokens)
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
        self.length = length

    def reset(self) -> None:
        """Forget everything but keep the memory."""
        self.length = self.first = 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(number of keys, position of the first) while ``query_length`` tokens are being added."""
        first = max(self.first, self.length - self.window + 1)
        return self.length - first + query_length, first


class ReconstructionCache(Cache):  # type: ignore[misc]
    """The cache of one document: full layers hold every token, sliding layers their window."""

    def __init__(self, layer_types: Sequence[str], capacity: int, window: int | None, step_tokens: int) -> None:
        layers = [
            PreallocatedLayer(capacity)
            if kind == FULL_ATTENTION or window is None
            else SlidingLayer(window, step_tokens)
            for kind in layer_types
        ]
        super().__init__(layers=layers)

    def cut_back(self, length: int) -> None:
        """Forget everything after the first ``length`` tokens in every layer."""
        for layer in self.layers:
            layer.cut_back(length)

    def nbytes(self) -> int:
        """Bytes allocated over all layers."""
        return sum(t.numel() * t.element_size() for x in self.layers if x.is_initialized for t in (x.keys, x.values))
