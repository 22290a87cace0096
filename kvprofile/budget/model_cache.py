"""The one reader of a model's config: which layers keep a cache of the text, their heads, and how far positions go.

Where transformers knows the model type its config class answers, with its defaults and its names. Where it does not,
the keys of config.json are read by vLLM's rules (``vllm/transformers_utils/model_arch_config_convertor.py``). A layer
or a number of heads that neither tells is never guessed: the config is refused in one line.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from kvprofile.budget.config_file import MAX_LAYERS, NAMES, ConfigFile, entry, integer, number, positions
from kvprofile.budget.profile import FULL_ATTENTION, NO_CACHE, SLIDING_ATTENTION, Geometry, cached_values
from kvprofile.errors import InputError, plain

_KINDS = {
    **dict.fromkeys(("full_attention", "attention", "global", "hybrid"), FULL_ATTENTION),
    **dict.fromkeys(("sliding_attention", "local", "hybrid_sliding"), SLIDING_ATTENTION),
    **dict.fromkeys(
        ("linear_attention", "mamba", "mamba2", "conv", "recurrent", "moe", "mlp", "none", "cross", "shared"), NO_CACHE
    ),
}
"""Kinds of layers by the names that configs give them. A hybrid layer has attention and a state side by side."""

_REFUSED_KINDS = {
    "chunked_attention": "some layers attend within chunks",
    "indexed_attention": "sparse attention: an indexer picks keys for all heads at once (indexed_attention)",
    "minimax_m3_sparse": "sparse attention: an indexer picks keys for all heads at once (minimax_m3_sparse)",
    "compressed_sparse_attention": "its layers keep a compressed context (compressed_sparse_attention)",
    "heavily_compressed_attention": "its layers keep a compressed context (heavily_compressed_attention)",
}

_WITHOUT_CACHE = {"openai-gpt", "rwkv", "xlstm"}
"""Types of transformers' that keep no key-value cache, which their configs do not tell."""

_ENCODERS = {"ernie", "ernie_m", "electra", "xmod", "reformer", "roformer", "rembert", "big_bird", "xlm", "xlnet"}

_STATE_KEYS = (
    "conv_L_cache", "linear_attn_config", "linear_num_key_heads", "mamba_d_state", "mamba_num_heads", "rwkv_version",
    "ssm_cfg", "ssm_state_size", "state_size",
)  # fmt: skip
_SHARING_KEYS = ("num_kv_shared_layers", "use_cla", "cla_share_factor", "kv_reuse_layers")
_SPARSE_KEYS = ("compress_ratios", "index_topk", "sparse_attention_config", "kv_compression")
"""Keys of models that transformers does not know, whose layers need more than this reader knows of."""


class _UnsupportedError(Exception):
    """Why a model's cache cannot be read; the caller names the model."""


@dataclass(frozen=True)
class LayerCache:
    """One layer: what it keeps of a token. ``kind`` is a layer type of ``Geometry``; sizes are in values."""

    kind: str
    attention_heads: int
    kv_heads: int
    key_size: int
    value_size: int
    window: int | None = None

    @property
    def values(self) -> int:
        """Values that one token adds: keys and values of every KV head; 0 without a cache."""
        return 0 if self.kind == NO_CACHE else cached_values(self.kv_heads, self.key_size, self.value_size)


@dataclass(frozen=True)
class ModelCache:
    """What a config tells of a model's cache.

    geometry: with the heads of the full-attention layers, which are those that have budgets.
    layers: every layer's own heads.
    window_tokens: window of the sliding layers; None where none slides, or no window is stated.
    max_positions: the longest sequence the config allows; None where it states none.
    valid_positions: the longest sequence whose cached keys stay valid, and ``position_reason`` why.
    notes: (what, value, why) of what was decided on the way.
    """

    geometry: Geometry
    layers: tuple[LayerCache, ...]
    window_tokens: int | None
    max_positions: int | None
    valid_positions: int
    position_reason: str
    notes: tuple[tuple[str, str, str], ...] = ()

    @property
    def is_uniform(self) -> bool:
        """Whether all layers with a cache have the heads of the geometry, with values as long as keys."""
        own = (self.geometry.attention_heads, self.geometry.kv_heads, self.geometry.head_size)
        return all(
            (layer.attention_heads, layer.kv_heads, layer.key_size) == own and layer.value_size == layer.key_size
            for layer in self.layers
            if layer.kind != NO_CACHE
        )


def cache_of(file: ConfigFile, name: str, verb: str) -> ModelCache:
    """What a model keeps of its context. Raises InputError: ``name`` cannot be ``verb`` ("planned"), and why."""
    try:
        return _cache_of(file)
    except _UnsupportedError as error:
        kind = file.text.get("model_type")
        known = f" (model type {kind!r})" if isinstance(kind, str) else ""
        raise InputError(f"{name}{known} cannot be {verb}: {error}") from error


