"""What planning needs to know of a model: its cache (``model_cache``) and its weights, without loading either."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from kvprofile.budget import probe, store
from kvprofile.budget.config_file import ConfigFile, integer, read_config, read_json
from kvprofile.budget.dtypes import MODEL_DTYPES
from kvprofile.budget.model_cache import LayerCache, ModelCache, cache_of
from kvprofile.budget.profile import (
    DEFAULT_RECENT_TOKENS,
    DEFAULT_SINK_TOKENS,
    FULL_ATTENTION,
    NO_CACHE,
    SLIDING_ATTENTION,
    Geometry,
    Profile,
)
from kvprofile.errors import InputError, plain
from kvprofile.files import bundled_model

_ESTIMATE = "estimate: (L*(2H+2G)*D*hidden + 3*L*hidden*intermediate + vocab*hidden*(1 if tied else 2)) * bytes"


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
    ``profile`` is that of a budget file, whose budgets go before counts. ``layers`` are the heads of every layer.
    ``cache_dtype`` is what the checkpoint asks for, where it asks.
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
    layers: tuple[LayerCache, ...] = ()
    cache_dtype: str | None = None

    def __post_init__(self) -> None:
        """Without layers of their own all have the heads of the geometry, as a budget file tells them."""
        if not self.layers:
            heads, kv_heads, size = self.geometry.attention_heads, self.geometry.kv_heads, self.geometry.head_size
            layers = tuple(LayerCache(kind, heads, kv_heads, size, size) for kind in self.geometry.layer_types)
            object.__setattr__(self, "layers", layers)


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
        return with_budgets(shape_of_config(config, _folder_name(config.resolve().parent)))
    budget_file = path if store.is_file(path) else store.default_path(reference)
    if store.is_file(budget_file):
        return _shape_of_profile(store.load(budget_file), budget_file)
    cached = _cached_config(reference)
    if cached is None:
        raise InputError(
            f"no model {reference} here: no such folder or file, no {budget_file}, not in the local hub cache; "
            "give a folder with its config.json"
        )
    return shape_of_config(cached, reference, "config.json in the local hub cache")


def with_budgets(shape: ModelShape) -> ModelShape:
    """A shape with the budgets of its model's file, where there is one here: vLLM serves the same.

    Raises InputError for a file that is broken.
    """
    path = store.default_path(shape.name)
    if not store.is_file(path):
        return shape
    profile = store.load(path)
    if profile.model.geometry != shape.geometry:
        note = Decision("budget file", "left out", f"{path} is for {profile.model.geometry.describe()}")
        return replace(shape, decisions=(*shape.decisions, note))
    note = Decision("budget file", str(path), "the model's, by its name")
    return _with_profile(shape, profile, (*shape.decisions, note), path)


def shape_of_config(path: Path, name: str, source: str = "config.json") -> ModelShape:
    """The shape that a checkpoint's config states. Raises InputError for what has no per-head cache, by name."""
    file = read_config(path)
    cache = cache_of(file, name, "planned")
    dtypes = (text.get(key) for text in (file.raw, file.text) for key in ("dtype", "torch_dtype"))
    dtype = next((plain(each)[:40].removeprefix("torch.") for each in dtypes if isinstance(each, str)), None)
    quantisation = _quantisation(file, path.parent)
    cache_dtype = _asked_cache_dtype(quantisation)
    weight_bytes, weight_reason = _weight_bytes(path.parent, file, cache, dtype, quantised=bool(quantisation))
    decisions = [Decision("model", name, source + (f", its {file.place}" if file.place else ""))]
    decisions += [Decision(*note) for note in cache.notes]
    without = cache.geometry.layers - len(cache.geometry.cached_layers)
    if without:
        reason = "no cache of the text there; what states they keep is not counted"
        decisions.append(Decision("layers without a cache", f"{without} of {cache.geometry.layers}", reason))
    return ModelShape(
        name=name,
        geometry=cache.geometry,
        window_tokens=cache.window_tokens,
        dtype=dtype,
        max_positions=cache.max_positions,
        weight_bytes=weight_bytes,
        weight_reason=weight_reason,
        decisions=tuple(decisions),
        layers=cache.layers,
        cache_dtype=cache_dtype,
    )


def _shape_of_profile(profile: Profile, path: Path) -> ModelShape:
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
    decisions = [Decision("model", profile.model.name, f"budget file {path}")]
    config = _cached_config(profile.model.name)
    if config is not None:
        found = shape_of_config(config, profile.model.name)
        if found.geometry == profile.model.geometry:
            base = found
            decisions.append(Decision("config", "dtype, weights", "config.json in the local hub cache"))
    if base.window_tokens is None and SLIDING_ATTENTION in base.geometry.layer_types:
        reason = "window unknown from a budget file: counted as holding the whole context"
        decisions.append(Decision("sliding layers", "whole", reason))
    return _with_profile(base, profile, decisions, path)


