"""How a checkpoint's weights are quantised: who says so, who can read them, and float8 weights multiplied out.

NVIDIA's modelopt may describe its quantisation in a file of its own, hf_quant_config.json, which vLLM reads and
transformers does not (https://github.com/NVIDIA/Model-Optimizer, export formats).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvprofile.checkpoint.weights import Tensor
from kvprofile.errors import InputError, first_line, plain

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig

SIDE_FILE = "hf_quant_config.json"
_FLOAT8 = ("F8_E4M3", "F8_E5M2")


@dataclass(frozen=True)
class Quantisation:
    """How weights are quantised: in words, whether transformers reads them, and whether they are ``multiplied_out``.

    Multiplied out are modelopt's FP8 weights, each with one scale. When such a model is served its inputs are rounded
    too; here they are not.
    """

    method: str
    in_transformers: bool
    multiplied_out: bool = False


def quantisation_of(folder: Path, config: PretrainedConfig) -> Quantisation | None:
    """What config.json or modelopt's side file says; None where neither does. Raises InputError for a broken file."""
    found = _stated(getattr(config, "quantization_config", None)) or _side_file(folder / SIDE_FILE)
    if found is None:
        return None
    method = plain(found.get("quant_method") or "by a method it does not name")[:100]
    algorithm = plain(found.get("quant_algo") or "")[:100].upper()
    if method.startswith("modelopt"):
        return Quantisation(f"{method} {algorithm}".strip(), False, multiplied_out=algorithm == "FP8")
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

    by_flags = found.get("load_in_4bit") or found.get("load_in_8bit")
    return Quantisation(method, bool(by_flags) or method in AUTO_QUANTIZATION_CONFIG_MAPPING)


def _stated(found: Any) -> dict[str, Any] | None:
    """The quantization_config of a config, as a dictionary."""
    if not found:
        return None
    stated = dict(found if isinstance(found, Mapping) else found.to_dict())
    method = stated.get("quant_method")
    return {**stated, "quant_method": getattr(method, "value", method)}


def _side_file(file: Path) -> dict[str, Any] | None:
    """What hf_quant_config.json says of the weights; None where there is none, or only the cache is quantised."""
    if not file.is_file():
        return None
    try:
        found = json.loads(file.read_text(encoding="utf-8"))["quantization"]
        algorithm = found.get("quant_algo")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(f"{file}: does not say how the weights are quantised: {first_line(error)}") from error
    return {"quant_method": "modelopt", "quant_algo": algorithm} if algorithm else None


def as_multiplied_out(tensors: Iterable[Tensor]) -> list[Tensor]:
    """The tensors as they are once float8 weights are multiplied by their scales, which are then gone."""
    stored = {tensor.name: tensor for tensor in tensors}
    scaled = {name for name, tensor in stored.items() if _scale_name(name) in stored and tensor.dtype in _FLOAT8}
    gone = {_scale_name(name) for name in scaled} | {_input_scale_name(name) for name in scaled}
    kept = [tensor for name, tensor in stored.items() if name not in gone]
    return [replace(tensor, dtype="BF16") if tensor.name in scaled else tensor for tensor in kept]


def multiplied_out(files: Iterable[Path], tensors: Iterable[Tensor]) -> dict[str, Any]:
    """The tensors by name, read when they are asked for: float8 weights times their scales, others as they are."""
    import safetensors

    slices: dict[str, Any] = {}
    for file in files:
        opened: Any = safetensors.safe_open(file, "pt")
        slices |= {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118 - it is not a mapping
    kept = {tensor.name: tensor for tensor in as_multiplied_out(tensors)}
    changed = {tensor.name for tensor in tensors if tensor.name in kept and kept[tensor.name].dtype != tensor.dtype}
    products = {name: _Product(slices[name], slices[_scale_name(name)]) for name in changed}
    return {name: products.get(name, slices[name]) for name in kept}


@dataclass(frozen=True)
class _Product:
    """A float8 weight times its scale, in float32; read like a slice of a safetensors file."""

    weight: Any
    scale: Any

    def __getitem__(self, index: Any) -> torch.Tensor:

        scale = self.scale[:] if self.scale.get_shape() else self.scale[...]
        if scale.numel() != 1:
            raise InputError(f"a float8 weight of shape {self.weight.get_shape()} has {scale.numel()} scales, not one")
        found: torch.Tensor = self.weight[...].float() * scale.float().reshape(())
        return found[index]

    def get_shape(self) -> list[int]:
        """Of the weight."""
        shape: list[int] = self.weight.get_shape()
        return shape

    def get_dtype(self) -> str:
        """As safetensors names it."""
        return "F32"


def _scale_name(weight: str) -> str:
    return f"{weight.removesuffix('weight')}weight_scale"


def _input_scale_name(weight: str) -> str:
    return f"{weight.removesuffix('weight')}input_scale"
