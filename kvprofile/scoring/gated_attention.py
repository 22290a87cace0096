"""Attention between full and trimmed that gradients go through, in memory that does not grow with rows times keys.

The parts that ``gates`` is built of: a cache that may be written twice with the same tokens, what the rows of a pass
see, and the backward pass of attention over a cache whose context is constant.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from kvprofile.scoring import kernels
from kvprofile.scoring.attention import Recorder, span
from kvprofile.scoring.reconstruction_cache import PreallocatedLayer, ReconstructionCache, SlidingLayer

Pair = tuple[torch.Tensor, torch.Tensor]


class GatedLayer(PreallocatedLayer):
    """A layer that holds values alone; ``fresh`` are its newest keys and values [1, G, n, D] with their history."""

    fresh: Pair | None = None

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *_args: Any, **_kwargs: Any) -> Pair:
        """Append at the cursor; returns views [1, G, length, D]."""
        self.fresh = (key_states, value_states)
        return super().update(key_states.detach(), value_states.detach())


class GatedSlidingLayer(GatedLayer, SlidingLayer):
    """A sliding layer that moves nothing once pinned, so that a repeat read in slices can be cut back to its start."""

    pinned = False

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *_args: Any, **_kwargs: Any) -> Pair:
        """Append [1, G, n, D]; a pinned layer has room for ``step_tokens`` after the window it keeps."""
        if not self.pinned:
            return super().update(key_states, value_states)
        self.fresh = (key_states, value_states)
        held, self.length = self.length - self.first, self.length + key_states.shape[-2]
        end = self.length - self.first
        self.keys[:, :, held:end] = key_states.detach()
        self.values[:, :, held:end] = value_states.detach()
        return self.keys[:, :, :end], self.values[:, :, :end]

    def pin(self) -> None:
        """Drop what no later token sees, and keep the rest where it is."""
        super().update(self.keys[:, :, :0], self.values[:, :, :0])
        self.pinned = True

    def reset(self) -> None:
        """Forget everything but keep the memory."""
        super().reset()
        self.pinned = False


class GatedCache(ReconstructionCache):
    """The cache of one document, for passes that may run a layer again: cut the layer back first."""

    def __init__(self, layer_types: Sequence[str], capacity: int, window: int | None, step_tokens: int) -> None:
        super().__init__(layer_types, capacity, window, step_tokens)
        plain: list[PreallocatedLayer] = self.layers
        self.layers: list[PreallocatedLayer] = [
            GatedSlidingLayer(layer.window, step_tokens) if isinstance(layer, SlidingLayer) else GatedLayer(capacity)
            for layer in plain
        ]

    def pin(self) -> None:
        """The document is read: from now on sliding layers keep their window."""
        for layer in self.layers:
            if isinstance(layer, GatedSlidingLayer):
                layer.pin()


@dataclass(frozen=True)
class Sight:
    """Keys and values [1, G, m, D] at positions key_start.., and which of them rows at positions start.. see.

    Never later ones and, with a ``window``, only those before ``sink_end`` and the last ``window``. Sinks need a
    ``key_start`` of 0. ``learned_sinks`` [H] are logits that take weight and give no value.
    """

    key: torch.Tensor
    value: torch.Tensor
    learned_sinks: torch.Tensor | None
    start: int
    key_start: int
    scale: float
    softcap: float | None
    sink_end: int = 0
    window: int | None = None

    def of_heads(self, heads: torch.Tensor, group: int) -> Sight:
        """The same for some of the KV heads: ``heads`` [G], bool."""
        sinks = None if self.learned_sinks is None else self.learned_sinks[heads.repeat_interleave(group)]
        return replace(self, key=self.key[:, heads], value=self.value[:, heads], learned_sinks=sinks)

    def attend(self, query: torch.Tensor, recorder: Recorder) -> kernels.Part:
        """Attention of rows [1, H, n, D] to what they see."""
        return kernels.merge(list(self._parts(query, recorder)), self.learned_sinks)

    def _parts(self, query: torch.Tensor, recorder: Recorder) -> Iterator[kernels.Part]:
        # full: everything before the pass, then the pass itself, causally
        if self.window is None:
            if self.start:
                yield span(recorder, query, *self._keys(0, self.start), self.scale, self.softcap, 0, False)
            yield span(recorder, query, *self._keys(self.start), self.scale, self.softcap, self.start, True)
            return
        # trimmed: the sinks, then a causal window over what follows them
        if self.sink_end:
            sinks = self._keys(0, self.sink_end)
            yield kernels.blocked(query, *sinks, self.scale, query_start=self.start, key_start=0, softcap=self.softcap)
        early = min(max(0, self.sink_end - self.start), query.shape[2])  # rows that are sinks themselves: no window
        if early < query.shape[2]:
            part = kernels.blocked(
                query[:, :, early:],
                *self._keys(self.sink_end),
                self.scale,
                query_start=self.start + early,
                key_start=self.key_start + self.sink_end,
                softcap=self.softcap,
                window=self.window,
            )
            pad = torch.nn.functional.pad
            yield kernels.Part(pad(part.output, (0, 0, early, 0)), pad(part.lse, (early, 0), value=-torch.inf))

    def _keys(self, first: int, stop: int | None = None) -> Pair:
        return self.key[:, :, first:stop], self.value[:, :, first:stop]

    def blocks(self, first: int, stop: int) -> Iterator[tuple[int, torch.Tensor]]:
        """What rows at positions [first, stop) see, in blocks: the first key's position, and who is hidden [n, m].

        No block holds keys both from before ``start`` and from the pass itself.
        """
        recent = self.key_start
        if self.window is not None:
            recent = max(self.key_start, self.sink_end, first + 1 - self.window)
        rows = torch.arange(first, stop, device=self.key.device)[:, None]
        for low, high in ((0, min(self.sink_end, stop)), (recent, stop)):
            for a, b in ((low, min(high, self.start)), (max(low, self.start), high)):
                for begin in range(a, b, kernels.KEY_BLOCK):
                    places = torch.arange(begin, min(begin + kernels.KEY_BLOCK, b), device=rows.device)
                    hidden = places > rows
                    if self.window is not None:
                        hidden |= (places <= rows - self.window) & (places >= self.sink_end)
                    yield begin, hidden


class Attention(torch.autograd.Function):
    """``Sight.attend`` with a gradient, for the queries and the newest keys and values; the context is constant."""

    @staticmethod
    def forward(
        ctx: Any, query: torch.Tensor, _key: Any, _value: Any, sight: Sight, recorder: Recorder
    ) -> torch.Tensor:
        """Output [1, H, n, D] of query [1, H, n, D]; ``_key`` and ``_value`` are the last n that the sight holds."""
        part = sight.attend(query, recorder)
        ctx.save_for_backward(query, part.output, part.lse)
        ctx.sight = sight
        return part.output

    @staticmethod
    def backward(ctx: Any, *slopes: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Slopes of query [1, H, n, D], key and value [1, G, n, D] from that of the output.

        The logits once more, in blocks of float32, normalised by each row's log-sum-exp (as FlashAttention does).
        """
        sight: Sight = ctx.sight
        query, output, lse = ctx.saved_tensors
        heads, start, count = sight.key.shape[1], sight.start, query.shape[2]
        fresh = slice(start - sight.key_start, None)
        by_query = torch.empty_like(query, dtype=torch.float32)
        by_key = torch.zeros_like(sight.key[:, :, fresh], dtype=torch.float32)
        by_value = torch.zeros_like(sight.value[:, :, fresh], dtype=torch.float32)
        for first in range(0, count, kernels.ROW_BLOCK):
            rows = slice(first, min(first + kernels.ROW_BLOCK, count))
            # rows [1, G, g * n, D]; slope . output is what the softmax subtracts from every logit's slope
            q, out, slope = (kernels.fold_groups(x[:, :, rows].float(), heads) for x in (query, output, slopes[0]))
            along = (slope * out).sum(-1, keepdim=True)
            normaliser = lse[:, :, rows].reshape(1, heads, -1, 1)
            total = torch.zeros_like(q)
            for place, hidden in sight.blocks(start + rows.start, start + rows.stop):
                keys = slice(place - sight.key_start, place - sight.key_start + hidden.shape[1])
                key, value = sight.key[:, :, keys].float(), sight.value[:, :, keys].float()
                # slope by logit = weight * (slope . value - slope . output), through the softcap's own slope
                logits = kernels.logits_of(q, key, sight.scale, sight.softcap)
                by_logit = torch.matmul(slope, value.transpose(-1, -2)).sub_(along)
                if sight.softcap is not None:
                    by_logit.mul_(1.0 - (logits / sight.softcap).square_())
                weights = logits.sub_(normaliser).exp_()
                weights.view(1, heads, -1, *hidden.shape).masked_fill_(hidden, 0.0)
                by_logit.mul_(weights)
                # slopes by query for all keys, by key and value only for the pass's own tokens: the rest is constant
                total += torch.matmul(by_logit, key)
                if place >= start:
                    own = slice(place - start, place - start + hidden.shape[1])
                    by_key[:, :, own] += torch.matmul(by_logit.transpose(-1, -2), q)
                    by_value[:, :, own] += torch.matmul(weights.transpose(-1, -2), slope)
            by_query[:, :, rows] = total.view(1, query.shape[1], -1, query.shape[-1])
        found = (by_query.mul_(sight.scale), by_key.mul_(sight.scale), by_value)
        return *(x.to(query.dtype) for x in found), None, None


