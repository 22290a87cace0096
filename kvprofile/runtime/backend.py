"""What attention backends need besides their own code: the block-outermost layout, and the trimmed view of a request.

The view is made where a backend's metadata is built: from each row that decodes, the block table drops the blocks
between sinks and window, and the sequence gets shorter by as many tokens. Kernels never know. Nothing here waits for
the device, and what CUDA graphs capture lives in buffers that stay where they are.

An anchored window begins where it began when the prompt ended. How long the prompts of a batch are is not in the
metadata, nor which rows' tokens were moved together (``moves``), so the model runners note both before they make it
(``noting_rows``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.attention.backend import MultipleOf, subclass_attention_backend_with_overrides
from vllm.v1.kv_cache_interface import KVCacheLayout

from kvprofile import unsupported
from kvprofile.budget.dtypes import FLOAT8_NAMES
from kvprofile.runtime import moves

LAYOUT = KVCacheLayout.BLHNC
"""Blocks outermost: parts of a layer have pages of different size, which share blocks of one width."""

KERNELS_TAKE_STRIDES = frozenset({"CPU_ATTN"})
"""Backends that do not declare LAYOUT but read caches by their strides, as tests on the real engine show."""

SERVED_CACHES = (*unsupported.PLAIN_CACHES, *FLOAT8_NAMES)
"""Values of vLLM's ``kv_cache_dtype`` that heads with budgets have been served with."""

Numbers = np.ndarray[Any, np.dtype[np.int64]]


@dataclass(frozen=True)
class Rows:
    """The batch whose metadata is being made: tokens of each row's prompt; padding may lack them.

    ``kept`` says of a graded budget how many blocks a row keeps between sinks and window, by share, once it was moved.
    """

    prompts: np.ndarray[Any, Any]
    kept: Sequence[Mapping[float, int] | None] = ()

    def blocks_kept(self, share: float, count: int) -> Numbers:
        """Blocks that each of ``count`` rows keeps, [count]; -1 where nothing was moved."""
        found = [-1 if row is None else row[share] for row in self.kept[:count]]
        return np.array(found + [-1] * (count - len(found)), dtype=np.int64)


_rows: list[Rows] = []
"""Empty while an engine warms up, on batches of no request."""


def note_rows(rows: Rows) -> None:
    """The batch whose metadata is made next."""
    _rows[:] = [rows]


def noting_rows(stock: Callable[..., Any]) -> Callable[..., Any]:
    """``GPUModelRunner._build_attention_metadata`` of model runner V1, for the batch that it reads too."""

    def _build_attention_metadata(self: Any, *args: Any, **kwargs: Any) -> Any:
        batch = self.input_batch
        note_rows(Rows(batch.num_prompt_tokens, moves.rows_of(self, batch.req_ids)))
        return stock(self, *args, **kwargs)

    return _build_attention_metadata


def noting_rows_v2(stock: Callable[..., Any]) -> Callable[..., Any]:
    """``GPUModelRunner.prepare_attn`` of model runner V2, which comes before metadata is made."""

    def prepare_attn(self: Any, input_batch: Any, *args: Any, **kwargs: Any) -> Any:
        prompts = self.req_states.prompt_len.np[input_batch.idx_mapping_np]
        note_rows(Rows(prompts, moves.rows_of(self, input_batch.req_ids)))
        return stock(self, input_batch, *args, **kwargs)

    return prepare_attn


def blocks_refused(backend: Any, block_tokens: int) -> str | None:
    """A phrase where a backend's kernels do not read blocks of so many tokens whole, which blocks of LAYOUT need.

    vLLM would cut them into blocks of its kernels, which only layouts allow that kvprofile cannot use.
    """
    sizes = backend.get_supported_kernel_block_sizes()
    fits = (block_tokens % size.base == 0 if isinstance(size, MultipleOf) else block_tokens == size for size in sizes)
    if not sizes or any(fits):  # none named: all fit
        return None
    listed = " or ".join(f"a multiple of {size.base}" if isinstance(size, MultipleOf) else str(size) for size in sizes)
    return f"blocks of {block_tokens} tokens in attention backend {backend.get_name()}; set --block-size to {listed}"


@cache
def with_layout(backend: Any) -> Any:
    """``backend`` in LAYOUT, otherwise as it is. Raises ValueError where its kernels cannot read that."""
    declared = backend.supported_kv_cache_layouts()
    if declared is not None and LAYOUT not in declared and backend.get_name() not in KERNELS_TAKE_STRIDES:
        raise ValueError(
            f"attention backend {backend.get_name()} cannot read the {LAYOUT.name} layout, which kvprofile needs"
        )
    return _override("Budgeted", backend, {"supported_kv_cache_layouts": classmethod(lambda _: (LAYOUT,))})


@cache
def with_trimming(backend: Any) -> Any:
    """``backend``, which is in LAYOUT already, where rows that decode see what their budget left of the context."""
    builder = _trimming(backend.get_builder_cls())
    return _override("Trimming", backend, {"get_builder_cls": staticmethod(lambda: builder)})


def _override(prefix: str, backend: Any, overrides: dict[str, Any]) -> Any:
    return subclass_attention_backend_with_overrides(prefix, backend, overrides)


