"""What a model's config tells about its cache and the size of its weights, read without loading either.

The config is read as plain JSON. transformers is asked only where a config leaves out what its class has defaults for.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from kvprofile.budget import store
from kvprofile.budget.profile import (
    DEFAULT_RECENT_TOKENS,
    DEFAULT_SINK_TOKENS,
    FULL_ATTENTION,
    SLIDING_ATTENTION,
    Geometry,
    Profile,
)
from kvprofile.errors import InputError, plain
from kvprofile.files import bundled_model

MAX_LAYERS = 4096
_WEIGHT_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
_ESTIMATE = "estimate: (L*(2H+2G)*D*hidden + 3*L*hidden*intermediate + vocab*hidden*(1 if tied else 2)) * bytes"

_SHARED_KEYS = ("dtype", "is_encoder_decoder", "quantization_config", "tie_word_embeddings", "torch_dtype")
"""What a multimodal config may state once, outside of its text_config."""

_STATE_SPACE_KEYS = (
    "attn_layer_indices", "attn_layer_period", "attn_type_list", "block_types", "full_attention_interval",
    "hybrid_override_pattern", "layers_block_type", "linear_attn_config", "linear_num_key_heads", "mamba_d_state",
    "ssm_cfg", "ssm_state_size", "state_size",
)  # fmt: skip
_OTHER_KV_KEYS = ("attn_config", "multi_query", "multi_query_attention", "num_kv_heads", "block_configs")


@dataclass(frozen=True)
class Decision:
    """A choice made without being asked: what, the value chosen, and why."""

    what: str
    value: str
    reason: str


@dataclass(frozen=True)
class ModelShape:
    """What planning needs to know of a model; null is unknown.

    ``window_tokens`` is the window of sliding layers; null with sliding layers counts them as holding everything.
    ``profile`` is that of a budget file, whose budgets go before counts.
    """

    name: str
    geometry: Geometry
    window_tokens: int | None
    dtype: str | None
    max_positions: int | None
    weight_bytes: int | None
    weight_reason: str
    sink_tokens: int = DEFAULT_SINK_TOKENS
    recent_tokens: int = DEFAULT_RECENT_TOKENS
    profile: Profile | None = None
    decisions: tuple[Decision, ...] = ()


def find_shape(reference: str) -> ModelShape:
    """The shape of what a user names: a checkpoint folder or config.json, a budget file, or a model's name.

    A name is looked up among the budget files and in the local hub cache, never on the network. Raises InputError.
    """
    try:
        path = Path(reference).expanduser()
    except RuntimeError:  # ~somebody who has no home here
        path = Path(reference)
    bundled = bundled_model(reference)
    if bundled is not None and not store.is_file(store.default_path(reference)):
        path = bundled
    if store.is_dir(path) or path.name == "config.json":
        config = path / "config.json" if store.is_dir(path) else path
        if not store.is_file(config):
            raise InputError(
                f"{reference} has no config.json; give a checkpoint's folder, a budget file or a model name"
            )
        return shape_of_config(config, _folder_name(config.resolve().parent))
    budget_file = path if store.is_file(path) else store.default_path(reference)
    if store.is_file(budget_file):
        return _shape_of_profile(store.load(budget_file), str(budget_file))
    cached = _cached_config(reference)
    if cached is None:
        raise InputError(
            f"no model {reference} here: no such folder or file, no {budget_file}, not in the local hub cache; "
            "give a folder with its config.json"
        )
    return shape_of_config(cached, reference, "config.json in the local hub cache")


def shape_of_config(file: Path, name: str, source: str = "config.json") -> ModelShape:
    """The shape that a checkpoint's config states. Raises InputError for what has no per-head cache, by name."""
    raw = _read_json(file)
    nested = raw.get("text_config")
    text = {key: raw[key] for key in _SHARED_KEYS if key in raw} | nested if isinstance(nested, dict) else raw
    decisions = [Decision("model", name, source + (", its text_config" if text is not raw else ""))]
    _refuse(name, text)
    text, completed = _completed(name, text)
    if completed:
        decisions.append(Decision("config", completed, "left out of config.json, taken from transformers' class"))
    geometry, window, layer_decision = _geometry(name, file, text)
    dtype = text.get("dtype") or text.get("torch_dtype")
    dtype = plain(dtype)[:40].removeprefix("torch.") if isinstance(dtype, str) else None
    weight_bytes, weight_reason = _weight_bytes(file.parent, text, geometry, dtype)
    return ModelShape(
        name=name,
        geometry=geometry,
        window_tokens=window,
        dtype=dtype,
        max_positions=_integer(text, "max_position_embeddings"),
        weight_bytes=weight_bytes,
        weight_reason=weight_reason,
        decisions=(*decisions, *([layer_decision] if layer_decision else [])),
    )


