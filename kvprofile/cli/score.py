"""``kvprofile score``: profile a checkpoint and write its budget file."""

from __future__ import annotations


def score(model: str) -> None:
    """Profile a checkpoint and write its budget file."""
    raise NotImplementedError
