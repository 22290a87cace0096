"""The attention function that scores: registered with transformers for the time of a run, and nothing patched.

While a context is prefilled it computes plain causal attention. While a chunk is repeated it computes the same, and
next to it the softmax of every repeat row over prefix, chunk and repeat alone, of which it keeps, for each KV head
and chunk position, the maximum over rows and over the query heads of the group (KVzip, arXiv 2505.23416, equation 3).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import AttentionInterface, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface

from kvprofile.budget.profile import Geometry
from kvprofile.checkpoint.rehearsal import refuse_other_heads
from kvprofile.errors import InputError
from kvprofile.scoring import kernels
from kvprofile.scoring.contribution import Contributions
from kvprofile.scoring.effort import REST_STRIDE, sparse_rest
from kvprofile.scoring.kernels import Part

NAME = "kvprofile_reconstruction"
LOGIT_BLOCK_VALUES, DEVICE_LOGIT_BLOCK_VALUES = 2**19, 2**22
"""Most logits held at once while scoring, whatever context and chunk: 2 MiB on a CPU, whose caches they should not
leave, 16 MiB on other devices, where each block costs a launch."""

SCORED_KEYS = 512
"""Chunk keys in a block on a CPU: few, so that a block has enough rows to be worth packing them."""


class AllLayersDone(Exception):  # noqa: N818 - it ends a forward pass early and is not an error
    """Raised inside a forward pass once the last layer that matters has done its part."""


@dataclass
class Recorder:
    """What the attention function needs to know of the pass under way, and what it found.

    ``chunk`` is None while prefilling, else the absolute positions [start, stop) of the chunk being repeated. With
    ``sparse_rows`` the rows of a repeat see few tokens of the rest of the context (``effort.sparse_rest``); what they
    are scored over stays whole, but scores are no longer exact. With ``contributions`` they are those of KVzip+.
    """

    geometry: Geometry
    sparse_rows: bool = False
    contributions: Contributions | None = None
    prefix_tokens: int = 0
    query_start: int = 0
    chunk: tuple[int, int] | None = None
    token_scores: dict[int, torch.Tensor] = field(default_factory=dict)
    layers_seen: set[int] = field(default_factory=set)
    _kernels: dict[tuple[object, ...], kernels.Fused | None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.profiled = frozenset(self.geometry.profiled_layers)
        self.last_layer = max(self.profiled)

    def fused(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> kernels.Fused | None:
        """The fused kernel for these tensors, chosen once for each kind of tensor; None for plain products."""
        group = query.shape[1] // key.shape[1]
        what = (query.device.type, query.dtype, query.shape[-1], group, value.shape[-1])
        if what not in self._kernels:
            same_size = value.shape[-1] == key.shape[-1]
            choice = (
                kernels.choose_fused(query.device, query.dtype, query.shape[-1], group) if same_size else (None, "")
            )
            self._kernels[what] = choice[0]
        return self._kernels[what]


current: list[Recorder] = []


@contextmanager
def recording(
    model: PreTrainedModel,
    geometry: Geometry,
    *,
    sparse_rows: bool = False,
    contributions: Contributions | None = None,
) -> Iterator[Recorder]:
    """Route a model's attention through the recorder, and put everything back afterwards.

    Not re-entrant, and one model at a time, because transformers' registry is global: raises RuntimeError for another.
    """
    if current:
        raise RuntimeError("a model is being scored already in this process")
    recorder = Recorder(geometry, sparse_rows, contributions)
    current.append(recorder)
    try:
        with routed(model, NAME, _attention):
            yield recorder
    finally:
        current.clear()


@contextmanager
def routed(model: PreTrainedModel, name: str, attend: Callable[..., Any]) -> Iterator[None]:
    """Make ``attend`` a model's attention function under a name of its own, without masks, and put the old one back."""
    before = model.config._attn_implementation
    AttentionInterface.register(name, attend)
    AttentionMaskInterface.register(name, no_mask)
    try:
        model.set_attn_implementation(name)
        yield
    finally:
        model.set_attn_implementation(before)
        AttentionInterface._global_mapping.pop(name, None)
        AttentionMaskInterface._global_mapping.pop(name, None)


def no_mask(*_args: Any, **_kwargs: Any) -> None:
    """Masks follow from positions here, so none is ever built."""


def _attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: object = None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **_others: Any,
) -> tuple[torch.Tensor, None]:
    """What transformers calls: query [1, H, n, D], key and value [1, G, m, D] -> output [1, n, H, D]."""
    if attention_mask is not None:
        raise InputError("the model brings its own attention mask, which kvprofile cannot score under")
    recorder = current[0]
    layer = int(module.layer_idx)  # type: ignore[arg-type]
    recorder.layers_seen.add(layer)
    check_shapes(recorder, layer, query, key, sliding_window)
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    if layer not in recorder.profiled:
        key_start = recorder.query_start + query.shape[2] - key.shape[2]
        part = kernels.blocked(
            query,
            key,
            value,
            scale,
            query_start=recorder.query_start,
            key_start=key_start,
            softcap=softcap,
            window=sliding_window,
        )
        part = kernels.merge([part], s_aux)
    else:
        part = _full_layer(recorder, layer, query, key, value, scale, softcap, s_aux)
    return part.output.transpose(1, 2).contiguous(), None  # some models view it, as eager attention allows


