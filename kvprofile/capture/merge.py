"""From what each worker found to one answer: ranks of pipeline stages bring layers, tensor-parallel ranks KV heads."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import safetensors.torch
import torch


@dataclass
class Captured:
    """What was found of one request.

    ``layers[index][name]`` are tensors whose first axis is the model's KV heads. ``covered`` are the rows [start, stop)
    that every rank saw, in the order they were computed.
    """

    layers: dict[int, dict[str, torch.Tensor]] = field(default_factory=dict)
    covered: list[tuple[int, int]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def missing(self, start: int, stop: int) -> bool:
        """Whether a row of [start, stop) was never computed, because the prefix cache had it."""
        reached = start
        for first, last in sorted(self.covered):
            if first <= reached:
                reached = max(reached, last)
        return reached < stop


def merge(parts: Sequence[bytes]) -> Captured:
    """One answer from all workers. Where ranks share a KV head, each has some of its query heads: the larger counts."""
    merged = Captured()
    covered: list[list[tuple[int, int]]] = []
    for part in parts:
        notes, tensors = _read(part)
        covered.append([(first, last) for first, last in notes["covered"]])
        merged.problems += [told for told in notes["problems"] if told not in merged.problems]
        for name, tensor in tensors.items():
            index, _, kind = name.partition(".")
            layer = merged.layers.setdefault(int(index), {})
            if kind not in layer:
                layer[kind] = tensor.new_full((notes["kv_heads"], *tensor.shape[1:]), -torch.inf)
            heads = slice(notes["first_head"], notes["first_head"] + len(tensor))
            layer[kind][heads] = torch.maximum(layer[kind][heads], tensor)
    merged.covered = covered[0]
    if any(other != covered[0] for other in covered):
        merged.problems.append("ranks computed different rows")
    return merged


def _read(part: bytes) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    header_bytes = int.from_bytes(part[:8], "little")
    notes = json.loads(part[8 : 8 + header_bytes])["__metadata__"]["kvprofile"]
    return json.loads(notes), safetensors.torch.load(part)
