"""What a request carries in ``SamplingParams.extra_args`` so that workers know what to do. Imports no vLLM."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

FIELD = "kvprofile"


@dataclass(frozen=True)
class Mark:
    """A request of ``context_tokens`` tokens of context, and perhaps the repeat of a chunk of it after them.

    ``chunk`` holds the positions [start, stop) whose keys are scored by the rows after the context, against them, the
    first ``prefix_tokens`` and the rows themselves; of those in ``probed`` the sums of a probe's fit are made too.
    Without a chunk the context's keys and values are summarised. Results are taken by ``key``.
    """

    key: str
    context_tokens: int
    prefix_tokens: int = 0
    chunk: tuple[int, int] | None = None
    probed: tuple[int, int] = (0, 0)

    def as_extra_args(self) -> dict[str, Any]:
        """The form that crosses processes."""
        chunk = None if self.chunk is None else list(self.chunk)
        return {FIELD: [self.key, self.context_tokens, self.prefix_tokens, chunk, list(self.probed)]}

    @classmethod
    def of(cls, parameters: Any) -> Mark | None:
        """The mark of a request's sampling parameters, if it has one."""
        extra: Mapping[str, Any] = getattr(parameters, "extra_args", None) or {}
        if FIELD not in extra:
            return None
        key, context_tokens, prefix_tokens, chunk, probed = extra[FIELD]
        scored = None if chunk is None else (chunk[0], chunk[1])
        return cls(key, context_tokens, prefix_tokens, scored, (probed[0], probed[1]))
