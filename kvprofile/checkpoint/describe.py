"""What a checkpoint is, from its config and tensor headers: geometry, limits, and whether it can be profiled."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pydantic import ValidationError

from kvprofile.budget.profile import FULL_ATTENTION, SLIDING_ATTENTION, Geometry
from kvprofile.checkpoint.source import Source, fetch_weights
from kvprofile.checkpoint.weights import fingerprint, read_header, weight_files
from kvprofile.errors import InputError, first_line, plain

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_ENCODERS = {"ernie", "ernie_m", "electra", "xmod", "reformer", "roformer", "rembert"}
MAX_LAYERS, MAX_VALUE = 4096, 2**40
_OTHER_SENSES = ("vision_config", "audio_config", "encoder", "vision_encoder", "audio_encoder")


@dataclass(frozen=True)
class Description:
    """What the config and the tensor headers of a checkpoint tell without loading weights."""

    source: Source
    config: PretrainedConfig
    geometry: Geometry
    architecture: str
    max_positions: int
    position_reason: str
    vocabulary_rows: int
    weight_bytes: int
    weights_sha256: str
    trust_remote_code: bool


def describe(source: Source, trust_remote_code: bool = False) -> Description:
    """Read config and tensor headers. Raises InputError for what cannot be profiled, by name."""
    config = _read_config(source, trust_remote_code)
    named = getattr(config, "architectures", None)
    first = named[0] if isinstance(named, list) and named else type(config).__name__.replace("Config", "ForCausalLM")
    architecture = plain(first)[:200] or "unnamed"
    try:
        _refuse_unsupported(source, config, architecture, trust_remote_code)
        max_positions, reason = _max_positions(config)
        geometry = _geometry(source, config, max_positions)
        vocabulary_rows = int(config.vocab_size)
    except (AttributeError, TypeError, ValueError, ArithmeticError) as error:
        raise InputError(f"{source.folder / 'config.json'}: not a decoder's config: {first_line(error)}") from error
    folder = fetch_weights(source, trust_remote_code)
    headers = {file: read_header(file) for file in weight_files(folder)}
    return Description(
        source=Source(source.name, folder, source.revision),
        config=config,
        geometry=geometry,
        architecture=architecture,
        max_positions=max_positions,
        position_reason=reason,
        vocabulary_rows=vocabulary_rows,
        weight_bytes=sum(tensor.end - tensor.first for tensors in headers.values() for tensor in tensors),
        weights_sha256=fingerprint(headers),
        trust_remote_code=trust_remote_code,
    )


def _read_config(source: Source, trust_remote_code: bool) -> PretrainedConfig:
    from transformers import AutoConfig
    from transformers import __version__ as transformers_version
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    quiet_transformers()
    file = source.folder / "config.json"
    if not file.is_file():
        raise InputError(f"{source.folder} has no config.json; give the folder of a Hugging Face checkpoint")
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
        model_type = raw["model_type"]
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{file}: not readable as JSON: {first_line(error)}") from error
    except (KeyError, TypeError) as error:
        raise InputError(f"{file}: no model_type; not the config of a Hugging Face checkpoint") from error
    if not isinstance(model_type, str):
        raise InputError(f"{file}: model_type is no text; not the config of a Hugging Face checkpoint")
    absurd = _absurd(raw)
    if absurd is not None:
        raise InputError(f"{file}: {absurd} is larger than any model's")
    if "auto_map" in raw and not trust_remote_code and model_type not in CONFIG_MAPPING:
        raise InputError(f"{source.name} brings its own code; read it, then pass --trust-remote-code to run it")
    try:
        config = AutoConfig.from_pretrained(source.folder, trust_remote_code=trust_remote_code, local_files_only=True)
    except Exception as error:  # configs validate themselves and raise all kinds
        if "does not recognize this architecture" in str(error):
            raise InputError(
                f"{source.name}: model type {model_type!r} is not known to transformers {transformers_version}"
            ) from error
        raise InputError(f"{file}: {first_line(error)}") from error
    config._attn_implementation = None  # may name a kernel of the hub, which would be fetched and run
    return config


def _absurd(value: object, name: str = "") -> str | None:
    """The name of a number that transformers would take memory for, or count up to, without end."""
    if isinstance(value, dict):
        return next(filter(None, (_absurd(each, plain(key)[:40]) for key, each in value.items())), None)
    if isinstance(value, list):
        return next(filter(None, (_absurd(each, name) for each in value)), None)
    most = MAX_LAYERS if "layer" in name else MAX_VALUE
    return name if isinstance(value, int | float) and most < value < math.inf else None


def _refuse_unsupported(source: Source, config: PretrainedConfig, architecture: str, trust_remote_code: bool) -> None:
    kind = config.model_type

    def refuse(why: str) -> InputError:
        return InputError(f"{source.name} ({architecture}, model type {kind!r}) cannot be profiled: {why}")

    if getattr(config, "is_encoder_decoder", False):
        raise refuse("it is an encoder-decoder; only decoders keep one cache per request")
    if any(getattr(config, name, None) is not None for name in _OTHER_SENSES):
        raise refuse("it reads images or sound; give the checkpoint of its language model")
    if getattr(config, "kv_lora_rank", None):
        raise refuse("multi-head latent attention has no per-head cache")
    if getattr(config, "num_kv_shared_layers", 0):
        raise refuse("its layers share their caches")
    if kind in _ENCODERS or kind.startswith("data2vec") or ("bert" in kind and "decoder" not in kind):
        raise refuse("it is an encoder")
    types = {*(getattr(config, "layer_types", None) or ()), *(getattr(config, "layers_block_type", None) or ())}
    foreign = sorted(types - {FULL_ATTENTION, SLIDING_ATTENTION, "attention"})
    if foreign:
        raise refuse(f"it has layers of type {', '.join(foreign)}")
    if trust_remote_code and getattr(config, "auto_map", None):
        return
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise refuse("transformers has no causal language model for it")
    model_class = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    if not getattr(model_class, "_supports_attention_backend", False):
        raise refuse("its attention does not go through transformers' attention interface")


def _geometry(source: Source, config: PretrainedConfig, max_positions: int) -> Geometry:
    """The geometry; a window as wide as all positions hides nothing, so its layers count as full."""
    layers, heads = config.num_hidden_layers, config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    head_size = getattr(config, "head_dim", None) or config.hidden_size // heads
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    types = getattr(config, "layer_types", None) or [SLIDING_ATTENTION if window else FULL_ATTENTION] * layers
    if window and window >= max_positions:
        types = [FULL_ATTENTION if kind == SLIDING_ATTENTION else kind for kind in types]
    for name in ("num_hidden_layers", "hidden_size", "vocab_size"):
        if getattr(config, name) < 1:
            raise InputError(f"{source.folder / 'config.json'}: {name} is {getattr(config, name)}")
    if FULL_ATTENTION not in types:
        raise InputError(
            f"{source.name} cannot be profiled: every layer slides over a window of {window} tokens, "
            "so no head keeps the context"
        )
    try:
        return Geometry(
            layers=layers, attention_heads=heads, kv_heads=kv_heads, head_size=head_size, layer_types=list(types)
        )
    except ValidationError as error:
        told = error.errors(include_url=False, include_input=False)[0]["msg"].removeprefix("Value error, ")
        raise InputError(f"{source.folder / 'config.json'}: {told}") from error


def _max_positions(config: PretrainedConfig) -> tuple[int, str]:
    """The longest sequence whose cached keys stay valid, and why.

    Dynamic-NTK and longrope change every rotary frequency once a sequence is longer than the original length, which
    would leave keys cached before out of date.
    """
    limit = int(getattr(config, "max_position_embeddings", 0) or 0) or 2**31
    reason = f"max_position_embeddings is {limit}"
    rope = getattr(config, "rope_parameters", None) or {}
    for parameters in [rope, *(value for value in rope.values() if isinstance(value, dict))]:
        kind = parameters.get("rope_type")
        if kind in ("dynamic", "longrope"):
            original = parameters.get("original_max_position_embeddings") or getattr(
                config, "original_max_position_embeddings", None
            )
            if original and original < limit:
                limit, reason = int(original), f"{kind} RoPE changes its factors beyond {original} positions"
    return limit, reason


def quiet_transformers() -> None:
    """Keep transformers' own log and bars out of the output."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
