"""Loading rehearsed on torch's meta device: every tensor finds its place, every layer its heads, and nothing is read.

transformers only warns about tensors that it does not find, does not know or cannot cast, and fills gaps with random
numbers. Here each of these is an error, or a decision that is said.
"""

from __future__ import annotations

import copy
import inspect
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvprofile.budget.profile import Geometry
from kvprofile.checkpoint.gguf import GgufFile, check_values
from kvprofile.checkpoint.weights import Tensor
from kvprofile.errors import InputError, first_line

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel

_VALUES = {"F64", "F32", "F16", "BF16"}
_STATES = {"BOOL", "I16", "I32", "I64"}
"""Dtypes, as safetensors names them, of weights and of buffers; all others are somebody's quantisation."""

_LEFT_OUT = {
    "layers for speculative decoding": r"(^|\.)mtp(_\w+)?\.",
    "an encoder of images or sound": r"(^|\.)(vision|visual|audio|image|multi_modal|multimodal|mm_)\w*\.",
    "scales of a quantised cache, which scores are not taken with": r"\.(self_attn|attn|attention|k_proj|v_proj)"
    r"\.(k|v|q|prob)_scale$",
}
"""Tensors that a text model does without, by what they are."""

_PROBE = "kvprofile_rehearsal"


def rehearse(
    folder: Path, config: PretrainedConfig, geometry: Geometry, tensors: Iterable[Tensor], *, needs_head: bool = False
) -> tuple[str, ...]:
    """What a checkpoint's tensors hold besides the model, in words, each left out on purpose.

    Raises InputError where a tensor is missing, is of another shape, is quantised in a way that nothing tells, or is
    not part of the model; and where layers are not of the shape that the config states.
    """
    import torch
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    model_class = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    known = [tensor for tensor in tensors if not _ignored_by(model_class, tensor.name)]
    quantised = [tensor for tensor in known if tensor.dtype not in _VALUES | _STATES and not left_out(tensor.name)]
    if quantised:
        raise InputError(
            f"{folder}: {quantised[0].name} is stored as {quantised[0].dtype}, and nothing says how it was quantised; "
            "give the checkpoint as it was before, or one whose config.json has a quantization_config"
        )
    try:
        meta = {tensor.name: torch.empty(tensor.shape, dtype=torch.bfloat16, device="meta") for tensor in known}
        model, found = model_class.from_pretrained(
            None,
            config=config,
            state_dict=meta,
            dtype=torch.bfloat16,
            device_map={"": "meta"},
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    except Exception as error:  # model classes and conversions raise all kinds
        raise InputError(f"{folder}: {_refusal(error)}") from error
    _check_heads(folder, model, geometry)
    return check_found(folder, found, needs_head=needs_head)


def rehearse_gguf(file: GgufFile, config: PretrainedConfig, geometry: Geometry) -> None:
    """Raise InputError where a GGUF file holds more or fewer values than its model, or layers of other heads."""
    try:
        model = on_meta(config)
    except Exception as error:  # model classes raise all kinds
        raise InputError(f"{file.path} describes a model that cannot be built: {first_line(error)}") from error
    _check_heads(file.path, model, geometry)
    tied = set(getattr(model, "all_tied_weights_keys", None) or ()) if config.tie_word_embeddings else set()
    own = {name: values for name, values in model.state_dict().items() if name not in tied}
    check_values(file, list(own), sum(values.numel() for values in own.values()))


def on_meta(config: PretrainedConfig) -> PreTrainedModel:
    """The causal language model of a config on the meta device, in bfloat16. Raises whatever its class raises."""
    import torch
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    with torch.device("meta"):
        model: PreTrainedModel = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]._from_config(
            copy.deepcopy(config), dtype=torch.bfloat16
        )
    return model


def check_found(folder: Path, found: Mapping[str, Any], *, needs_head: bool) -> tuple[str, ...]:
    """What transformers reports of loading, as errors; returns what was left out on purpose, in words.

    Without ``needs_head`` weights may lack the LM head, which reconstruction scores do not use.
    """
    absent = sorted(name for name in found["missing_keys"] if needs_head or not name.startswith("lm_head"))
    if absent:
        raise InputError(
            f"{folder}: the weights lack {absent[0]} ({len(absent)} missing in all); download again, or correct "
            "config.json"
        )
    shapes = sorted((name, *map(list, shape)) for name, *shape in found["mismatched_keys"])
    if shapes:
        name, theirs, ours = shapes[0]
        raise InputError(
            f"{folder}: {name} has shape {theirs}, the model that config.json describes has {ours} "
            f"({len(shapes)} such tensors); config and weights belong to different models"
        )
    foreign = sorted(name for name in found["unexpected_keys"] if not left_out(name))
    if foreign:
        scales = [name for name in foreign if "scale" in name.rpartition(".")[2]]
        why = (
            "weights with scales are quantised, and config.json has no quantization_config that says how"
            if scales
            else "the model that config.json describes has no place for it"
        )
        raise InputError(f"{folder}: the weights hold {(scales or foreign)[0]} ({len(foreign)} such in all): {why}")
    counts = Counter(filter(None, map(left_out, found["unexpected_keys"])))
    return tuple(f"{count} tensors are left out: {what}" for what, count in sorted(counts.items()))


