"""What a checkpoint is, from its config and tensor headers: geometry, limits, and whether it can be profiled."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvprofile.budget.config_file import ConfigFile, quiet_transformers, read_json
from kvprofile.budget.model_cache import ModelCache, cache_of
from kvprofile.budget.profile import NO_CACHE, Geometry
from kvprofile.checkpoint.gguf import gguf_config, read_gguf
from kvprofile.checkpoint.quantisation import Quantisation, as_multiplied_out, quantisation_of
from kvprofile.checkpoint.rehearsal import rehearse, rehearse_gguf
from kvprofile.checkpoint.source import Source, fetch_weights
from kvprofile.checkpoint.states import remembers_nothing, states_of, why_not_followed
from kvprofile.checkpoint.weights import Tensor, fingerprint, read_header, weight_files
from kvprofile.errors import InputError, first_line, plain

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_OTHER_SENSES = ("vision_config", "audio_config", "encoder", "vision_encoder", "audio_encoder")


@dataclass(frozen=True)
class Description:
    """What the config and the tensor headers of a checkpoint tell without loading weights.

    ``parameters`` counts values, ``weight_bytes`` is their size as stored. ``notes`` says what was left out on purpose.
    """

    source: Source
    config: PretrainedConfig
    geometry: Geometry
    architecture: str
    max_positions: int
    position_reason: str
    vocabulary_rows: int
    weight_bytes: int
    parameters: int
    quantisation: Quantisation | None
    weights_sha256: str
    trust_remote_code: bool
    notes: tuple[str, ...] = ()

    @property
    def keeps_states(self) -> bool:
        """Whether some layers keep a state, in place of a cache or next to one: linear attention, convolutions."""
        return any(states_of(self.config))


def describe(source: Source, trust_remote_code: bool = False) -> Description:
    """Read config and tensor headers. Raises InputError for what cannot be profiled, by name."""
    quiet_transformers()
    packed = read_gguf(source.path) if source.gguf else None
    file = source.path if packed else source.folder / "config.json"
    if packed:
        config = gguf_config(packed)
        raw = config.to_dict()
    else:
        raw = _read_raw(source)
        config = _read_config(source, raw, trust_remote_code)
    named = getattr(config, "architectures", None)
    first = named[0] if isinstance(named, list) and named else type(config).__name__.replace("Config", "ForCausalLM")
    architecture = plain(first)[:200] or "unnamed"

    def refuse(why: str) -> InputError:
        return InputError(f"{source.name} ({architecture}, model type {config.model_type!r}) cannot be profiled: {why}")

    try:
        if any(getattr(config, name, None) is not None for name in _OTHER_SENSES):
            raise refuse("it reads images or sound; give the checkpoint of its language model")
        cache = cache_of(_config_file(raw, config), source.name, "profiled")
        unsupported = _unsupported(config, cache, trust_remote_code)
        if unsupported:
            raise refuse(unsupported)
        vocabulary_rows = int(config.vocab_size)
    except (AttributeError, TypeError, ValueError, ArithmeticError, RuntimeError) as error:
        raise InputError(f"{file}: not a decoder's config: {first_line(error)}") from error
    for name, value in (("hidden_size", getattr(config, "hidden_size", 1)), ("vocab_size", vocabulary_rows)):
        if value < 1:
            raise InputError(f"{file}: {name} is {value}")
    if packed:
        headers = {packed.path: list(packed.tensors)}
        quantisation: Quantisation | None = Quantisation(packed.stored_as(), in_transformers=True, multiplied_out=True)
        notes: tuple[str, ...] = ()
        rehearse_gguf(packed, config, cache.geometry)
    else:
        folder = fetch_weights(source, trust_remote_code)
        source = Source(source.name, folder, source.revision)
        headers = {found: read_header(found) for found in weight_files(folder)}
        quantisation = quantisation_of(folder, config)
        notes = _rehearsed(folder, config, cache.geometry, headers, quantisation, trust_remote_code)
    tensors = [tensor for found in headers.values() for tensor in found]
    return Description(
        source=source,
        config=config,
        geometry=cache.geometry,
        architecture=architecture,
        max_positions=cache.valid_positions,
        position_reason=cache.position_reason,
        vocabulary_rows=vocabulary_rows,
        weight_bytes=sum(tensor.end - tensor.first for tensor in tensors),
        parameters=sum(tensor.count for tensor in tensors),
        quantisation=quantisation,
        weights_sha256=fingerprint(headers),
        trust_remote_code=trust_remote_code,
        notes=notes,
    )


def _rehearsed(
    folder: Path,
    config: PretrainedConfig,
    geometry: Geometry,
    headers: dict[Path, list[Tensor]],
    quantisation: Quantisation | None,
    trust_remote_code: bool,
) -> tuple[str, ...]:
    """Check tensors against the model. Quantised ones and those of foreign code are checked when they are loaded."""
    if trust_remote_code and getattr(config, "auto_map", None):
        return ()
    tensors = [tensor for found in headers.values() for tensor in found]
    if quantisation is None:
        return rehearse(folder, config, geometry, tensors)
    if quantisation.multiplied_out:
        return rehearse(folder, config, geometry, as_multiplied_out(tensors))
    return ()


def _read_raw(source: Source) -> dict[str, Any]:
    """config.json as written, with the name of its class."""
    file = source.folder / "config.json"
    if not file.is_file():
        raise InputError(f"{source.folder} has no config.json; give the folder of a Hugging Face checkpoint")
    raw = read_json(file)
    if "model_type" not in raw:
        raise InputError(f"{file}: no model_type; not the config of a Hugging Face checkpoint")
    if not isinstance(raw["model_type"], str):
        raise InputError(f"{file}: model_type is not text; not the config of a Hugging Face checkpoint")
    return raw


def _read_config(source: Source, raw: dict[str, Any], trust_remote_code: bool) -> PretrainedConfig:
    from transformers import AutoConfig
    from transformers import __version__ as transformers_version
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    quiet_transformers()
    file, model_type = source.folder / "config.json", raw["model_type"]
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


def _config_file(raw: dict[str, Any], config: PretrainedConfig) -> ConfigFile:
    """What the one reader of configs reads: a class of transformers', or the values of a checkpoint's own class."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    known = config.model_type in CONFIG_MAPPING and type(config) is CONFIG_MAPPING[config.model_type]
    return ConfigFile(raw, raw, "", config) if known else ConfigFile(raw, {**raw, **config.to_dict()}, "", None)


