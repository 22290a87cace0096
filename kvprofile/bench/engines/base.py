"""What engines have in common: a running endpoint, and the one error that ends a leg and no other."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from kvprofile.bench.chat_client import Endpoint
from kvprofile.errors import plain


class LegFailedError(Exception):
    """A leg cannot be run, or not to its end. One line; the other legs go on."""

    def __init__(self, reason: str) -> None:
        super().__init__(plain(" ".join(reason.split()))[:1000])


@dataclass(frozen=True)
class Running:
    """An engine that answers. What is not known of it is None.

    ``metrics_url`` and ``process`` are of engines on this machine; ``stats`` is the runtime's statistics file.
    ``token_bytes`` is what a token takes in a cache without budgets.
    ``ended`` says whether its process is gone.
    ``facts`` go into the leg as they are: engine, dtype, device.
    """

    endpoint: Endpoint
    metrics_url: str | None = None
    process: int | None = None
    stats: Path | None = None
    token_bytes: int | None = None
    facts: Mapping[str, str | int | None] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    ended: Callable[[], bool] = lambda: False
