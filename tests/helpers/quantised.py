"""A checkpoint in int8, made by hand in the compressed-tensors format: 8-bit weights per channel, 8-bit inputs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

_EIGHT_BITS = {"num_bits": 8, "type": "int", "symmetric": True}

CONFIG = {
    "quant_method": "compressed-tensors",
    "format": "int-quantized",
    "quantization_status": "compressed",
    "ignore": ["lm_head"],
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {**_EIGHT_BITS, "strategy": "channel", "dynamic": False},
            "input_activations": {**_EIGHT_BITS, "strategy": "token", "dynamic": True},
        }
    },
}


def quantise(checkpoint: Path, folder: Path) -> Path:
    """A copy of a checkpoint of one weight file, its linear layers but the LM head in int8."""
    shutil.copytree(checkpoint, folder)
    file = folder / "model.safetensors"
    weights = load_file(file)
    for name in [name for name in weights if name.endswith("_proj.weight")]:
        weight = weights[name].float()
        scale = weight.abs().amax(1, keepdim=True).clamp_min(1e-8) / 127
        weights[name] = (weight / scale).round().clamp(-127, 127).to(torch.int8)
        weights[name.replace("weight", "weight_scale")] = scale
    save_file(weights, file, metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": CONFIG}))
    return folder