def mixed(
    query: torch.Tensor, fresh: Pair | None, full: Sight, trimmed: Sight | None, gates: torch.Tensor, recorder: Recorder
) -> torch.Tensor:
    """Output [1, H, n, D]: trimmed where a gate of ``gates`` [G] is 0, full where it is 1, else between.

    ``trimmed`` None stands for full everywhere. Unless ``gates`` want gradients, a head that a gate leaves out costs
    nothing.
    """
    group = query.shape[1] // full.key.shape[1]

    def output(sight: Sight, heads: torch.Tensor) -> torch.Tensor:
        if heads.all():
            return Attention.apply(query, *(fresh or (None, None)), sight, recorder)  # type: ignore[no-any-return, no-untyped-call]
        found = query.new_zeros(*query.shape[:-1], sight.value.shape[-1])
        if heads.any():
            rows = heads.repeat_interleave(group)
            found[:, rows] = sight.of_heads(heads, group).attend(query[:, rows], recorder).output
        return found

    asked = gates.requires_grad
    if trimmed is None or not (asked or (gates != 1).any()):
        return output(full, torch.ones_like(gates, dtype=torch.bool))
    opened = output(full, (gates != 0) | asked)
    closed = output(trimmed, (gates != 1) | asked)
    by_row = gates.repeat_interleave(group)[None, :, None, None]
    return torch.lerp(closed.float(), opened.float(), by_row).to(query.dtype)