def _cache_of(file: ConfigFile) -> ModelCache:
    _refuse_other_kinds(file)
    valid, position_reason, stated = positions(file)
    layers = _layers(file)
    notes = [*_left_out(file)]

    # a window as wide as all positions hides nothing: those layers keep the whole context
    windows = {layer.window for layer in layers if layer.kind == SLIDING_ATTENTION}
    if len(windows) > 1:
        raise _UnsupportedError("its layers slide over windows of different sizes")
    window = next(iter(windows), None)
    if window is not None and window >= valid:
        layers = [_as_full(layer) if layer.kind == SLIDING_ATTENTION else layer for layer in layers]
        covered = position_reason if stated is None or valid < stated else f"the window covers all {valid} positions"
        notes.append(("layers", "full attention", f"window {window}: {covered}"))
        window = None

    full = {layer for layer in layers if layer.kind == FULL_ATTENTION}
    if all(layer.kind == NO_CACHE for layer in layers):
        raise _UnsupportedError("no layer keeps a key-value cache of the text (state-space or linear attention)")
    if not full:
        tokens = f"a window of {window} tokens" if window else "a window"
        raise _UnsupportedError(f"every layer slides over {tokens}, so no head keeps the context")
    if len(full) > 1:
        raise _UnsupportedError("its full-attention layers differ in their heads")
    (shape,) = full
    try:
        geometry = Geometry(
            layers=len(layers),
            attention_heads=shape.attention_heads,
            kv_heads=shape.kv_heads,
            head_size=shape.key_size,
            layer_types=[layer.kind for layer in layers],
        )
    except ValidationError as error:
        message = error.errors(include_url=False, include_input=False)[0]["msg"].removeprefix("Value error, ")
        raise _UnsupportedError(f"config.json does not fit together: {message}") from error
    return ModelCache(geometry, tuple(layers), window, stated, valid, position_reason, tuple(notes))


def _as_full(layer: LayerCache) -> LayerCache:
    return LayerCache(FULL_ATTENTION, layer.attention_heads, layer.kv_heads, layer.key_size, layer.value_size)


def _refuse_other_kinds(file: ConfigFile) -> None:
    kind = str(file.text.get("model_type") or "")
    both = any(file.get(f"{each}encoder_layers") and file.get(f"{each}decoder_layers") for each in ("", "num_"))
    if both or file.raw.get("is_encoder_decoder") or file.get("is_encoder_decoder"):
        raise _UnsupportedError("it is an encoder-decoder; only decoders keep one cache per request")
    if kind in _ENCODERS or kind.startswith("data2vec") or ("bert" in kind and "decoder" not in kind):
        raise _UnsupportedError("it is an encoder")
    if kind in _WITHOUT_CACHE:
        raise _UnsupportedError("transformers keeps no key-value cache for it")
    if file.get("compress_ratios"):
        raise _UnsupportedError("its layers keep a compressed context (compress_ratios)")
    if file.get("kv_lora_rank"):
        raise _UnsupportedError("multi-head latent attention has no per-head cache")
    if file.config is not None:
        return
    for keys, why in (
        (_SHARING_KEYS, "its layers share their caches"),
        (_SPARSE_KEYS, "its attention is sparse or compressed"),
    ):
        found = next((key for key in keys if file.text.get(key)), None)
        if found:
            raise _UnsupportedError(f"{why} ({found}), in a way that only its own code tells")


def _layers(file: ConfigFile) -> list[LayerCache]:
    """Every layer with its kind and heads."""
    count = number(file.get, "layers")
    listed = _listed_kinds(file, count)
    if count is None:
        count = len(listed) if listed is not None else None
    if count is None:
        raise _UnsupportedError("config.json states no number of layers (num_hidden_layers)")
    if count > MAX_LAYERS:
        raise _UnsupportedError(f"config.json states more than {MAX_LAYERS} layers")
    kinds = _kinds(file, count, listed)
    return [_layer(file, index, kind) for index, kind in enumerate(kinds)]


def _layer(file: ConfigFile, index: int, kind: str) -> LayerCache:
    """The heads of one layer, as its config class or the file states them for it."""
    get = _of_layer(file, index, kind)
    if kind == NO_CACHE:
        return LayerCache(NO_CACHE, 0, 0, 0, 0)
    sliding = kind == SLIDING_ATTENTION

    def own(name: str) -> int | None:  # MiMo and Inkling: sliding layers have heads of their own
        return integer(get(name)) if sliding else None

    heads, hidden = own("swa_num_attention_heads") or number(get, "heads", index), number(get, "hidden", index)
    kv_heads = own("swa_num_key_value_heads") or _kv_heads(file, get, index, heads)
    if sliding and file.text.get("model_type") == "mimo_v2_flash" and not own("swa_num_key_value_heads"):
        kv_heads = kv_heads and 2 * kv_heads  # its class doubles them
    size = own("swa_head_dim") or number(get, "head_size", index)
    if size is None and heads and hidden:
        size = hidden // heads
    if not (heads and kv_heads and size):
        missing = "num_attention_heads" if not heads else "head_dim or hidden_size"
        raise _UnsupportedError(f"config.json states no usable {missing}")
    value_size = own("swa_v_head_dim") or integer(get("v_head_dim")) or size
    return LayerCache(kind, heads, kv_heads, size, value_size, _window(get) if sliding else None)


