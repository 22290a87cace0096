"""A model's config.json as it is read: by transformers' class where there is one, else by the names in the file.

transformers is imported inside functions only.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvprofile.errors import InputError, first_line, plain

if TYPE_CHECKING:
    from transformers import PretrainedConfig

MAX_LAYERS, MAX_VALUE = 4096, 2**40
NO_LIMIT = 2**31
"""Positions of a model that states no limit."""

NAMES = {
    "layers": ("num_hidden_layers", "n_layer", "n_layers", "num_layers"),
    "heads": ("num_attention_heads", "n_head", "n_heads", "num_query_heads", "num_heads"),
    "hidden": ("hidden_size", "n_embd", "d_model"),
    "head_size": ("head_dim", "hidden_size_per_head", "kv_channels", "dim_head", "d_head"),
    "kv_heads": ("n_head_kv", "num_kv_heads", "num_key_value_heads", "multi_query_group_num", "num_attention_groups"),
    "window": ("sliding_window", "sliding_window_size", "attention_window_size", "window_size"),
    "positions": (
        "max_position_embeddings", "max_position_embedding", "n_positions", "max_seq_len", "seq_length",
        "max_sequence_length", "max_seq_length", "seq_len",
    ),
}  # fmt: skip
"""Names of one number in the configs of different models. Those of KV heads, in their order, and of positions are
vLLM's."""

_TEXT_CONFIGS = ("text_config", "llm_config", "language_config", "thinker_config")
_SHARED_KEYS = ("dtype", "is_encoder_decoder", "quantization_config", "tie_word_embeddings", "torch_dtype")
"""What a multimodal config may state once, outside of its text config."""


@dataclass(frozen=True)
class ConfigFile:
    """A config.json: its text part as a transformers config where transformers knows it, and as written.

    raw: the whole file. text: the part of the language model, with what the file states once for all parts.
    place: where in the file the text part is, "" for the file itself.
    config: the text part as transformers' class reads it; None where transformers does not know the model type, or
        the class is code of the checkpoint's own.
    """

    raw: Mapping[str, Any]
    text: Mapping[str, Any]
    place: str
    config: PretrainedConfig | None

    def get(self, key: str) -> Any:
        """A value by name: the class's answer, else what the file says; None for neither.

        Of what differs between layers it is what the file says for all of them.
        """
        try:
            found = getattr(self.config, key, None)
        except RuntimeError:  # transformers' AmbiguousGlobalPerLayerAttributeError
            found = None
        return self.text.get(key) if found is None else found


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object. Raises InputError for anything else, and for numbers that no model has."""
    try:
        content = json.loads(file.read_bytes().decode("utf-8"), object_hook=_special_float)
    except OSError as error:
        raise InputError(f"cannot read {file}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{file} is not JSON: {first_line(error)}") from error
    if not isinstance(content, dict):
        raise InputError(f"{file} is not a config: the top level is not an object")
    absurd = absurd_number(content)
    if absurd is not None:
        raise InputError(f"{file}: {absurd} is larger than any model's")
    return content


def _special_float(found: dict[str, Any]) -> Any:
    """Infinity and NaN as transformers writes them: ``{"__float__": "Infinity"}``."""
    if found.keys() == {"__float__"} and found["__float__"] in ("Infinity", "-Infinity", "NaN"):
        return float(found["__float__"])
    return found


def absurd_number(value: object, name: str = "") -> str | None:
    """The name of a whole number that a config class would take memory for, or count up to, without end."""
    if isinstance(value, dict):
        return next(filter(None, (absurd_number(each, plain(key)[:40]) for key, each in value.items())), None)
    if isinstance(value, list):
        return next(filter(None, (absurd_number(each, "") for each in value)), None)
    counts_layers = name.endswith(("_layers", "n_layer")) or name == "layers"
    most = MAX_LAYERS if counts_layers else MAX_VALUE
    return (name or "a number in a list") if isinstance(value, int) and value > most else None


def read_config(file: Path) -> ConfigFile:
    """A config.json, read by transformers' class where there is one. Raises InputError."""
    raw = read_json(file)
    config = _class_config(file, raw)
    text: Mapping[str, Any] = raw
    place = ""
    while nested := next((key for key in _TEXT_CONFIGS if isinstance(text.get(key), dict)), None):
        text = {key: text[key] for key in _SHARED_KEYS if key in text} | text[nested]
        place = f"{place}.{nested}" if place else nested
    if config is None and place:
        config = _class_config(file, text)
    return ConfigFile(raw, text, place, config)


def _class_config(file: Path, raw: Mapping[str, Any]) -> PretrainedConfig | None:
    """The text part as the class of the model type reads it; None for a type that transformers does not know."""
    from transformers import PretrainedConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    kind = raw.get("model_type")
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
        return None
    quiet_transformers()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            config = CONFIG_MAPPING[kind].from_dict(dict(raw))
            text = config if config.is_encoder_decoder else config.get_text_config(decoder=True)
    except Exception as error:  # config classes check themselves and raise all kinds
        raise InputError(f"{file}: not a {kind} config: {first_line(error)}") from error
    # a class that wants its text part nested would answer with defaults for a file that is flat
    is_nested = any(isinstance(raw.get(key), dict) for key in (*_TEXT_CONFIGS, "decoder", "generator"))
    return text if text is config or (is_nested and isinstance(text, PretrainedConfig)) else None


def quiet_transformers() -> None:
    """Keep the logs, warnings and bars of transformers and of what it loads with out of the output."""
    import huggingface_hub
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    huggingface_hub.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    for library in ("transformers", "torch", "accelerate", "huggingface_hub"):
        warnings.filterwarnings("ignore", module=rf"{library}(\.|$)")


def positions(file: ConfigFile) -> tuple[int, str, int | None]:
    """The longest sequence whose cached keys stay valid, why, and the longest that the config states.

    Dynamic-NTK and longrope change every rotary frequency once a sequence is longer than the original length, which
    would leave keys cached before out of date.
    """
    get = file.get
    found = [value for value in (integer(get(name)) for name in NAMES["positions"]) if value]
    # vLLM takes the least, but Cohere's model_max_length goes before all others
    stated = integer(get("model_max_length")) or min(found, default=None)
    limit = stated or NO_LIMIT
    reason = f"max_position_embeddings is {limit}"
    rope = get("rope_parameters") or get("rope_scaling") or {}
    if not isinstance(rope, dict):
        return limit, reason, stated
    for parameters in [rope, *(value for value in rope.values() if isinstance(value, dict))]:
        kind = parameters.get("rope_type") or parameters.get("type")
        if kind in ("dynamic", "longrope", "su"):
            original = parameters.get("original_max_position_embeddings") or get("original_max_position_embeddings")
            original = integer(original)
            if original and original < limit:
                limit, reason = original, f"{kind} RoPE changes its factors beyond {original} positions"
    return limit, reason, stated


def number(get: Callable[[str], Any], what: str, index: int = 0) -> int | None:
    """The first positive integer under the names of a number; of a list with one for each layer, that layer's."""
    return next(filter(None, (integer(entry(get(name), index)) for name in NAMES[what])), None)


def entry(value: Any, index: int) -> Any:
    """Of a list with an entry for each layer that layer's, else the value itself."""
    return value[index] if isinstance(value, list | tuple) and index < len(value) else value


def integer(value: object) -> int | None:
    """A positive integer of a config, None for anything else."""
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 < value < 2**63 else None