def _shape_of_profile(profile: Profile, source: str) -> ModelShape:
    """The geometry, sinks and window of a budget file; dtype, sliding window and weights where a config lies cached."""
    base = ModelShape(
        name=profile.model.name,
        geometry=profile.model.geometry,
        window_tokens=None,
        dtype=None,
        max_positions=None,
        weight_bytes=None,
        weight_reason="a budget file does not tell; give --weights-gib, or the checkpoint's folder as MODEL",
    )
    decisions = [Decision("model", profile.model.name, f"budget file {source}")]
    config = _cached_config(profile.model.name)
    if config is not None:
        found = shape_of_config(config, profile.model.name)
        if found.geometry == profile.model.geometry:
            base = found
            decisions.append(Decision("config", "dtype, weights", "config.json in the local hub cache"))
    if base.window_tokens is None and len(base.geometry.profiled_layers) < base.geometry.layers:
        reason = "window unknown from a budget file: counted as holding the whole context"
        decisions.append(Decision("sliding layers", "whole", reason))
    return replace(
        base,
        sink_tokens=profile.runtime.sink_tokens,
        recent_tokens=profile.runtime.recent_tokens,
        profile=profile,
        decisions=tuple(decisions),
    )


def _refuse(name: str, text: Mapping[str, Any]) -> None:
    kind = text.get("model_type")

    def refuse(why: str) -> InputError:
        return InputError(f"{name} (model type {kind!r}) cannot be planned: {why}")

    if text.get("kv_lora_rank"):
        raise refuse("multi-head latent attention has no per-head cache")
    layers, types = text.get("num_hidden_layers"), text.get("layer_types")
    if isinstance(layers, int) and layers > MAX_LAYERS:
        raise refuse(f"its config states more than {MAX_LAYERS} layers")
    if types is not None and not isinstance(types, list):
        raise refuse("layer_types in its config is no list")
    foreign = {str(each) for each in types or ()} - {FULL_ATTENTION, SLIDING_ATTENTION}
    if foreign:
        raise refuse(f"it has layers of type {', '.join(sorted(foreign))}")
    state_space = [key for key in _STATE_SPACE_KEYS if text.get(key)]
    if state_space:
        raise refuse(f"some layers keep a state instead of a cache (linear attention; {state_space[0]} in the config)")
    if text.get("attention_chunk_size"):
        raise refuse("some layers attend within chunks")
    if text.get("is_encoder_decoder"):
        raise refuse("it is an encoder-decoder")
    if text.get("num_kv_shared_layers"):
        raise refuse("its layers share their caches")
    if text.get("global_head_dim") or text.get("num_global_key_value_heads"):
        raise refuse("its full and its sliding layers have different heads")
    other = [key for key in _OTHER_KV_KEYS if key in text]
    if other and not isinstance(text.get("num_key_value_heads"), int):
        raise refuse(f"its config states the KV heads by {other[0]}, which kvprofile does not read")


def _completed(name: str, text: dict[str, Any]) -> tuple[dict[str, Any], str | None]:
    """The config with the defaults of its class where it needs any, and the keys that came from there."""
    keys = ["num_hidden_layers", "num_attention_heads", "hidden_size"]
    missing = [key for key in keys if not isinstance(text.get(key), int)]
    if "layer_types" not in text and text.get("sliding_window") and text.get("use_sliding_window") is not False:
        missing.append("layer_types")
    if not missing:
        return text, None
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    kind = text.get("model_type")
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
        raise InputError(
            f"{name}: config.json lacks {', '.join(missing)}, and model type {kind!r} is not in transformers"
        )
    try:
        config = CONFIG_MAPPING[kind](**{key: value for key, value in text.items() if key != "model_type"})
    except Exception as error:  # config classes check themselves and raise all kinds
        raise InputError(f"{name}: config.json is not a {kind} config: {str(error).strip()[:200]}") from error
    wanted = [*missing, "num_key_value_heads", "head_dim", "intermediate_size", "vocab_size", "tie_word_embeddings"]
    added = {key: getattr(config, key, None) for key in wanted if text.get(key) is None}
    return {**text, **{key: value for key, value in added.items() if value is not None}}, ", ".join(missing)


