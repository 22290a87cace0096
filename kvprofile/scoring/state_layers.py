"""The states that layers keep besides, or in place of, keys and values: held, copied and put back.

A state cannot be cut back to an earlier token as keys can: it is copied where a text will go on more than once, and put
back from the copy. Models change states in place, so copies are real ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers.cache_utils import Cache, LinearAttentionCacheLayerMixin


@dataclass(frozen=True)
class SavedStates:
    """Copies of a layer's states [B, ...], by their index; a state that was never written is absent."""

    conv: dict[int, torch.Tensor]
    recurrent: dict[int, torch.Tensor]


class StateLayer(LinearAttentionCacheLayerMixin):  # type: ignore[misc]
    """States of one layer [B, ...], ``number_of_states`` of each kind; 0 in a layer of attention alone.

    ``keep`` copies the states, and ``go_back`` puts the copies back, for any number of rows.
    """

    def __init__(self, number_of_states: int) -> None:
        super().__init__(number_of_states=number_of_states)
        self.kept: SavedStates | None = None

    def lazy_initialization(self, *_args: Any, **_kwargs: Any) -> None:
        """Nothing is allocated before a state arrives."""

    def update_conv_state(
        self, conv_states: torch.Tensor, state_idx: int = 0, conv_kernel_size: int | None = None, **_others: Any
    ) -> torch.Tensor:
        """Append inputs [B, C, n] of a convolution to those it still sees; returns all, and holds the last of them."""
        held = self.conv_states[state_idx]
        if held is None:
            size = conv_states.shape[-1] if conv_kernel_size is None else conv_kernel_size
            self.conv_kernel_size[state_idx] = size
            whole = torch.nn.functional.pad(conv_states, (max(0, size - conv_states.shape[-1]), 0))
        else:
            whole = torch.cat([held, conv_states], -1)
        self.conv_states[state_idx] = whole[..., -self.conv_kernel_size[state_idx] :].clone()
        self.has_previous_state[state_idx] = True
        return whole

    def update_recurrent_state(
        self, recurrent_states: torch.Tensor, state_idx: int = 0, **_others: Any
    ) -> torch.Tensor:
        """Hold a new state [B, ...] in the dtype of the first one."""
        held = self.recurrent_states[state_idx]
        self.recurrent_states[state_idx] = recurrent_states if held is None else recurrent_states.to(held.dtype)
        return self.recurrent_states[state_idx]  # type: ignore[no-any-return]

    def copied(self, rows: Sequence[int] | None = None) -> SavedStates:
        """Copies of the states of some rows of the batch, or of all."""

        def copies(states: dict[int, torch.Tensor | None]) -> dict[int, torch.Tensor]:
            every = slice(None) if rows is None else list(rows)
            return {index: held[every].clone() for index, held in states.items() if held is not None}

        return SavedStates(copies(self.conv_states), copies(self.recurrent_states))

    def put_rows(self, saved: SavedStates, rows: Sequence[int]) -> None:
        """Give some rows of the batch the states that were copied for them; all rows have states."""
        for states, copies in ((self.conv_states, saved.conv), (self.recurrent_states, saved.recurrent)):
            for index, copy in copies.items():
                states[index][list(rows)] = copy

    def pick(self, rows: Sequence[int]) -> None:
        """Go on with some rows of the batch, in this order; a row may be there several times."""
        for states in (self.conv_states, self.recurrent_states):
            states.update({index: held[list(rows)] for index, held in states.items() if held is not None})

    def keep(self) -> None:
        """Copy the states, for :meth:`go_back`."""
        self.kept = self.copied()

    def go_back(self, count: int = 1) -> None:
        """Put the kept states back, ``count`` times side by side. Raises ValueError where none were kept."""
        if self.kept is None:
            raise ValueError("no states were kept to go back to")
        self.forget()
        for states, copies in ((self.conv_states, self.kept.conv), (self.recurrent_states, self.kept.recurrent)):
            states.update({index: copy.repeat_interleave(count, 0) for index, copy in copies.items()})
        self.has_previous_state.update(dict.fromkeys(self.kept.conv, True))

    def forget(self) -> None:
        """Drop the states, but not those that were kept."""
        for index in range(self.number_of_states):
            self.conv_states[index] = self.recurrent_states[index] = None
            self.has_previous_state[index] = False

    def reset(self) -> None:
        """Drop the states."""
        self.forget()
        self.kept = None

    def cut_back(self, _length: int) -> None:
        """Put the kept states back, if it keeps any: those at the only length that can be gone back to."""
        if self.number_of_states:
            self.go_back()

    def nbytes(self) -> int:
        """Bytes of the states, kept ones left out."""
        held = (*self.conv_states.values(), *self.recurrent_states.values())
        return sum(states.numel() * states.element_size() for states in held if states is not None)


class StatefulCache(Cache):  # type: ignore[misc]
    """A cache of layers that may keep states. ``past_tokens``: tokens read before the forward pass under way.

    transformers answers whether *a* layer has a state by its last layer, which a pass that ends early never reaches.
    """

    past_tokens = 0

    def has_previous_state(self, layer_idx: int | None = None, state_idx: int | None = None) -> bool:
        """Whether a layer has a state; without a layer, whether anything was read before this pass."""
        if layer_idx is None:
            return self.past_tokens > 0
        return super().has_previous_state(layer_idx, state_idx)  # type: ignore[no-any-return]

    @property
    def keeps_states(self) -> bool:
        """Whether any layer may keep a state."""
        return any(layer.number_of_states for layer in self.layers)
