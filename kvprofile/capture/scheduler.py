"""vLLM's scheduler, but for one thing: a marked request takes no more than its context from the prefix cache.

Requests to repeat different chunks begin alike, so without this a later one may find its first rows cached and not
compute them, and their part in the scores would be missing. (A session notices and reads the context again, which
costs a prefill for each chunk; with this scheduler it need not.)
"""

from __future__ import annotations

from typing import Any

from vllm.v1.core.sched.scheduler import Scheduler

from kvprofile.capture.marks import Mark


class CaptureScheduler(Scheduler):  # type: ignore[misc]
    """For ``scheduler_cls``, with ``async_scheduling`` off."""

    def _get_local_prefix_cache_hit(self, request: Any, *limits: Any) -> Any:
        """From 0.33 on vLLM passes a limit of its own, which holds too."""
        mark = Mark.of(request.sampling_params)
        if mark is None or mark.context_tokens >= request.num_tokens:
            return super()._get_local_prefix_cache_hit(request, *limits)
        return super()._get_local_prefix_cache_hit(_Shortened(request, mark.context_tokens + 1), *limits)


class _Shortened:
    """A request that seems to have fewer tokens: vLLM computes at least the last one, so hits end before it."""

    def __init__(self, request: Any, num_tokens: int) -> None:
        self._request = request
        self.num_tokens = num_tokens

    def __getattr__(self, name: str) -> Any:
        return getattr(self._request, name)
