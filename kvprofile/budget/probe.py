"""The probe: which tokens of a context a graded head keeps, judged by what its cache holds of them.

For each KV head a linear function of a cached token's key and value, fitted to KVzip's scores of the corpora while they
were made (``scoring.probe_fit``). It is written next to the budget file, which knows its digest:
``models/kv_budget/<model>.probe.safetensors`` with one tensor ``weights`` [L', G, F] (float32), L' the profiled layers.

torch is imported where tensors are needed, so that reading budgets does without it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from kvprofile.budget.profile import Profile
from kvprofile.errors import InputError
from kvprofile.files import read_bytes, sha256_of

if TYPE_CHECKING:
    import torch

FEATURES = "key, value, norms"
SUFFIX = ".probe.safetensors"
MAX_FILE_BYTES = 256 * 1024 * 1024


def path_of(budget_file: Path) -> Path:
    """Where the probe of a budget file lies: next to it, under its name."""
    return budget_file.with_name(f"{budget_file.stem}{SUFFIX}")


def features(keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Features [G, m, F] (float32) of cached tokens: keys and values [G, m, D]; the constant is the last."""
    import torch

    keys, values = keys.float(), values.float()
    norms = [tensor.norm(dim=-1, keepdim=True) for tensor in (keys, values)]
    return torch.cat([keys, values, *norms, torch.ones_like(norms[0])], -1)


@dataclass(frozen=True)
class Probe:
    """Weights [L', G, F] of the profiled ``layers``."""

    layers: tuple[int, ...]
    weights: torch.Tensor

    def scores(self, layer: int, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """Scores [G, m] of tokens of a layer, keys and values [G, m, D] as the cache holds them."""
        weights = self.weights[self.layers.index(layer)].to(keys.device)
        return (features(keys, values) @ weights[..., None])[..., 0]

    def to_bytes(self) -> bytes:
        """The file's bytes."""
        import safetensors.torch

        notes = {"features": FEATURES, "layers": list(self.layers), "shape": "profiled layers, KV heads, features"}
        return safetensors.torch.save({"weights": self.weights.contiguous()}, {"kvprofile": json.dumps(notes)})


def load(path: Path, profile: Profile) -> Probe:
    """The probe of a profile.

    Raises InputError where the profile has none, its file is missing, is not the one that the profile was written with,
    or belongs to a kvprofile that looks at other features.
    """
    record = profile.probe
    if record is None:
        raise InputError(f"the budget file of {profile.model.name} has no probe; make one with 'kvprofile score'")
    if not path.is_file():
        raise InputError(f"no probe {path}, which graded budgets need; put it next to the budget file, or score again")
    content = read_bytes(path, MAX_FILE_BYTES)
    if sha256_of(content) != record.sha256:
        raise InputError(
            f"{path} is not the probe that the budget file of {profile.model.name} was written with; take both files "
            "from one commit, or score again"
        )
    if record.features != FEATURES:
        raise InputError(f"{path} looks at {record.features!r}, this kvprofile at {FEATURES!r}; score again")
    import safetensors.torch

    geometry = profile.model.geometry
    weights = safetensors.torch.load(content)["weights"]
    if weights.shape[:2] != (len(geometry.profiled_layers), geometry.kv_heads):
        raise InputError(f"{path} is for {tuple(weights.shape[:2])} layers and KV heads, not {geometry.describe()}")
    return Probe(geometry.profiled_layers, weights)
