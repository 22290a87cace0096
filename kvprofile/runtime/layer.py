"""One attention layer in parts: its full heads, and those that keep less of the context, each with its own cache.

vLLM's block tables are per cache group and a block holds all heads of a layer, so heads that free their blocks need a
layer name, a cache and a group of their own, and so do heads of a graded budget that keep equally much. A split layer
is still vLLM's ``Attention`` to the model around it; its parts take its place among the layers that have caches.
"""

from __future__ import annotations

import base64
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from vllm.config import get_current_vllm_config
from vllm.distributed import get_tensor_model_parallel_rank
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.models.utils import extract_layer_index
from vllm.v1.attention.backend import AttentionType
from vllm.v1.kv_cache_interface import replace_as

from kvprofile import unsupported
from kvprofile.budget.probe import Probe
from kvprofile.budget.probe import from_bytes as probe_of
from kvprofile.budget.trim import GRADED
from kvprofile.runtime import here
from kvprofile.runtime.backend import SERVED_CACHES, blocks_refused, with_layout, with_trimming
from kvprofile.runtime.engine_budget import EngineBudget, RankHeads
from kvprofile.runtime.stream_cache import StreamSpec

_FULL_ATTENTION_ONLY = ("sliding_window", "attention_chunk_size", "non_causal")
"""Fields of FullAttentionSpec that a StreamSpec lacks; none is set where layers are split."""


_GIVEN_SCALES = ("q_scale", "k_scale", "v_scale", "prob_scale")
"""What vLLM loads of a checkpoint whose cache is quantised, and keeps as buffers with an underscore in front."""

_SCALES_ON_HOST = ("_q_scale_float", "_k_scale_float", "_v_scale_float", "_prob_scale_float")
_TENSORS_ON_HOST = ("_k_scale_cpu", "_v_scale_cpu")


class FullPart(Attention):  # type: ignore[misc]
    """The heads of a layer that keep the whole context."""


class StreamPart(Attention):  # type: ignore[misc]
    """The heads of a layer that keep sinks, window and, in a graded budget, a ``share`` of what lies between.

    Which tokens those are, the weights [G, F] of its heads' probe say.
    """

    def __init__(
        self,
        *args: Any,
        budget: EngineBudget,
        share: float | None,
        probe_weights: torch.Tensor | None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.budget, self.share = budget, share
        self.register_buffer("probe_weights", probe_weights, persistent=False)

    @property
    def probe(self) -> Probe:
        """The probe of these heads, as layer 0 of a probe of their own."""
        return Probe((0,), self.probe_weights[None])

    def get_kv_cache_spec(self, vllm_config: Any) -> StreamSpec:
        """As the whole layer's, but a cache that is trimmed."""
        return replace_as(  # type: ignore[no-any-return]
            super().get_kv_cache_spec(vllm_config),
            StreamSpec,
            drop=_FULL_ATTENTION_ONLY,
            sink_tokens=self.budget.sink_tokens,
            recent_tokens=self.budget.recent_tokens,
            window=self.budget.window,
            share=self.share,
        )


@dataclass(frozen=True)
class Slices:
    """The slices of a layer's heads, once they are in order, that one part computes."""

    part: str
    queries: slice
    keys: slice


class SplitAttention(Attention):  # type: ignore[misc]
    """An ``Attention`` whose heads are computed by its parts; its own cache and kernel are never used.

    Heads come part by part where weights were loaded so (``permute``) or where they lie so in the model. Otherwise
    ``order`` names the KV heads part by part, and states are gathered and put back at every call.
    """

    parts: tuple[Slices, ...]
    order: tuple[int, ...] | None

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        output_shape: torch.Size | None = None,
        output_dtype: torch.dtype | None = None,
    ) -> torch.Tensor:
        """Query [n, H*D] or [n, H, D], key and value likewise with KV heads -> [n, H*Dv], as ``Attention.forward``."""
        tokens = query.shape[0]
        query = query.view(tokens, self.num_heads, self.head_size)
        key = key.view(tokens, self.num_kv_heads, self.head_size)
        value = value.view(tokens, self.num_kv_heads, self.head_size_v)
        if self.order is not None:
            query = query.index_select(1, self.query_order)
            key, value = key.index_select(1, self.key_order), value.index_select(1, self.key_order)
        found = [
            getattr(self, part.part)(
                query[:, part.queries], key[:, part.keys], value[:, part.keys], None, output_dtype
            ).view(tokens, -1, self.head_size_v)
            for part in self.parts
        ]
        output = torch.cat(found, dim=1) if len(found) > 1 else found[0]
        if self.order is not None:
            output = output.index_select(1, self.query_places)
        return output.view(output_shape or (tokens, -1))

    def process_weights_after_loading(self, act_dtype: torch.dtype) -> None:
        """Besides what vLLM does: its parts store their caches with the scales that were loaded for the layer."""
        super().process_weights_after_loading(act_dtype)
        for part in (getattr(self, each.part) for each in self.parts):
            for name in _GIVEN_SCALES:
                getattr(part, f"_{name}").copy_(getattr(self, f"_{name}"))
            for name in _SCALES_ON_HOST:
                setattr(part, name, getattr(self, name))
            for name in _TENSORS_ON_HOST:
                if hasattr(self, name):
                    getattr(part, name).copy_(getattr(self, name))

    def expect_in_order(self) -> None:
        """From now on heads come part by part: nothing is gathered."""
        self.order = None
        del self.query_order, self.key_order, self.query_places


