"""Where long work tells how far it is. Standard library only."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Where a run tells how far it is; units are tokens that the model reads."""

    def start(self, total: int) -> None:
        """Called once, before the first forward pass."""

    def advance(self, tokens: int) -> None:
        """Called after every forward pass."""

    def say(self, message: str) -> None:
        """A line worth reading."""


class Silent(Progress):
    """Progress that nobody watches."""

    def start(self, total: int) -> None:
        """Nothing."""

    def advance(self, tokens: int) -> None:
        """Nothing."""

    def say(self, message: str) -> None:
        """Nothing."""