def _trimming(base: Any) -> Any:
    class TrimmingBuilder(base):  # type: ignore[misc]
        """The backend's metadata builder, fed with trimmed rows."""

        supports_update_block_table = False  # the shortcut would hand the raw block table to the kernel

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            rows = self.vllm_config.scheduler_config.max_num_seqs
            spec = self.kv_cache_spec
            self._view = TrimmedView(spec.trim, rows, self.device, spec.share)

        def build(self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False) -> Any:
            return super().build(common_prefix_len, once(self._view, common_attn_metadata), fast_build)

    return TrimmingBuilder


_latest: list[tuple[Any, Any, Any]] = []
"""The metadata that was last rewritten, by which rule and share, and what became of it."""


def once(view: TrimmedView, metadata: Any) -> Any:
    """``metadata`` as ``view`` rewrites it; where the builder before asked the same of the same, its answer.

    Parts of one cache group that differ in heads have builders of their own, which all are given the group's metadata.
    """
    asked = view.trim, view.share
    if not _latest or _latest[0][0] is not metadata or _latest[0][1] != asked:
        _latest[:] = [(metadata, asked, view.of(metadata))]
    return _latest[0][2]


class TrimmedView:
    """Rewrites batch metadata of up to ``rows`` requests; its results live until the next call.

    ``share`` is what the heads keep between sinks and window if the budget is graded, None where it is of whole heads.
    """

    def __init__(self, trim: Any, rows: int, device: torch.device, share: float | None = None) -> None:
        self.trim, self.device, self.share = trim, device, share
        self.lengths = torch.zeros(rows, dtype=torch.int32, device=device)
        self.table = torch.empty(rows, 0, dtype=torch.int32, device=device)
        self.columns = torch.empty(0, dtype=torch.int64, device=device)

    def of(self, metadata: Any) -> Any:
        """``metadata`` (CommonAttentionMetadata) as a trimmed head sees it; longest lengths stay upper bounds."""
        count, table = metadata.num_reqs, metadata.block_table_tensor
        width = table.shape[1]
        if self.table.shape[1] != width:
            self._allocate(width)
        # on the CPU: what each row leaves out, and how much is left of the longest
        skipped = self.skipped_blocks(metadata)
        skipped_tokens = skipped * self.trim.block_tokens
        bounds = metadata.seq_lens_cpu_upper_bound[:count].numpy() - skipped_tokens
        longest = max(1, int(bounds.max(initial=1)))
        used = min(width, -(-longest // self.trim.block_tokens))
        # on the device: the columns in use name the blocks that are left
        numbers = torch.from_numpy(np.stack([skipped, self._borders(count), skipped_tokens]))
        skip, border, tokens = async_tensor_h2d(numbers, device=self.device)
        columns = self.columns[:used]
        source = (columns + skip[:, None] * (columns >= border[:, None])).clamp_(max=width - 1)
        torch.gather(table[:count], 1, source, out=self.table[:count, :used])
        torch.sub(metadata.seq_lens[:count], tokens, out=self.lengths[:count])
        return metadata.replace(
            block_table_tensor=self.table[:count],
            seq_lens=self.lengths[:count],
            seq_lens_cpu_upper_bound=torch.from_numpy(bounds.astype(np.int32)),
            # while graphs are captured nothing is trimmed, and the bound is the model's, not that of the lengths given
            max_seq_len=min(metadata.max_seq_len, longest) if skipped.any() else metadata.max_seq_len,
            _num_computed_tokens_cache=None,
        )

    def skipped_blocks(self, metadata: Any) -> Numbers:
        """Blocks that each row leaves out, [num_reqs]."""
        count = metadata.num_reqs
        position = metadata.seq_lens_cpu_upper_bound[:count].numpy().astype(np.int64) - 1
        if self.trim.anchored:
            prompts = _rows[0].prompts[:count] if _rows else np.zeros(count, np.int64)
            np.minimum(position[: len(prompts)], prompts, out=position[: len(prompts)])
        first_recent = (position + 1 - self.trim.recent_tokens) // self.trim.block_tokens
        middle = np.maximum(first_recent - self.trim.sink_blocks, 0)
        if self.share is None:
            skipped: Numbers = middle * self._decodes(metadata)
        else:
            kept = self._kept(count)
            skipped = np.maximum(middle - kept, 0) * (kept >= 0)
        return skipped

    def _borders(self, count: int) -> Numbers:
        """The first block that each of ``count`` rows leaves out, if it leaves out any."""
        borders: Numbers = np.maximum(self._kept(count), 0) + int(self.trim.sink_blocks)
        return borders

    def _kept(self, count: int) -> Numbers:
        """Blocks that each of ``count`` rows keeps between sinks and window, -1 where nothing was moved."""
        if self.share is None or not _rows:
            return np.full(count, -1, np.int64)
        return _rows[0].blocks_kept(self.share, count)

    def _decodes(self, metadata: Any) -> np.ndarray[Any, np.dtype[np.bool_]]:
        """Rows of whole heads that are trimmed: they bring one token and are not flagged as prefilling.

        Flags may cover fewer rows than a padded batch has; padding brings no token.
        """
        count = metadata.num_reqs
        decodes: np.ndarray[Any, np.dtype[np.bool_]] = np.diff(metadata.query_start_loc_cpu[: count + 1].numpy()) == 1
        flagged = metadata.is_prefilling[:count].numpy()
        decodes[: len(flagged)] &= ~flagged
        decodes[len(flagged) :] = False
        return decodes

    def _allocate(self, width: int) -> None:
        self.table = torch.zeros(len(self.lengths), width, dtype=torch.int32, device=self.device)
        self.columns = torch.arange(width, device=self.device)