def left_out(name: str) -> str | None:
    """What a tensor is that a text model does without; None for all others."""
    return next((what for what, pattern in _LEFT_OUT.items() if re.search(pattern, name)), None)


def cache_argument(module: torch.nn.Module) -> str:
    """The name by which a model's forward takes its cache: ``past_key_values``, or ``cache`` where it was renamed.

    transformers 5.24 takes both and warns about the old name, which it says goes in 5.40.
    """
    return "cache" if "cache" in inspect.signature(module.forward).parameters else "past_key_values"


def refuse_other_heads(geometry: Geometry, layer: int, attention_heads: int, kv_heads: int, head_size: int) -> None:
    """Raise InputError where a layer has other heads than the config states."""
    if (attention_heads, kv_heads, head_size) != (geometry.attention_heads, geometry.kv_heads, geometry.head_size):
        raise InputError(
            f"layer {layer} has {attention_heads} query heads and {kv_heads} KV heads of size {head_size}, "
            f"the config says {geometry.describe()}; kvprofile cannot profile layers of different shapes"
        )


def _ignored_by(model_class: type[PreTrainedModel], name: str) -> bool:
    """Whether the model's class says itself that its checkpoints may hold such a tensor for nothing."""
    patterns = getattr(model_class, "_keys_to_ignore_on_load_unexpected", None) or ()
    return any(re.search(pattern, name) for pattern in (*patterns, r"rotary_emb\.inv_freq$"))


def _refusal(error: Exception) -> str:
    if "conversion of the weights" in str(error):
        return "tensors that belong together, such as those of one layer's experts, are missing or of different shapes"
    return f"config.json describes a model that cannot be built: {first_line(error)}"


def _check_heads(folder: Path, model: PreTrainedModel, geometry: Geometry) -> None:
    """Read two tokens on the meta device, and compare the heads of each layer that gets to its attention."""
    import torch

    seen: dict[int, tuple[int, int, int]] = {}
    biased: list[int] = []

    def attend(
        module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any, **options: Any
    ) -> tuple[torch.Tensor, None]:
        layer = int(module.layer_idx)  # type: ignore[arg-type]
        seen[layer] = (query.shape[1], key.shape[1], key.shape[-1])
        if options.get("position_bias") is not None:
            biased.append(layer)
        return query.new_empty(query.shape[0], query.shape[2], query.shape[1], value.shape[-1]), None

    ids = torch.zeros(1, 2, dtype=torch.long, device="meta")
    try:
        with probing(model, attend), torch.inference_mode():
            model.base_model(input_ids=ids, position_ids=ids, use_cache=True)
    except Exception:  # noqa: S110 - what depends on values cannot run here; scoring checks each layer as it comes
        pass
    if biased:
        raise InputError(f"{folder} cannot be profiled: layer {biased[0]} adds a bias of its own to attention's logits")
    unnumbered = sorted(set(seen) - set(geometry.cached_layers))
    if unnumbered:
        raise InputError(
            f"{folder} cannot be profiled: layers share one attention, which calls itself layer {unnumbered[0]}"
        )
    for layer, heads in sorted(seen.items()):
        try:
            refuse_other_heads(geometry, layer, *heads)
        except InputError as error:
            raise InputError(f"{folder} cannot be profiled: {error}") from error


@contextmanager
def probing(model: PreTrainedModel, attend: Any) -> Iterator[None]:
    """Route attention through a function without masks, until the end of the block."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    AttentionInterface.register(_PROBE, attend)
    AttentionMaskInterface.register(_PROBE, lambda *_, **__: None)
    try:
        model.set_attn_implementation(_PROBE)
        yield
    finally:
        AttentionInterface._global_mapping.pop(_PROBE, None)
        AttentionMaskInterface._global_mapping.pop(_PROBE, None)