def _full_layer(
    recorder: Recorder,
    layer: int,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> Part:
    start = recorder.query_start

    def part(first: int, stop: int, causal: bool = False) -> list[Part]:
        if first >= stop:
            return []
        return [span(recorder, query, key[:, :, first:stop], value[:, :, first:stop], scale, softcap, first, causal)]

    # reading the context: plain causal attention; of the last layer only the keys are needed
    if recorder.chunk is None:
        if layer == recorder.last_layer:
            raise AllLayersDone
        return kernels.merge(part(0, start) + part(start, key.shape[2], causal=True), sinks)

    # a repeat: the softmax over prefix, chunk and repeat alone scores the chunk's keys
    first, stop = recorder.chunk
    scored = part(0, recorder.prefix_tokens) + part(first, stop) + part(start, key.shape[2], causal=True)
    normaliser = kernels.merge_lse([p.lse for p in scored], sinks)
    weights = None
    if recorder.contributions is not None:
        normaliser = normaliser + recorder.contributions.log_row_norms[layer].to(normaliser.device)
        weights = recorder.contributions.log_value_norms(layer, value[:, :, first:stop])
    recorder.token_scores[layer] = chunk_scores(query, key[:, :, first:stop], normaliser, scale, softcap, weights)
    if layer == recorder.last_layer:
        raise AllLayersDone
    # its output sees the rest of the context too, so that the layers above read what the model would
    if not recorder.sparse_rows:
        return kernels.merge(scored + part(recorder.prefix_tokens, first) + part(stop, start), sinks)
    before, after, recent = sparse_rest(recorder.prefix_tokens, recorder.chunk, start)
    # or, sparsely, the end of the context and one token in REST_STRIDE of the others, each weighing for that many
    rest = part(recent.start, recent.stop)
    samples = torch.tensor([*before, *after], device=key.device)
    if len(samples):
        found = span(recorder, query, key[:, :, samples], value[:, :, samples], scale, softcap, 0, causal=False)
        rest.append(Part(found.output, found.lse + math.log(REST_STRIDE)))
    return kernels.merge(scored + rest, sinks)


def span(
    recorder: Recorder,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float,
    softcap: float | None,
    key_start: int,
    causal: bool,
) -> Part:
    """Attention of query [1, H, n, D] to key and value [1, G, m, D] at key_start.., all before it unless ``causal``."""
    fused = recorder.fused(query, key, value) if softcap is None else None
    if fused is not None:
        return fused(query, key, value, scale, causal)
    query_start = recorder.query_start
    return kernels.blocked(query, key, value, scale, query_start=query_start, key_start=key_start, softcap=softcap)


def chunk_scores(
    query: torch.Tensor,
    key: torch.Tensor,
    normaliser: torch.Tensor,
    scale: float,
    softcap: float | None,
    weights: torch.Tensor | None = None,
) -> torch.Tensor:
    """Token scores [G, m] of a chunk's keys [1, G, m, D], on the CPU in float32.

    query [1, H, n, D]; normaliser [1, H, n] is the log-sum-exp over prefix, chunk and repeat. The maximum is taken
    over logits minus normaliser, so each key is exponentiated once. Where logits are not capped, scale and normaliser
    are part of the product, so that a block is written once and read once.

    ``weights`` [H, m] are logs of what the attention of a query head to a key is multiplied by. Such products x have no
    bound, so their score is x / (1 + x), which keeps their order.
    """
    kv_heads, count = key.shape[1], key.shape[2]
    on_cpu = key.device.type == "cpu"
    keys_at_once = min(count, SCORED_KEYS) if on_cpu else count
    block = LOGIT_BLOCK_VALUES if on_cpu else DEVICE_LOGIT_BLOCK_VALUES
    rows_at_once = max(1, block // (query.shape[1] * keys_at_once))
    # running maximum over rows and query heads, [G, m]
    best = torch.full((kv_heads, count), -torch.inf, device=key.device)
    keys = key.float()
    # a column of ones times -normaliser subtracts it within the product
    if softcap is None:
        keys = torch.cat([keys, keys.new_ones(1, kv_heads, count, 1)], -1)
    for first_row in range(0, query.shape[2], rows_at_once):
        rows = slice(first_row, first_row + rows_at_once)
        folded = kernels.fold_groups(query[:, :, rows], kv_heads).float()
        less = normaliser[:, :, rows].reshape(1, kv_heads, -1, 1)
        if softcap is None:
            folded = torch.cat([folded * scale, -less], -1)
        for first in range(0, count, keys_at_once):
            some = keys[:, :, first : first + keys_at_once]
            if softcap is None:
                logits = torch.matmul(folded, some.transpose(-1, -2))
            else:
                logits = kernels.logits_of(folded, some, scale, softcap).sub_(less)
            if weights is None:
                largest = logits[0].amax(1)
            else:  # a weight is the same for all rows of a query head
                mine = weights[:, first : first + keys_at_once].reshape(kv_heads, -1, some.shape[2])
                largest = (logits[0].view(*mine.shape[:2], -1, some.shape[2]).amax(2) + mine).amax(1)
            part = best[:, first : first + keys_at_once]
            torch.maximum(part, largest, out=part)
    return (best.exp_().clamp_(max=1.0) if weights is None else best.sigmoid_()).cpu()


def check_shapes(recorder: Recorder, layer: int, query: torch.Tensor, key: torch.Tensor, window: int | None) -> None:
    """Raise InputError where a layer is not of the shape that the config states, or slides where it should not.

    query [1, H, n, D], key [1, G, m, D]; ``window`` in tokens.
    """
    geometry = recorder.geometry
    refuse_other_heads(geometry, layer, query.shape[1], key.shape[1], key.shape[-1])
    if layer in recorder.profiled and window and window < recorder.query_start + query.shape[2]:
        raise InputError(
            f"layer {layer} slides over {window} tokens, but the config calls it {geometry.layer_types[layer]}"
        )