def _of_layer(file: ConfigFile, index: int, kind: str) -> Callable[[str], Any]:
    """How to look a name up for one layer: the class's config of that layer, or the file with the layer's own keys."""
    if file.config is not None:
        layers = getattr(file.config, "per_layer_config", None)
        layer = file.config if layers is None else layers[index]
        return lambda key: getattr(layer, key, None)
    own: dict[str, Any] = {}
    other = file.text.get("attention_other_setting")  # Step 3.5: the heads of the layers of one type
    if isinstance(other, dict) and other.get("attention_type") == kind:
        own = {key: value for key, value in other.items() if key != "attention_type"}
    listed = file.text.get("per_layer_config")
    if isinstance(listed, dict):
        own |= next((each for key, each in listed.items() if key.isdecimal() and int(key) == index), {})
    blocks = file.text.get("block_configs")  # Nemotron-NAS: query heads of a group, for each layer
    if isinstance(blocks, list) and index < len(blocks):
        grouped = integer(_attention_of(blocks[index]).get("n_heads_in_group"))
        heads = number(file.text.get, "heads", index)
        own |= {"num_key_value_heads": heads // grouped} if grouped and heads else {}
    return lambda key: own[key] if key in own else file.text.get(key)


def _kv_heads(file: ConfigFile, get: Callable[[str], Any], index: int, heads: int | None) -> int | None:
    """KV heads of a layer; None for a class whose query heads are missing. Raises _UnsupportedError where unknown."""
    config_class = None if file.config is None else type(file.config)
    if config_class is not None:
        if hasattr(config_class, "multi_query") and _is_one_head(get):
            return 1
        own = [name for name in NAMES["kv_heads"] if hasattr(config_class, name) or name == "num_key_value_heads"]
        found = next(filter(None, (integer(entry(get(name), index)) for name in own)), None)
        found = found or heads  # a class without KV heads of their own has multi-head attention
        foreign = [name for name in NAMES["kv_heads"] if name not in own and integer(file.text.get(name))]
        if foreign and integer(file.text[foreign[0]]) != found:
            raise _UnsupportedError(
                f"config.json says {foreign[0]} {file.text[foreign[0]]}, which transformers' class does not read"
            )
        return found
    if _is_one_head(get):
        return 1
    names = [*NAMES["kv_heads"]]
    if get("multi_query_attention") is False:
        names.remove("multi_query_group_num")
    nested = get("attn_config")
    stated = [nested.get("kv_n_heads") if isinstance(nested, dict) else None, *(get(name) for name in names)]
    found = next(filter(None, (integer(entry(value, index)) for value in stated)), None)
    if found is None:
        raise _UnsupportedError(
            "config.json states no number of KV heads and transformers does not know the model type; "
            "if they are as many as query heads, add num_key_value_heads to a copy of config.json"
        )
    return found


def _is_one_head(get: Callable[[str], Any]) -> bool:
    """Falcon: without the newer decoder architecture multi_query is one KV head, whatever num_kv_heads says."""
    return bool(get("multi_query")) and not get("new_decoder_architecture")


def _listed_kinds(file: ConfigFile, count: int | None) -> list[str] | None:
    """The types of all layers as the class or the file lists them, by transformers' names; None without a list."""
    for key in ("layer_types", "layers_block_type", "attention_layers"):
        listed = file.get(key)
        if listed is not None:
            if not isinstance(listed, list | tuple):
                raise _UnsupportedError(f"{key} in config.json is not a list")
            if file.config is None and count is not None and len(listed) > count:
                listed = listed[:count]  # layers that predict further tokens come after the model's own
            return [plain(each)[:40] for each in listed]
    return None


def _kinds(file: ConfigFile, count: int, listed: list[str] | None) -> list[str]:
    """Kinds of all layers, cross-attention and shared caches counted out."""
    ruled = _types_by_rule(file.text, count) if listed is None or file.config is not None else None
    types = listed or (ruled[1] if ruled and file.config is None else None) or [_plain_type(file)] * count
    if len(types) != count:
        raise _UnsupportedError(f"config.json has {count} layers and the types of {len(types)}")
    kinds = [_kind(each) for each in types]
    if file.get("attention_window_size"):  # RecurrentGemma: its attention layers slide
        kinds = [SLIDING_ATTENTION if kind == FULL_ATTENTION else kind for kind in kinds]
    foreign = ruled is not None and not hasattr(type(file.config), ruled[0]) and "layer_types" not in file.text
    if ruled is not None and foreign and [_kind(each) for each in ruled[1]] != kinds:
        raise _UnsupportedError(f"config.json says {ruled[0]}, which transformers' class does not read")
    for index in file.get("cross_attention_layers") or ():
        if isinstance(index, int) and 0 <= index < count:
            kinds[index] = NO_CACHE
    shared = integer(file.get("num_kv_shared_layers"))
    if shared:
        kinds[-shared:] = [NO_CACHE] * min(shared, count)
    return kinds


def _types_by_rule(text: Mapping[str, Any], count: int) -> tuple[str, list[str]] | None:
    """Types of layers that a file states by a rule instead of a list, and the rule's key; None where it has no rule.

    The rules are those of MiniMax (attn_type_list), Nemotron-H (hybrid_override_pattern), Nemotron-NAS (block_configs),
    MiMo (hybrid_layer_pattern), Bamba (attn_layer_indices), Kimi-Linear (linear_attn_config), Qwen3-Next
    (full_attention_interval), Ring and Ling (layer_group_size) and Jamba (attn_layer_period).
    """
    for key, named in _LISTS.items():
        if isinstance(listed := text.get(key), list | str) and listed:
            return key, [named(each) for each in listed]
    layers = range(count)
    full: set[int]
    if isinstance(indices := text.get(key := "attn_layer_indices"), list):
        full = {each for each in indices if isinstance(each, int)}
    elif isinstance(nested := text.get(key := "linear_attn_config"), dict) and nested.get("full_attn_layers"):
        full = {each - 1 for each in nested["full_attn_layers"] if isinstance(each, int)}  # counted from one
    elif every := integer(text.get(key := "full_attention_interval")):
        full = {layer for layer in layers if (layer + 1) % every == 0}
    elif group := integer(text.get(key := "layer_group_size")):
        full = {layer for layer in layers if (layer + 1) % group == 0 or layer >= count // group * group}
    elif period := integer(text.get(key := "attn_layer_period")):
        offset = text.get("attn_layer_offset")
        full = {layer for layer in layers if layer % period == (offset if isinstance(offset, int) else 0)}
    else:
        return None
    return key, ["full_attention" if layer in full else "linear_attention" for layer in layers]


_LISTS: dict[str, Callable[[Any], str]] = {
    "attn_type_list": lambda each: "full_attention" if each == 1 else "linear_attention",
    "hybrid_override_pattern": lambda each: {"*": "full_attention", "M": "mamba", "-": "mlp", "E": "moe"}.get(
        each, each
    ),
    "block_configs": lambda each: "none" if _attention_of(each).get("no_op") else "full_attention",
    "hybrid_layer_pattern": lambda each: "sliding_attention" if each else "full_attention",
}


def _attention_of(block: object) -> Mapping[str, Any]:
    attention = block.get("attention") if isinstance(block, dict) else None
    return attention if isinstance(attention, dict) else {}


def _kind(name: str) -> str:
    if name in _REFUSED_KINDS:
        raise _UnsupportedError(_REFUSED_KINDS[name])
    if name not in _KINDS:
        raise _UnsupportedError(f"it has layers of type {name}, which kvprofile does not know")
    return _KINDS[name]


def _plain_type(file: ConfigFile) -> str:
    """The type of all layers where none are listed."""
    state = next((key for key in _STATE_KEYS if file.config is None and file.text.get(key)), None)
    if state:
        raise _UnsupportedError(
            f"some layers keep a state instead of a cache ({state}); config.json does not say which"
        )
    if file.get("attention_chunk_size"):
        return "chunked_attention"
    window = _window(file.get)
    if window is None:
        return "full_attention"
    if file.config is None and window < positions(file)[0]:
        raise _UnsupportedError(
            "config.json states a sliding window but not which layers slide (layer_types), and transformers does not "
            "know the model type"
        )
    return "sliding_attention"


def _window(get: Callable[[str], Any]) -> int | None:
    return number(get, "window") if get("use_sliding_window") is not False else None


def _left_out(file: ConfigFile) -> Iterable[tuple[str, str, str]]:
    """What the class answered although the file does not say it."""
    if file.config is None:
        return
    aliases = getattr(file.config, "attribute_map", {})
    wanted = ["num_hidden_layers", "num_attention_heads", "hidden_size"]
    missing = [key for key in wanted if file.get(key) and key not in file.text and aliases.get(key) not in file.text]
    if missing:
        yield "config", ", ".join(missing), "left out of config.json, taken from transformers' class"
