"""How vLLM accounts for the cache of trimmed heads: the spec of such a cache and the manager of its blocks.

The scheduler frees, the worker reads, and neither asks the other. Both follow one rule, which keeps the worker away
from freed blocks whichever model runner it uses:

- ``prefill_end`` of a request is its number of tokens when the scheduler admits it, and again when it resumes it after
  preemption: the length that the scheduler's full-sequence gate asks for. Blocks are freed once that many tokens are
  processed, never earlier.
- A row of a batch is trimmed only where it brings one token and vLLM does not flag it as prefilling (``backend``).
  Every row after ``prefill_end`` is of that kind; a row before it reads what is still held either way. Model runner V2
  flags rows up to ``prefill_end``, V1 up to the end of the prompt, so on V1 a resumed request whose last chunk of
  generated tokens happens to be a single token computes that one on the trimmed view.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vllm.utils.math_utils import cdiv
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager, register_all_kvcache_specs
from vllm.v1.kv_cache_interface import AttentionSpec, FullAttentionSpec, replace_as
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

from kvprofile.budget.trim import DEFAULT_WINDOW, TrimRule
from kvprofile.runtime.stats import Life, counters


@dataclass(frozen=True, kw_only=True)
class StreamSpec(AttentionSpec):  # type: ignore[misc]
    """Cache of heads that keep sinks and window once their request decodes.

    Not a FullAttentionSpec: vLLM would merge it with those.
    """

    sink_tokens: int
    recent_tokens: int
    window: str = DEFAULT_WINDOW
    pool_block_bytes: int | None = None
    """Bytes of one block of the pool, once groups are packed."""
    groups: tuple[int, int] = (0, 1)
    """How many groups of full and of streaming halves there are, once groups are packed."""

    @property
    def trim(self) -> TrimRule:
        """The trim rule in blocks of this spec."""
        return TrimRule(self.sink_tokens, self.recent_tokens, self.block_size, self.window)

    def max_memory_usage_bytes(self, vllm_config: Any) -> int:
        """Bytes of the longest request: in prefill it holds everything."""
        return int(cdiv(vllm_config.model_config.max_model_len, self.block_size) * self.page_size_bytes)


_OWN_FIELDS = ("sink_tokens", "recent_tokens", "window", "pool_block_bytes", "groups")


class StreamManager(FullAttentionManager):  # type: ignore[misc]
    """Full attention's block manager, and one thing more: after prefill it frees what the trim rule gives up."""

    def __init__(self, kv_cache_spec: StreamSpec, **kwargs: Any) -> None:
        super().__init__(kv_cache_spec, **kwargs)
        self._trim = kv_cache_spec.trim
        self._block_bytes = kv_cache_spec.pool_block_bytes or kv_cache_spec.page_size_bytes
        self._prefill_end: dict[str, int] = {}
        self._lives: dict[str, Life] = {}

    @classmethod
    def find_longest_cache_hit(
        cls,
        block_hashes: Any,
        max_length: int,
        kv_cache_group_ids: list[int],
        block_pool: Any,
        kv_cache_spec: StreamSpec,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """As full attention; upstream's assertion on the spec's type is met by a stand-in."""
        full = replace_as(kv_cache_spec, FullAttentionSpec, drop=_OWN_FIELDS)
        return super().find_longest_cache_hit(
            block_hashes, max_length, kv_cache_group_ids, block_pool, full, *args, **kwargs
        )

    def get_num_blocks_to_allocate(
        self, request_id: str, num_tokens: int, *args: Any, apply_admission_cap: bool = False, **kwargs: Any
    ) -> int:
        """Upstream's answer. The admission gate asks for the whole sequence, which says where prefill ends."""
        if apply_admission_cap:
            self._prefill_end[request_id] = num_tokens
        needed = super().get_num_blocks_to_allocate(
            request_id, num_tokens, *args, apply_admission_cap=apply_admission_cap, **kwargs
        )
        return int(needed)

    def remove_skipped_blocks(
        self, request_id: str, processed_computed_tokens: int, num_prompt_tokens: int | None = None
    ) -> None:
        """Free the blocks between sinks and window of the next token, once prefill has been processed.

        Raises ValueError where a window is anchored and vLLM does not say where the prompt ended.
        """
        prefill_end = self._prefill_end.get(request_id)
        if prefill_end is None or processed_computed_tokens < prefill_end:
            return
        if num_prompt_tokens is None and self._trim.anchored:
            raise ValueError("this vLLM does not say how long a prompt is; set LLM_KVZIP_WINDOW=sliding")
        life = self._lives.get(request_id)
        if life is not None and self._trim.anchored:
            return  # all that an anchored window gives up went at its first step
        free = self.block_pool.get_num_free_blocks()
        first_recent = self._trim.first_recent_block(processed_computed_tokens, num_prompt_tokens or 0)
        if life is None:  # this runs for every request at every step, and counting what it holds takes a while
            life = self._lives[request_id] = Life(self._held(request_id))
        self._remove_blocks_in_range(request_id, self._trim.sink_blocks, first_recent)
        reclaimed = self.block_pool.get_num_free_blocks() - free
        counters().reclaimed(reclaimed, self._block_bytes)
        life.reclaimed += reclaimed
        if life.after_trim is None:
            life.after_trim = self._held(request_id)

    def new_step_starts(self) -> None:
        """Note what the pool holds: all but the null block and those free."""
        held = self.block_pool.num_gpu_blocks - 1 - self.block_pool.get_num_free_blocks()
        counters().in_use(held, self._block_bytes)

    def cache_blocks(
        self,
        request: Any,
        num_tokens: int,
        retention_interval: int | None = None,
        *,
        replay_boundaries: Sequence[int],
    ) -> None:
        """Offer the prompt's blocks to later requests, and no others: later ones hold caches computed while trimmed."""
        prompt = min(num_tokens, request.num_prompt_tokens)
        super().cache_blocks(request, prompt, retention_interval, replay_boundaries=replay_boundaries)

    def pop_blocks_for_free(self, request_id: str) -> Any:
        """Upstream's, for a request that finishes or is preempted."""
        if self._prefill_end.pop(request_id, None) is not None:
            life = self._lives.pop(request_id, Life())
            life.ended(self._held(request_id), len(self.req_to_blocks.get(request_id, ())))
            counters().gave_back(request_id, life, self.kv_cache_spec.groups, self._block_bytes)
        return super().pop_blocks_for_free(request_id)

    def _held(self, request_id: str) -> int:
        """Blocks that a request holds in this group; freed ones have become the null block."""
        return sum(not block.is_null for block in self.req_to_blocks.get(request_id, ()))


def register() -> None:
    """Make the spec known to vLLM. Its own specs come first: it registers them only while the registry is empty."""
    register_all_kvcache_specs(None)
    KVCacheSpecRegistry.register(StreamSpec, StreamManager, uniform_type_base_spec=StreamSpec)
