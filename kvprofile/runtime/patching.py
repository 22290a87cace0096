"""Replacing attributes of other people's classes and modules, carefully. Standard library only."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

_originals: dict[tuple[Any, str], Any] = {}


@dataclass(frozen=True)
class Patch:
    """``owner.name`` replaced by what ``wrap`` makes of it. ``owner`` is the class or module that defines it."""

    owner: Any
    name: str
    wrap: Callable[[Any], Any]

    def apply(self) -> None:
        """Replace it. Raises RuntimeError where it is replaced already, or does not exist."""
        if (self.owner, self.name) in _originals:
            raise RuntimeError(f"{self} is patched already")
        original = vars(self.owner).get(self.name)
        if original is None:
            raise RuntimeError(f"{self} does not exist; this vLLM is not the one that was tested")
        replacement = self.wrap(original)
        _originals[self.owner, self.name] = original
        setattr(self.owner, self.name, functools.wraps(original)(replacement) if callable(original) else replacement)

    def has_target(self) -> bool:
        """Whether there is something to replace."""
        return self.name in vars(self.owner)

    def remove(self) -> None:
        """Put the original back. Raises RuntimeError where it is not replaced."""
        if (self.owner, self.name) not in _originals:
            raise RuntimeError(f"{self} is not patched")
        setattr(self.owner, self.name, _originals.pop((self.owner, self.name)))

    def __str__(self) -> str:
        return f"{self.owner.__name__}.{self.name}"