def _geometry(name: str, file: Path, text: Mapping[str, Any]) -> tuple[Geometry, int | None, Decision | None]:
    """Geometry, window of the sliding layers, and why layers count as sliding where the config does not list them."""
    layers, heads = _integer(text, "num_hidden_layers"), _integer(text, "num_attention_heads")
    hidden = _integer(text, "hidden_size")
    kv_heads = _integer(text, "num_key_value_heads") or heads
    head_size = _integer(text, "head_dim") or (hidden // heads if hidden and heads else None)
    if not (layers and heads and kv_heads and head_size):
        raise InputError(
            f"{file}: no usable num_hidden_layers, num_attention_heads or hidden_size; not a decoder's config"
        )
    slides = text.get("use_sliding_window") is not False
    window = _integer(text, "sliding_window") if slides else None
    types = list(text.get("layer_types") or [SLIDING_ATTENTION if window else FULL_ATTENTION] * layers)
    decision = None
    positions = _integer(text, "max_position_embeddings")
    if SLIDING_ATTENTION in types and window and positions and window >= positions:
        types, reason = [FULL_ATTENTION] * layers, f"the window of {window} covers all {positions} positions"
        decision = Decision("layers", "full attention", reason)
    if FULL_ATTENTION not in types:
        raise InputError(f"{name}: every layer slides over {window} tokens, so no head keeps the context to trim")
    try:
        geometry = Geometry(
            layers=layers, attention_heads=heads, kv_heads=kv_heads, head_size=head_size, layer_types=types
        )
    except ValidationError as error:
        message = error.errors(include_url=False, include_input=False)[0]["msg"].removeprefix("Value error, ")
        raise InputError(f"{file}: {message}") from error
    return geometry, window if SLIDING_ATTENTION in types else None, decision


def _weight_bytes(
    folder: Path, text: Mapping[str, Any], geometry: Geometry, dtype: str | None
) -> tuple[int | None, str]:
    """Bytes of the parameters and where the number comes from."""
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if index.is_file():
        metadata = _read_json(index).get("metadata")
        total = _integer(metadata, "total_size") if isinstance(metadata, dict) else None
        if total:
            return total, "total_size in model.safetensors.index.json"
    if single.is_file():
        with open(single, "rb") as stream:
            lead = stream.read(8)
        if len(lead) == 8:
            parameters = single.stat().st_size - 8 - struct.unpack("<Q", lead)[0]
            if parameters > 0:
                return parameters, "size of model.safetensors less its header"
    if text.get("quantization_config"):
        return None, "quantised, no weights here: bytes of a weight unknown; give --weights-gib"
    if any(_integer(text, key) for key in ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")):
        return None, "mixture of experts, no weights here: not estimated; give --weights-gib"
    return _estimated_weight_bytes(text, geometry, dtype)


def _estimated_weight_bytes(text: Mapping[str, Any], geometry: Geometry, dtype: str | None) -> tuple[int | None, str]:
    """Parameters of a dense decoder with a gated MLP; norms and biases, below 0.1 %, are left out."""
    hidden, inner, vocabulary = (_integer(text, key) for key in ("hidden_size", "intermediate_size", "vocab_size"))
    if not (hidden and inner and vocabulary):
        return None, "no weights here and too little in config.json to estimate them; give --weights-gib"
    attention = (2 * geometry.attention_heads + 2 * geometry.kv_heads) * geometry.head_size * hidden
    embeddings = vocabulary * hidden * (1 if text.get("tie_word_embeddings") else 2)
    parameters = geometry.layers * (attention + 3 * hidden * inner) + embeddings
    value_bytes = _WEIGHT_BYTES.get(dtype or "bfloat16")
    if value_bytes is None:
        return None, f"no weights here and no bytes known for dtype {dtype}; give --weights-gib"
    return parameters * value_bytes, f"{_ESTIMATE}, {value_bytes} of {dtype or 'bfloat16 (assumed)'}"


def _folder_name(folder: Path) -> str:
    """The folder's name or, inside the hub cache, the hub id."""
    repository = folder.parent.parent.name
    if folder.parent.name == "snapshots" and repository.startswith("models--"):
        return repository.removeprefix("models--").replace("--", "/", 1)
    return folder.name


def _cached_config(reference: str) -> Path | None:
    """config.json of a hub id in the local hub cache, if it lies there."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(reference, "config.json")
    except HFValidationError:
        return None
    return Path(found) if isinstance(found, str) else None


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_bytes().decode("utf-8"))
    except OSError as error:
        raise InputError(f"cannot read {file}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{file} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise InputError(f"{file} is not a config: the top level is not an object")
    return content


def _integer(mapping: Mapping[str, Any], key: str) -> int | None:
    """A positive integer of a config, null where it is absent or anything else."""
    value = mapping.get(key)
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 < value < 2**63 else None