def splitting(construct: Callable[..., None]) -> Callable[..., None]:
    """``Attention.__init__`` that splits the layer it has built, where the budget trims some of its heads.

    Raises ValueError for layers that no budget can apply to.
    """
    signature = inspect.signature(construct)

    def construct_and_split(self: Any, *args: Any, **kwargs: Any) -> None:
        construct(self, *args, **kwargs)
        config = get_current_vllm_config()
        budget = EngineBudget.of(config.additional_config)
        if type(self) is not Attention or self.attn_type != AttentionType.DECODER or budget.full == budget.heads:
            return
        here.require_attested(config.additional_config, self.attn_backend.get_name())
        refused = blocks_refused(self.attn_backend, config.cache_config.block_size)
        if refused:
            raise ValueError(f"kvprofile does not serve with {refused}")
        self.attn_backend = with_layout(self.attn_backend)  # every layer shares the pool, hence its layout
        rank, size = get_tensor_model_parallel_rank(), config.parallel_config.tensor_parallel_size
        index = extract_layer_index(self.layer_name)
        heads = budget.on_rank(index, rank, size)
        if heads is None:
            return
        _require_plain(self, sum(map(len, heads.by_share.values())))
        if min(heads.by_share) < 1.0:
            given = signature.bind(self, *args, **kwargs)
            given.apply_defaults()
            del config.compilation_config.static_forward_context[self.layer_name]
            _split(self, dict(given.arguments), heads, budget, index)

    return construct_and_split


def _require_plain(layer: Any, kv_heads: int) -> None:
    """Refuse what a budgeted layer cannot have: state kept per head on the layer, or a window of its own."""
    found = unsupported.holding(
        {
            "its KV heads are not those of the budget": layer.num_kv_heads != kv_heads,
            "it slides, the budget says it does not": layer.sliding_window is not None,
            "it has learned sinks": layer.has_sink,
            "it shares another layer's cache": layer.kv_sharing_target_layer_name is not None,
            "it has ALiBi slopes": getattr(layer.impl, "alibi_slopes", None) is not None,
            f"its cache is stored as {layer.kv_cache_dtype}": layer.kv_cache_dtype not in SERVED_CACHES,
            "its cache has a scale for every head": any(
                getattr(layer, name).numel() > 1 for name in _GIVEN_SCALES if hasattr(layer, name)
            ),
            "scales of its cache are found while it serves": getattr(layer, "calculate_kv_scales", False),
        }
    )
    if found:
        raise ValueError(f"kvprofile cannot trim heads of {layer.layer_name}: {', '.join(found)}")


def _split(layer: Any, given: dict[str, Any], heads: RankHeads, budget: EngineBudget, index: int) -> None:
    """Make ``layer``, the model's layer ``index`` built with the arguments ``given``, a SplitAttention."""
    common = {**given.pop("extra_impl_args"), **given}
    for name in ("self", "num_heads", "num_kv_heads", "prefix", "attn_backend"):
        del common[name]
    group = layer.num_heads // layer.num_kv_heads
    parts: list[Slices] = []
    order: tuple[int, ...] = ()
    for share, mine in sorted(heads.by_share.items(), key=lambda part: part[1]):  # by their first heads
        own: dict[str, Any] = {"attn_backend": layer.attn_backend}
        if share < 1.0:
            own = {"attn_backend": with_trimming(layer.attn_backend), "budget": budget, "share": None}
            own["probe_weights"] = None
            if budget.kind == GRADED:
                own["share"] = share
                own["probe_weights"] = probe_weights(budget.probe or "", index, [heads.first + head for head in mine])
        name = _name(share, heads)
        prefix = f"{layer.layer_name}.{name}"
        kind = FullPart if share == 1.0 else StreamPart
        setattr(layer, name, kind(len(mine) * group, num_kv_heads=len(mine), prefix=prefix, **common, **own))
        first, last = len(order), len(order) + len(mine)
        parts.append(Slices(name, slice(first * group, last * group), slice(first, last)))
        order += mine
    layer.__class__ = SplitAttention
    layer.parts = tuple(parts)
    layer.order = None if order == tuple(range(len(order))) else order
    if layer.order is not None:
        queries = torch.tensor([head * group + member for head in order for member in range(group)])
        layer.register_buffer("query_order", queries, persistent=False)
        layer.register_buffer("key_order", torch.tensor(order), persistent=False)
        layer.register_buffer("query_places", queries.argsort(), persistent=False)


def _name(share: float, heads: RankHeads) -> str:
    """Of a part: full, stream, and stream_2 and so on for what keeps less where there are several."""
    number = [each for each in heads.by_share if each < 1.0].index(share) + 1 if share < 1.0 else 0
    return "full" if share == 1.0 else "stream" if number == 1 else f"stream_{number}"


@cache
def _probe(encoded: str) -> Probe:
    """The probe of a budget, read once in a process."""
    return probe_of(base64.b64decode(encoded))


def probe_weights(encoded: str, layer: int, heads: Sequence[int]) -> torch.Tensor:
    """Weights [heads, F] of some of a layer's heads, counted over the whole model."""
    probe = _probe(encoded)
    return probe.weights[probe.layers.index(layer)][list(heads)].to(torch.get_default_device())
