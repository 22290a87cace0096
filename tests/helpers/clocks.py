"""A clock that cannot be trusted."""

from __future__ import annotations

import random
import time


def stepping(monkeypatch):
    """A clock that is set back or forward by days whenever someone looks."""
    rng, stock = random.Random("clock"), time.time
    monkeypatch.setattr(time, "time", lambda: stock() + rng.uniform(-5, 5) * 86400)
