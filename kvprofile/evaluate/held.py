"""What KV heads hold in a simulation: spans of keys and values that are shared, and a branch's own that grow."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from kvprofile.scoring.kernels import Visible


@dataclass
class Span:
    """Keys and values [1 or B, heads, m, D] at positions ``first`` .. ``first + m``."""

    keys: torch.Tensor
    values: torch.Tensor
    first: int

    @property
    def count(self) -> int:
        """Tokens held, m."""
        return self.keys.shape[2]

    def nbytes(self) -> int:
        """Bytes of keys and values."""
        return sum(tensor.numel() * tensor.element_size() for tensor in (self.keys, self.values))

    def cut(self, start: int, stop: int) -> Span:
        """A copy of the positions [start, stop) that it holds, so that the rest can be freed."""
        first, last = max(start - self.first, 0), max(min(stop - self.first, self.count), 0)
        keys, values = (tensor[:, :, first : max(first, last)].clone() for tensor in (self.keys, self.values))
        return Span(keys, values, self.first + first)

    def between(self, start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values [heads, stop - start, D] of its first row at positions [start, stop)."""
        here = slice(start - self.first, stop - self.first)
        return self.keys[0, :, here], self.values[0, :, here]

    def picked(self, heads: torch.Tensor, places: torch.Tensor, start: int, stop: int) -> Span:
        """A copy of what some heads hold before ``start``, at ``places`` [heads, k] in between, and from ``stop`` on.

        It counts as beginning where the span does: what it holds is earlier than any token that reads it, and keys
        carry their positions.
        """
        pieces = []
        for tensor in (self.keys, self.values):
            mine = tensor[:, heads]
            index = (places - self.first).to(tensor.device)[None, :, :, None].expand(-1, -1, -1, tensor.shape[-1])
            ends = mine[:, :, : start - self.first], mine[:, :, stop - self.first :]
            pieces.append(torch.cat([ends[0], mine.gather(2, index), ends[1]], 2))
        return Span(pieces[0], pieces[1], self.first)


class Growing:
    """Keys and values [B, heads, capacity, D] of a branch's own tokens; slot j holds position ``first + j``."""

    def __init__(self, first: int) -> None:
        self.first, self.dropped = first, 0
        self.keys: torch.Tensor | None = None
        self.values: torch.Tensor | None = None

    def write(self, keys: torch.Tensor, values: torch.Tensor, positions: torch.Tensor, stop: int) -> None:
        """Put keys [B, heads, n, D] at positions [B, n], all below ``stop``, making room as needed."""
        needed = stop - self.first - self.dropped
        if self.keys is None or self.values is None or needed > self.keys.shape[2]:
            room = max(32, needed * 3 // 2)
            shape = (*keys.shape[:2], room)
            grown = [tensor.new_zeros(*shape, tensor.shape[-1]) for tensor in (keys, values)]
            for old, new in zip((self.keys, self.values), grown, strict=True):
                if old is not None:
                    new[:, :, : old.shape[2]] = old
            self.keys, self.values = grown
        slots = positions - self.first - self.dropped
        rows = torch.arange(len(keys), device=keys.device)[:, None]
        self.keys[rows, :, slots] = keys.transpose(1, 2)
        self.values[rows, :, slots] = values.transpose(1, 2)

    def taken(self, rows: torch.Tensor) -> Growing:
        """A copy of some rows."""
        other = Growing(self.first)
        other.dropped = self.dropped
        if self.keys is not None and self.values is not None:
            picked = rows.to(self.keys.device)
            other.keys, other.values = self.keys[picked], self.values[picked]
        return other

    def spans(self, start: int, stop: int) -> list[Span]:
        """Views of what is held below position ``start``, if anything is, and from there to ``stop``.

        Raises ValueError before anything is written.
        """
        if self.keys is None or self.values is None:
            raise ValueError("nothing was written yet")
        first = self.first + self.dropped
        middle = max(0, start - first)
        return [
            Span(self.keys[:, :, a:b], self.values[:, :, a:b], first + a)
            for a, b in ((0, middle), (middle, stop - first))
            if b > a
        ]

    def nbytes(self) -> int:
        """Bytes allocated."""
        return sum(t.numel() * t.element_size() for t in (self.keys, self.values) if t is not None)

    def drop_below(self, position: int) -> None:
        """Free the memory of positions that no row will see again."""
        surplus = position - self.first - self.dropped
        if surplus > 0 and self.keys is not None and self.values is not None:
            self.keys, self.values = (tensor[:, :, surplus:].clone() for tensor in (self.keys, self.values))
            self.dropped += surplus


def joined(spans: list[Span]) -> Span:
    """Adjacent spans as one; the list is replaced by it, so nothing is held twice."""
    if len(spans) > 1:
        keys, values = (torch.cat([getattr(span, name) for span in spans], 2) for name in ("keys", "values"))
        spans[:] = [Span(keys, values, spans[0].first)]
    return spans[0]


@dataclass
class HeldHeads:
    """KV heads of one layer that live under one rule, and what they hold of the context: spans shared by all branches.

    ``index`` and ``queries`` are their numbers and those of their query heads. ``sees`` None stands for plain causal
    attention. ``first_seen`` gives the first of the tokens after the context that
    the token at a position still sees, None where that is all of them. ``budgets`` are the numbers of those, of several
    side by side, under which the heads live so; None for all.
    """

    index: torch.Tensor
    queries: torch.Tensor
    sees: Visible | None
    context: list[Span]
    first_seen: Callable[[int], int] | None = None
    budgets: tuple[int, ...] | None = None
