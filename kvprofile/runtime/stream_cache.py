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

Where the budget is graded, the two meet at one point instead: as the first step after prefill is scheduled, the manager
takes blocks for the tokens that stay, gives the middle back and notes a move (``moves``), which travels with the step
and is made before anything else in it. A row is trimmed once its move was made.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from vllm.utils.math_utils import cdiv
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager, register_all_kvcache_specs
from vllm.v1.kv_cache_interface import AttentionSpec, FullAttentionSpec, replace_as
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

from kvprofile.budget.trim import DEFAULT_WINDOW, TrimRule
from kvprofile.runtime.moves import GroupMove
from kvprofile.runtime.stats import Life, counters


@dataclass(frozen=True, kw_only=True)
class StreamSpec(AttentionSpec):  # type: ignore[misc]
    """Cache of heads that keep sinks and window once their request decodes, and of a graded budget a ``share`` between.

    ``share`` is None where the budget is of whole heads. Not a FullAttentionSpec: vLLM would merge it with those.
    """

    sink_tokens: int
    recent_tokens: int
    window: str = DEFAULT_WINDOW
    share: float | None = None
    pool_block_bytes: int | None = None
    """Bytes of one block of the pool, once groups are packed."""
    groups: tuple[int, int] = (0, 1)
    """How many groups of full and of streaming parts there are, once groups are packed."""

    @property
    def trim(self) -> TrimRule:
        """The trim rule in blocks of this spec."""
        return TrimRule(self.sink_tokens, self.recent_tokens, self.block_size, self.window)

    def max_memory_usage_bytes(self, vllm_config: Any) -> int:
        """Bytes of the longest request: in prefill it holds everything."""
        return int(cdiv(vllm_config.model_config.max_model_len, self.block_size) * self.page_size_bytes)


_OWN_FIELDS = ("sink_tokens", "recent_tokens", "window", "share", "pool_block_bytes", "groups")


@dataclass(frozen=True)
class _Span:
    """Blocks of a span of a prompt, and how many blocks take what stays of it.

    ``key``: the hash of the prefix that ends with it, None where a span is cut off or nothing is hashed. ``shared``:
    blocks that a live request has moved it to.
    """

    blocks: list[Any]
    kept: int
    key: Any
    shared: list[Any] | None

    @property
    def numbers(self) -> list[int]:
        """Numbers of its blocks."""
        return [block.block_id for block in self.blocks]


@dataclass(frozen=True)
class _Moved:
    """Blocks that hold what stays of a span, and the requests that hold them."""

    blocks: list[Any]
    holders: set[str] = field(default_factory=set)