def _with_profile(shape: ModelShape, profile: Profile, decisions: Sequence[Decision], path: Path) -> ModelShape:
    runtime = profile.runtime
    missing = probe.problem(path, profile)
    if missing is not None:
        decisions = (*decisions, Decision("probe", "not usable", missing))
    return replace(
        shape,
        sink_tokens=runtime.sink_tokens,
        recent_tokens=runtime.recent_tokens,
        profile=profile,
        decisions=tuple(decisions),
    )


def _quantisation(file: ConfigFile, folder: Path) -> dict[str, Any]:
    """The quantisation that the checkpoint states, as vLLM finds it; empty where it states none."""
    for text in (file.raw, file.text):
        for key in ("quantization_config", "compression_config"):
            found = text.get(key)
            if isinstance(found, dict) and found:
                return found
    beside = folder / "hf_quant_config.json"  # ModelOpt before 0.31
    return {"quant_method": "modelopt", **read_json(beside)} if beside.is_file() else {}


def _asked_cache_dtype(quantisation: dict[str, Any]) -> str | None:
    """The dtype of the cache that a checkpoint asks for and vLLM then uses; None where it asks for none it knows.

    Follows ``get_kv_cache_quant_algo_string`` and ``Attention`` of vLLM: ModelOpt's and compressed-tensors' schemes.
    """
    inner = quantisation.get("quantization")
    places = [inner, quantisation] if isinstance(inner, dict) else [quantisation]
    producer = quantisation.get("producer")
    by_modelopt = isinstance(producer, dict) and producer.get("name") == "modelopt"
    method = "modelopt" if by_modelopt else str(quantisation.get("quant_method", "")).lower().replace("_", "-")
    keys = ("kv_cache_scheme", "kv_cache_quant_algo") if method.startswith("modelopt") else ("kv_cache_scheme",)
    if not method.startswith("modelopt") and method != "compressed-tensors":
        return None
    scheme = next((place[key] for key in keys for place in places if place.get(key)), None)
    if isinstance(scheme, dict):
        bits = scheme.get("num_bits") if scheme.get("type") == "float" else None
        fits = scheme.get("dynamic") is False or method == "compressed-tensors"
        return "fp8" if bits == 8 and fits else "nvfp4" if bits == 4 and method != "compressed-tensors" else None
    named = {"fp8": "fp8", "nvfp4": "nvfp4"}
    return named.get(scheme.lower()) if isinstance(scheme, str) else None


def _weight_bytes(
    folder: Path, file: ConfigFile, cache: ModelCache, dtype: str | None, *, quantised: bool
) -> tuple[int | None, str]:
    """Bytes of the parameters and where the number comes from."""
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if index.is_file():
        metadata = read_json(index).get("metadata")
        total = integer(metadata.get("total_size")) if isinstance(metadata, dict) else None
        if total:
            return total, "total_size in model.safetensors.index.json"
    if single.is_file():
        with open(single, "rb") as stream:
            lead = stream.read(8)
        if len(lead) == 8:
            parameters = single.stat().st_size - 8 - struct.unpack("<Q", lead)[0]
            if parameters > 0:
                return parameters, "size of model.safetensors less its header"
    if quantised:
        return None, "quantised, no weights here: bytes of a weight unknown; give --weights-gib"
    if any(integer(file.get(key)) for key in _EXPERTS):
        return None, "mixture of experts, no weights here: not estimated; give --weights-gib"
    if any(layer.kind == NO_CACHE for layer in cache.layers) or file.text.get("hidden_size_per_layer_input"):
        return None, "not a plain decoder, no weights here: not estimated; give --weights-gib"
    return _estimated_weight_bytes(file, cache, dtype)


_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


def _estimated_weight_bytes(file: ConfigFile, cache: ModelCache, dtype: str | None) -> tuple[int | None, str]:
    """Parameters of a dense decoder with a gated MLP; norms and biases, below 0.1 %, are left out."""
    sizes = [integer(file.get(key)) for key in ("hidden_size", "intermediate_size", "vocab_size")]
    hidden, inner, vocabulary = sizes
    if not (hidden and inner and vocabulary):
        return None, "no weights here and too little in config.json to estimate them; give --weights-gib"
    # q and o of every query head, k and v of every KV head; Gemma 4's full layers may take their keys as values
    attention = sum((x.attention_heads + x.kv_heads) * (x.key_size + x.value_size) * hidden for x in cache.layers)
    if file.get("attention_k_eq_v"):
        attention -= sum(x.kv_heads * x.value_size * hidden for x in cache.layers if x.kind == FULL_ATTENTION)
    embeddings = vocabulary * hidden * (1 if file.get("tie_word_embeddings") else 2)
    parameters = attention + 3 * len(cache.layers) * hidden * inner + embeddings
    value_bytes = MODEL_DTYPES.get(dtype or "bfloat16")
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
