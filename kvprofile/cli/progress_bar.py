"""How far long work is: a bar with the time left on a terminal, plain lines elsewhere; always on stderr."""

from __future__ import annotations

import sys
import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from kvprofile.cli.output import say


class TokenProgress:
    """A bar, or a plain line every ten seconds, over the tokens that a model reads; what ``scoring.run`` reports to."""

    def __init__(self, what: str) -> None:
        self.what = what
        self._bar: Any = None
        self._task: TaskID | None = None
        self._total = self._read = 0
        self._started = self._said = time.monotonic()

    def __enter__(self) -> TokenProgress:
        if sys.stderr.isatty():
            columns = (
                TextColumn(self.what),
                BarColumn(),
                TextColumn("{task.completed:,.0f} of {task.total:,.0f} tokens"),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
            )
            self._bar = Progress(*columns, console=Console(stderr=True))
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def start(self, total: int) -> None:
        """The tokens that will be read; the clock starts."""
        self._total, self._started = total, time.monotonic()
        if self._bar is not None:
            self._task = self._bar.add_task(self.what, total=total)

    def advance(self, tokens: int) -> None:
        """So many more tokens are read."""
        self._read += tokens
        if self._bar is not None:
            self._bar.advance(self._task, tokens)
        elif time.monotonic() - self._said >= 10:
            self._said = time.monotonic()
            left = (self._said - self._started) / self._read * (self._total - self._read)
            say(f"  {self._read:,} of {self._total:,} tokens read, about {left:.0f} s left")

    def say(self, message: str) -> None:
        """A line above the bar."""
        if self._bar is not None:
            self._bar.console.print(f"  {message}", markup=False)
        else:
            say(f"  {message}")
