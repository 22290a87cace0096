"""Layers that keep a state, in place of a key-value cache or next to one: which, and whether it can be followed.

Linear attention, state-space layers and short convolutions carry a state of fixed size from token to token. A text is
read in pieces here, so each piece must start from the state that the one before left. Some classes of transformers
start anew with every piece of more than one token, and say nothing.
"""

from __future__ import annotations

import contextlib
import sys
from typing import TYPE_CHECKING, Any

from kvprofile.checkpoint.rehearsal import cache_argument, on_meta, probing

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel
    from transformers.cache_utils import Cache


_FEED_FORWARD = ("mlp", "moe")
"""Types of layers, as transformers names them, that carry nothing from token to token."""


def states_of(config: PretrainedConfig) -> tuple[int, ...]:
    """How many states each layer keeps, as transformers' own cache has it; empty for a model of attention alone."""
    from transformers.cache_utils import DYNAMIC_LAYER_TYPE_MAPPING, DynamicCache, LinearAttentionCacheLayerMixin

    kinds = getattr(config.get_text_config(decoder=True), "layer_types", None) or ()
    classes = [DYNAMIC_LAYER_TYPE_MAPPING.get(kind, object) for kind in kinds]
    if not any(issubclass(each, LinearAttentionCacheLayerMixin) for each in classes):
        return ()
    return tuple(getattr(layer, "number_of_states", 0) for layer in DynamicCache(config=config).layers)


def remembers_nothing(config: PretrainedConfig, layer: int) -> bool:
    """Whether a layer is a feed-forward part alone, which Nemotron-H counts as a layer."""
    kinds = getattr(config.get_text_config(decoder=True), "layer_types", None) or ()
    return layer < len(kinds) and kinds[layer] in _FEED_FORWARD


def why_not_followed(model_class: type[PreTrainedModel], config: PretrainedConfig) -> str | None:
    """Why the states of a class of transformers cannot be followed through a text read in pieces; None if they can."""
    own = _own_cache(model_class)
    if own:
        return f"its class keeps states in a cache of its own ({own})"
    if _starts_anew(on_meta(config)):
        return (
            f"in transformers' {model_class.__name__} a layer's state starts anew with every piece of a text, "
            "so contexts cannot be read in pieces or continued"
        )
    return None


def _own_cache(model_class: type[PreTrainedModel]) -> str | None:
    """The cache class that a model's module brings, by name."""
    from transformers.cache_utils import Cache

    module = sys.modules[model_class.__module__]
    found = [each for each in vars(module).values() if isinstance(each, type) and issubclass(each, Cache)]
    return next((each.__name__ for each in found if each.__module__ == module.__name__), None)


def _starts_anew(model: PreTrainedModel) -> bool:
    """Whether nothing that a second piece of a text leads to depends on the recurrent states that the first one left.

    torch's own record of what depends on what answers, on the meta device, so no number is computed.
    """
    import torch
    from transformers.cache_utils import DynamicCache

    marked: list[torch.Tensor] = []
    reached: list[bool] = []

    def attend(
        _module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, None]:
        reached.append(any(each.requires_grad for each in (query, key, value)))
        return query.new_empty(query.shape[0], query.shape[2], query.shape[1], value.shape[-1]), None

    def update(states: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        reached.append(states.requires_grad)
        return states

    cache = DynamicCache(config=model.config)
    model.requires_grad_(False)
    with probing(model, attend):
        with torch.no_grad():
            _read(model, cache)
        reached.clear()
        for layer in cache.layers:
            held = getattr(layer, "recurrent_states", {})
            for index in [index for index, states in held.items() if states is not None]:
                held[index] = held[index].detach().requires_grad_()
                marked.append(held[index])
            layer.update_recurrent_state = update
        with torch.enable_grad():
            _read(model, cache)
    return bool(marked) and not any(reached)


def _read(model: PreTrainedModel, cache: Cache) -> None:
    """Read two tokens on the meta device, as far as that goes."""
    import torch

    ids = torch.zeros(1, 2, dtype=torch.long, device="meta")
    with contextlib.suppress(Exception):  # what depends on values cannot run here, such as the experts of a token
        held = {cache_argument(model.base_model): cache}
        model.base_model(input_ids=ids, position_ids=ids, use_cache=True, **held)
