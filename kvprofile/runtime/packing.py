"""Which layers' caches share a group, and how wide groups are. Plain arithmetic, knows nothing of vLLM.

A block of vLLM's pool is as wide as the widest cache group, so every group that is narrower wastes the difference in
each of its blocks. Parts of layers are therefore packed into bins of one width. Narrow bins fill better;
each bin costs a block table and metadata in every step.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

COST_PER_GROUP = 0.0014
"""What one more group costs, in steps (``benchmarks/runtime.py groups``), set against the bytes of a request."""

TOLERABLE_PREFILL_WASTE = 1.1
"""Peaks up to here are as good as none: a request's prefill is short."""

MOST_GROUPS = 32


@dataclass(frozen=True)
class Piece:
    """The cache of one layer or part of a layer: bytes of a block, and blocks of it that a typical request holds.

    Pieces of one kind hold equally many blocks and may share a group.
    """

    name: str
    kind: str
    block_bytes: int
    decode_blocks: int
    prefill_blocks: int


@dataclass(frozen=True)
class Packing:
    """Groups of equal kind, and what they cost one request in bytes: predicted over ideal, decoding and in prefill."""

    groups: tuple[tuple[Piece, ...], ...]
    decode_waste: float
    prefill_waste: float

    @property
    def width(self) -> int:
        """Bytes of a block: those of the widest group."""
        return max(_bytes(group) for group in self.groups)

    @property
    def cost(self) -> float:
        """What widths are compared by, lower is better: requests decode for longer than they prefill."""
        peak = max(0.0, self.prefill_waste - TOLERABLE_PREFILL_WASTE)
        return self.decode_waste + peak + COST_PER_GROUP * len(self.groups)

    def reason(self) -> str:
        """Why this packing, for the log."""
        return (
            f"{len(self.groups)} cache groups of up to {self.width} bytes a block: a request takes "
            f"{self.decode_waste - 1:.1%} more than its heads need while it decodes and {self.prefill_waste - 1:.1%} "
            f"in prefill, and a group more is counted as {COST_PER_GROUP:.2%}"
        )


def pack(pieces: Sequence[Piece]) -> Packing:
    """The packing that costs least, over all widths from that of the widest piece to that of all together."""
    sizes = [piece.block_bytes for piece in pieces]
    step = math.gcd(*sizes)
    narrowest = max(*sizes, sum(sizes) // MOST_GROUPS // step * step)
    widths = range(narrowest, sum(sizes) + 1, step)
    return min((_weighed(_packed(pieces, width)) for width in widths), key=lambda packing: packing.cost)


def _packed(pieces: Sequence[Piece], width: int) -> list[list[Piece]]:
    """First fit, widest first, each kind on its own; pieces of one width stay together where they can."""
    groups: list[list[Piece]] = []
    for piece in sorted(pieces, key=lambda p: -p.block_bytes):
        for group in groups:
            if group[0].kind == piece.kind and _bytes(group) + piece.block_bytes <= width:
                group.append(piece)
                break
        else:
            groups.append([piece])
    return groups


def _weighed(groups: Sequence[Sequence[Piece]]) -> Packing:
    width = max(_bytes(group) for group in groups)
    pieces = [piece for group in groups for piece in group]
    decode = sum(group[0].decode_blocks for group in groups) * width
    prefill = sum(group[0].prefill_blocks for group in groups) * width
    return Packing(
        tuple(tuple(group) for group in groups),
        decode_waste=decode / sum(piece.decode_blocks * piece.block_bytes for piece in pieces),
        prefill_waste=prefill / sum(piece.prefill_blocks * piece.block_bytes for piece in pieces),
    )


def _bytes(group: Sequence[Piece]) -> int:
    return sum(piece.block_bytes for piece in group)
