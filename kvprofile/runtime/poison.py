"""A switch for debugging: blocks that the trim frees are filled with NaN, so reading one shows in every output.

With ``LLM_KVZIP_POISON=1`` the scheduler sends the numbers of freed blocks along with those of new ones, which vLLM can
have zeroed before use: freed blocks as ``~number``. The worker fills freed blocks with NaN and new ones with zeros,
because kernels may multiply unused slots of a block by a weight of zero. Blocks that prefix caching may hand out again
are spared. On the CPU only.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from vllm.v1.kv_cache_interface import KVCacheConfig
from vllm.v1.worker.cpu_model_runner import CPUModelRunner

from kvprofile.runtime.patching import Patch
from kvprofile.runtime.stream_cache import StreamManager

FLOAT8_NAN = 0x7F
"""The byte that is not a number in either kind of 8-bit floats."""


def _noting_freed(stock: Callable[..., None]) -> Callable[..., None]:
    def _give_back(self: Any, request_id: str, *args: Any, **kwargs: Any) -> None:
        before = list(self.req_to_blocks.get(request_id, ()))
        stock(self, request_id, *args, **kwargs)
        after = self.req_to_blocks.get(request_id, ())
        self.new_block_ids.extend(
            ~old.block_id
            for old, new in zip(before, after, strict=True)
            if new is not old and old.ref_cnt == 0 and old.block_hash is None
        )

    return _give_back


def _filling(stock: Callable[..., None]) -> Callable[..., None]:
    del stock  # zeroes groups of plain full attention only

    def _zero_block_ids(self: Any, block_ids: list[int]) -> None:
        layers = self.compilation_config.static_forward_context
        names = [name for group in self.kv_cache_config.kv_cache_groups for name in group.layer_names]
        freed, new = [~block for block in block_ids if block < 0], [block for block in block_ids if block >= 0]
        for blocks, poisoned in ((freed, True), (new, False)):  # in this order: a freed block may be new again
            for name in names:
                held = layers[name].kv_cache  # of a layer that keeps a state a tuple of them
                for each in held if isinstance(held, tuple) else (held,):
                    value = 0 if not poisoned else float("nan") if each.is_floating_point() else FLOAT8_NAN
                    each.index_fill_(0, torch.tensor(blocks, dtype=torch.int64), value)

    return _zero_block_ids


PATCHES = (
    Patch(KVCacheConfig, "needs_kv_cache_zeroing", lambda _: property(lambda _: True)),
    Patch(StreamManager, "_give_back", _noting_freed),
    Patch(CPUModelRunner, "_zero_block_ids", _filling),
)