class StreamManager(FullAttentionManager):  # type: ignore[misc]
    """Full attention's block manager, and one thing more: after prefill it frees what the budget gives up."""

    def __init__(self, kv_cache_spec: StreamSpec, **kwargs: Any) -> None:
        super().__init__(kv_cache_spec, **kwargs)
        self._trim = kv_cache_spec.trim
        self._block_bytes = kv_cache_spec.pool_block_bytes or kv_cache_spec.page_size_bytes
        self._prefill_end: dict[str, int] = {}
        self._lives: dict[str, Life] = {}
        self._graded = kv_cache_spec.share is not None
        self._prompt_tokens: dict[str, int] = {}
        self._due: dict[str, list[_Span]] = {}
        self._moves: dict[str, GroupMove] = {}
        self._moved: dict[Any, _Moved] = {}  # spans that live requests may share, by the hash of their end
        self._holds: dict[str, list[Any]] = {}

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
        self,
        request_id: str,
        num_tokens: int,
        new_computed_blocks: Any,
        total_computed_tokens: int,
        *args: Any,
        apply_admission_cap: bool = False,
        **kwargs: Any,
    ) -> int:
        """Upstream's answer and, where tokens are to be moved, the blocks that this takes more than it gives back.

        The admission gate asks for the whole sequence, which says where prefill ends.
        """
        needed = super().get_num_blocks_to_allocate(
            request_id,
            num_tokens,
            new_computed_blocks,
            total_computed_tokens,
            *args,
            apply_admission_cap=apply_admission_cap,
            **kwargs,
        )
        if apply_admission_cap:
            self._prefill_end[request_id] = num_tokens
        elif self._graded and self._is_due(request_id, total_computed_tokens):
            spans = self._due[request_id] = self._spans(request_id)
            taken = sum(span.kept for span in spans if span.shared is None)
            # blocks that other requests hold too stay where they are
            given_back = sum(block.ref_cnt == 1 for span in spans for block in span.blocks)
            needed = max(0, needed + taken - given_back)
        return int(needed)

    def _spans(self, request_id: str) -> list[_Span]:
        """The spans of a prompt's middle, with what other requests have moved of them already."""
        found, share = [], self.kv_cache_spec.share
        start, blocks = self._trim.sink_blocks, self.req_to_blocks[request_id]
        for size, kept in self._trim.spans(share, self._prompt_tokens[request_id]):
            own = blocks[start : start + size]
            start += size
            # a prefix decides what stays of a span that ends with it, if no shorter one was cut off there
            key = own[-1].block_hash if kept and size == self._trim.span_blocks(share) else None
            known = self._moved.get(key) if key is not None else None
            found.append(_Span(own, kept, key, None if known is None else known.blocks))
        return found

    def _is_due(self, request_id: str, computed: int) -> bool:
        """Whether a request's prefill is computed, or will be when the next step runs, and it was not trimmed yet."""
        prefill_end = self._prefill_end.get(request_id)
        return prefill_end is not None and computed >= prefill_end and request_id not in self._lives

    def allocate_new_blocks(self, request_id: str, *args: Any, **kwargs: Any) -> Any:
        """Upstream's, after the tokens that stay have got their blocks where that is due.

        Those are not among the blocks returned, which workers append to the request's.
        """
        due = self._due.pop(request_id, None)
        if due is not None:
            self._move(request_id, due)
        return super().allocate_new_blocks(request_id, *args, **kwargs)

    def _move(self, request_id: str, spans: list[_Span]) -> None:
        """Give the middle of a prompt back, and take blocks for the tokens of it that stay."""
        life = self._lives[request_id] = Life(self._held(request_id))
        first, far = self._trim.sink_blocks, sum(len(span.blocks) for span in spans)
        middle = far + self._trim.near_blocks(self.kv_cache_spec.share, self._prompt_tokens[request_id])
        # what others have moved is held before anything is given back
        shared = [block for span in spans for block in span.shared or ()]
        self.block_pool.touch(shared)
        free = self.block_pool.get_num_free_blocks()
        self._give_back(request_id, first, first + far)
        freed = self.block_pool.get_num_free_blocks() - free
        targets = self.block_pool.get_new_blocks(sum(span.kept for span in spans if span.shared is None))
        # the row: spans moved by others as they are, the rest new, in the order of the text, then what is near
        row, left = [], iter(targets)
        for span in spans:
            mine = span.shared if span.shared is not None else [next(left) for _ in range(span.kept)]
            row += mine
            if span.key is not None:
                self._moved.setdefault(span.key, _Moved(mine)).holders.add(request_id)
        self._holds[request_id] = [span.key for span in spans if span.key is not None]
        blocks = self.req_to_blocks[request_id]
        row += blocks[first + far : first + middle]
        blocks[first : first + middle] = row + [self.block_pool.null_block] * (middle - len(row))
        moved = [span for span in spans if span.shared is None]
        self._moves[request_id] = GroupMove(
            first=first,
            kept=len(row),
            row=[block.block_id for block in blocks[first : first + middle]],
            sources=[number for span in moved for number in span.numbers],
            targets=[block.block_id for block in targets],
            spans=[(len(span.blocks), span.kept) for span in moved],
        )
        counters().kept(len(targets))
        life.kept = len(targets)
        self._freed(life, request_id, freed)

    def _give_back(self, request_id: str, first: int, stop: int) -> None:
        """Put the null block in place of the blocks [first, stop) of a request, and drop its hold on them."""
        self._remove_blocks_in_range(request_id, first, stop)

    def take_moves(self) -> dict[str, GroupMove]:
        """Moves that were noted since the last call, by request in the order of the schedule."""
        found, self._moves = self._moves, {}
        return found

    def remove_skipped_blocks(
        self, request_id: str, processed_computed_tokens: int, num_prompt_tokens: int | None = None
    ) -> None:
        """Free the blocks between sinks and window of the next token, once prefill has been processed.

        Raises ValueError where a window is anchored and vLLM does not say where the prompt ended.
        """
        if self._graded and num_prompt_tokens is not None:
            self._prompt_tokens[request_id] = num_prompt_tokens
        prefill_end = self._prefill_end.get(request_id)
        if prefill_end is None or processed_computed_tokens < prefill_end:
            return
        if num_prompt_tokens is None and self._trim.anchored:
            raise ValueError("this vLLM does not say how long a prompt is; set LLM_KVZIP_WINDOW=sliding")
        if self._graded:
            return  # they go at the step that moves
        life = self._lives.get(request_id)
        if life is not None and self._trim.anchored:
            return  # all that an anchored window gives up went at its first step
        free = self.block_pool.get_num_free_blocks()
        first_recent = self._trim.first_recent_block(processed_computed_tokens, num_prompt_tokens or 0)
        if life is None:  # this runs for every request at every step, and counting what it holds takes a while
            life = self._lives[request_id] = Life(self._held(request_id))
        self._give_back(request_id, self._trim.sink_blocks, first_recent)
        self._freed(life, request_id, self.block_pool.get_num_free_blocks() - free)

    def _freed(self, life: Life, request_id: str, blocks: int) -> None:
        """Count blocks that went back to the pool while their request goes on."""
        counters().reclaimed(blocks, self._block_bytes)
        life.reclaimed += blocks
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
        """Upstream's, for a request that finishes or is preempted.

        Of a move that was noted for it in this step, its row is forgotten. Tokens are moved all the same, for requests
        that share them by now; whoever is given the blocks otherwise writes them later.
        """
        for noted in (self._prompt_tokens, self._due):
            noted.pop(request_id, None)
        if request_id in self._moves:
            self._moves[request_id] = replace(self._moves[request_id], row=None)
        for key in self._holds.pop(request_id, ()):
            self._moved[key].holders.remove(request_id)
            if not self._moved[key].holders:  # counts of references may fall later
                del self._moved[key]
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
