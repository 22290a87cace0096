"""Architecture facts of published models whose scores are imported without the checkpoint at hand.

Each fact is the one stated in the model's ``config.json`` on the hub (``source`` is its address; it was not fetched
when this table was written). L and G are checked against the shape of every imported file. None of these models has
sliding-window layers: the Mistral releases from 0.2 on set ``sliding_window`` to null. For any other model the facts
are read from a ``config.json``.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from kvprofile.budget import store
from kvprofile.budget.config_file import read_config
from kvprofile.budget.model_cache import cache_of
from kvprofile.budget.model_shape import find_shape
from kvprofile.budget.profile import FULL_ATTENTION, Geometry
from kvprofile.errors import InputError


@dataclass(frozen=True)
class ModelFacts:
    """What a budget file says of a model's architecture, and where that is stated."""

    name: str
    architecture: str
    geometry: Geometry
    source: str


def _facts(name: str, architecture: str, layers: int, heads: int, kv_heads: int, head_size: int) -> ModelFacts:
    geometry = Geometry(
        layers=layers,
        attention_heads=heads,
        kv_heads=kv_heads,
        head_size=head_size,
        layer_types=[FULL_ATTENTION] * layers,
    )
    return ModelFacts(name, architecture, geometry, f"https://huggingface.co/{name}/blob/main/config.json")


KNOWN_MODELS: dict[str, ModelFacts] = {
    facts.name: facts
    for facts in (
        _facts("Qwen/Qwen2.5-7B-Instruct-1M", "Qwen2ForCausalLM", 28, 28, 4, 128),
        _facts("Qwen/Qwen2.5-14B-Instruct-1M", "Qwen2ForCausalLM", 48, 40, 8, 128),
        _facts("meta-llama/Llama-3.1-8B-Instruct", "LlamaForCausalLM", 32, 32, 8, 128),
        _facts("gradientai/Llama-3-8B-Instruct-Gradient-1048k", "LlamaForCausalLM", 32, 32, 8, 128),
        _facts("gradientai/Llama-3-8B-Instruct-Gradient-4194k", "LlamaForCausalLM", 32, 32, 8, 128),
        _facts("mistralai/Mistral-7B-Instruct-v0.2", "MistralForCausalLM", 32, 32, 8, 128),
        _facts("mistralai/Mistral-7B-Instruct-v0.3", "MistralForCausalLM", 32, 32, 8, 128),
        _facts("togethercomputer/Llama-2-7B-32K-Instruct", "LlamaForCausalLM", 32, 32, 32, 128),
    )
}


def find(model: str, config: Path | None = None) -> ModelFacts:
    """Facts of a model: from the given ``config.json``, the table, a checkpoint folder or the model's budget file.

    ``model`` is a hub id, a checkpoint folder or a budget file. Raises InputError where nothing tells the facts.
    """
    if config is not None:
        return from_config(config, model)
    if model in KNOWN_MODELS:
        return KNOWN_MODELS[model]
    place = Path(model)
    if store.is_dir(place):
        return from_config(place / "config.json", find_shape(model).name)
    for file in (place, store.default_path(model)):
        if store.is_file(file):
            found = store.load(file).model
            return ModelFacts(found.name, found.architecture, found.geometry, file.name)
    raise InputError(
        f"the shape of {model} is not known here; give --config with its config.json, or a checkpoint folder as --model"
    )


def same_name(one: str, other: str) -> bool:
    """Whether two names are one model's: hub ids, or paths on somebody's machine.

    The last parts count, and one may end with the other: Meta-Llama-3.1-8B was renamed to Llama-3.1-8B.
    """
    first, second = (f"-{name.replace(chr(92), '/').rstrip('/').rpartition('/')[2].lower()}" for name in (one, other))
    return first.endswith(second) or second.endswith(first)


def from_config(path: Path, name: str) -> ModelFacts:
    """Facts of the model called ``name`` from its ``config.json``. Raises InputError where that does not tell them."""
    file = read_config(path)
    geometry = cache_of(file, name, "read").geometry
    stated = file.raw.get("architectures")
    architecture = stated[0] if isinstance(stated, list) and stated else None
    if not isinstance(architecture, str) or not architecture:
        raise InputError(f"{path}: no architectures; not the config of a Hugging Face checkpoint")
    return ModelFacts(name, architecture, geometry, path.name)