def _unsupported(config: PretrainedConfig, cache: ModelCache, trust_remote_code: bool) -> str | None:
    """Why a model whose cache can be read is not one that can be scored; None for one that can."""
    if getattr(config, "num_kv_shared_layers", 0):
        return "its layers share their caches"
    if not cache.is_uniform:
        return "its layers differ in their heads, or keys and values in their size"
    if config.model_type == "jetmoe":
        return "each token chooses query heads of its own (mixture of attention heads)"
    own_code = trust_remote_code and bool(getattr(config, "auto_map", None))
    states = states_of(config)
    if own_code and (any(states) or NO_CACHE in cache.geometry.layer_types):
        return "some layers keep a state instead of a cache, in code of its own that kvprofile does not follow"
    unknown = [layer for layer, kind in enumerate(cache.geometry.layer_types) if kind == NO_CACHE]
    if any(not states or not (states[layer] or remembers_nothing(config, layer)) for layer in unknown):
        return "some layers keep neither a cache of the text nor a state that transformers knows of"
    if own_code:
        return None
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        return "transformers has no causal language model for it"
    model_class = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    says_so = getattr(model_class, "_supports_attention_backend", False)
    # most classes with states do not say that their attention goes through the interface, although it does
    if not (says_so or (any(states) and model_class._can_set_attn_implementation())):
        return "its attention does not go through transformers' attention interface"
    return why_not_followed(model_class, config) if any(states) else None
