"""Caches of 8-bit floats: what becomes of a key or value that is stored in one.

A number is divided by the scale of its layer, rounded to one that 8 bits can hold, and multiplied by the scale when it
is read. What is too large becomes the largest. GPUs round to the nearest number, half-way to the even one; vLLM's CPU
backend towards zero (0.32.0, seen: findings/vllm-cpu-fp8-cache-rounds-toward-zero.sh).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kvprofile.budget.dtypes import FLOAT8_NAMES

TOWARD_ZERO = ("cpu",)
"""vLLM's platforms that do not round to the nearest number."""


@dataclass(frozen=True)
class Float8:
    """How a cache of 8-bit floats stores numbers of any shape."""

    dtype: torch.dtype
    toward_zero: bool = False

    def stored(self, numbers: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
        """Numbers as 8-bit floats."""
        most = torch.finfo(self.dtype).max
        numbers = (numbers.float() / scale).clamp(-most, most)
        found = numbers.to(self.dtype)
        if self.toward_zero:
            # the next byte below is the next number towards zero
            too_large = found.float().abs() > numbers.abs()
            found = (found.view(torch.uint8) - too_large.to(torch.uint8)).view(self.dtype)
        return found

    def read(self, content: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
        """Numbers in float32 of what a cache holds, bytes or 8-bit floats."""
        return content.view(self.dtype).float() * scale

    def rounded(self, numbers: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
        """Numbers as they are read again, in their own dtype."""
        return self.read(self.stored(numbers, scale), scale).to(numbers.dtype)


def of_cache(name: str, platform: str = "") -> Float8 | None:
    """What a cache stores that vLLM calls ``name`` (its ``kv_cache_dtype``) on a platform; None if numbers as they are.

    Without a platform numbers are rounded to the nearest, as on GPUs.
    """
    if name not in FLOAT8_NAMES:
        return None
    return Float8(torch.float8_e5m2 if "e5m2" in name else torch.float8_e4m3fn, platform in TOWARD_ZERO)
