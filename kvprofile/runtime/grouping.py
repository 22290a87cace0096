"""vLLM's cache groups for split layers: ``packing`` decides, this module speaks vLLM's types."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from vllm.utils.math_utils import cdiv
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheGroupSpec, MambaSpec, UniformTypeKVCacheSpecs

from kvprofile.budget.trim import ANCHORED, GRADED
from kvprofile.runtime.engine_budget import EngineBudget
from kvprofile.runtime.packing import Piece, pack
from kvprofile.runtime.settings import logger
from kvprofile.runtime.stream_cache import StreamSpec

Groups = list[Any]

TYPICAL_TOKENS = 2048
"""Length of the request that widths are compared for, unless the model's longest is shorter."""


def budgeted(stock: Callable[[Any, dict[str, Any]], Groups]) -> Callable[[Any, dict[str, Any]], Groups]:
    """``get_kv_cache_groups`` that packs split layers, and leaves models without any to ``stock``.

    Raises ValueError where the model's layers are not split as the budget says: such a model must not be served.
    """

    def get_kv_cache_groups(vllm_config: Any, kv_cache_spec: dict[str, Any]) -> Groups:
        budget = EngineBudget.of(vllm_config.additional_config)
        expected = budget.trimmed_heads_per_rank(vllm_config.parallel_config.tensor_parallel_size)
        found = sum(spec.num_kv_heads for spec in kv_cache_spec.values() if isinstance(spec, StreamSpec))
        if found != expected:
            raise ValueError(
                f"the budget trims {expected} KV heads, the model's layers {found}; kvprofile is not in force"
            )
        if not expected:
            return stock(vllm_config, kv_cache_spec)
        return _groups(kv_cache_spec, budget, vllm_config)

    return get_kv_cache_groups


def _groups(specs: Mapping[str, Any], budget: EngineBudget, vllm_config: Any) -> Groups:
    tokens = min(TYPICAL_TOKENS, vllm_config.model_config.max_model_len)
    specs = {name: _unpadded(spec) for name, spec in specs.items()}
    packing = pack([_piece(name, spec, tokens) for name, spec in specs.items()])
    logger.info(
        "kvprofile applied: %d of %d KV heads keep the whole context, the others %d sinks%s and the last %d tokens%s; "
        "%s",
        budget.full,
        budget.heads,
        budget.sink_tokens,
        ", a share of what follows" if budget.kind == GRADED else "",
        budget.recent_tokens,
        " of the prompt and all that comes after it" if budget.window == ANCHORED else "",
        packing.reason(),
    )
    kinds = [specs[group[0].name] for group in packing.groups]
    streaming = sum(isinstance(spec, StreamSpec) for spec in kinds)
    counts = sum(isinstance(spec, FullAttentionSpec) for spec in kinds), streaming
    groups = []
    for group in packing.groups:
        names = [piece.name for piece in group]
        if isinstance(specs[names[0]], MambaSpec):  # vLLM looks for states among specs that stand alone
            groups.append(KVCacheGroupSpec(names, specs[names[0]]))
            continue
        placed = {name: _placed(specs[name], packing.width, counts) for name in names}
        uniform = UniformTypeKVCacheSpecs.from_specs(placed)
        if uniform is None:
            raise ValueError(f"caches of one kind differ in block size: {', '.join(names)}")
        groups.append(KVCacheGroupSpec(names, uniform))
    return groups


def _unpadded(spec: Any) -> Any:
    """A state's spec without the padding to a page of attention, which blocks of one width do not need."""
    return replace(spec, page_size_padded=None) if isinstance(spec, MambaSpec) else spec


def _placed(spec: Any, block_bytes: int, groups: tuple[int, int]) -> Any:
    """A streaming part's spec that knows what a block it gives back is worth, and which groups there are."""
    return replace(spec, pool_block_bytes=block_bytes, groups=groups) if isinstance(spec, StreamSpec) else spec


def _piece(name: str, spec: Any, tokens: int) -> Piece:
    """What ``packing`` needs to know of a cache: what a request of that many tokens holds of it."""
    window = getattr(spec, "sliding_window", None)
    whole = tokens if window is None else min(tokens, window)
    held = spec.trim.held_tokens(tokens, tokens, spec.share or 0.0) if isinstance(spec, StreamSpec) else whole
    blocks = cdiv(held, spec.block_size), cdiv(whole, spec.block_size)
    return Piece(name, _kind(spec), spec.page_size_bytes, *blocks)


def _kind(spec: Any) -> str:
    """Caches of one kind may share a group: same type, block size, window and share; states of one form."""
    if isinstance(spec, MambaSpec):
        return repr(spec)
    window, share = getattr(spec, "sliding_window", None), getattr(spec, "share", None)
    return f"{type(spec).__name__}:{spec.block_size}:{window}:{share}"
