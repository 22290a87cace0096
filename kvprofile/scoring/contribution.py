"""What attention to a token adds to a layer's output, next to what the layer was given: the weights of KVzip+.

KVzip+ (KVzap, arXiv 2601.07891) multiplies the attention that a key gets from a row by the length of what its value
then adds to the residual stream, and divides by the length of what the row brings: a x |W_O v| / |h|.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from kvprofile.budget.profile import Geometry
from kvprofile.errors import InputError


@dataclass
class Contributions:
    """Output projections W_O [hidden, H x D] by layer, and the log length [n] of each row that a layer was given last.

    Row norms are in float32; of models that add several streams, it is the one that enters the layer.
    """

    projections: dict[int, torch.nn.Module]
    log_row_norms: dict[int, torch.Tensor] = field(default_factory=dict)

    def log_value_norms(self, layer: int, value: torch.Tensor) -> torch.Tensor:
        """Log lengths [H, m] of W_O v: value [1, G, m, D] as each query head of its group writes it, in float32."""
        weight = _weight(self.projections[layer]).float()
        kv_heads, size = value.shape[1], value.shape[-1]
        group = weight.shape[1] // (kv_heads * size)
        norms = [
            (value[0, head // group].float() @ weight[:, head * size : (head + 1) * size].T).norm(dim=-1)
            for head in range(kv_heads * group)
        ]
        return torch.stack(norms).log()


@contextmanager
def watching(model: torch.nn.Module, geometry: Geometry) -> Iterator[Contributions]:
    """Note the length of every row that enters a layer; nothing of the model changes, and hooks are removed afterwards.

    Raises InputError where a profiled layer has no output projection ``o_proj`` of plain weights.
    """
    attentions = {
        int(module.layer_idx): name
        for name, module in model.named_modules()
        if hasattr(module, "layer_idx") and hasattr(module, "o_proj")
    }
    found = Contributions({})
    hooks = []
    for layer in geometry.profiled_layers:
        projection = model.get_submodule(f"{attentions[layer]}.o_proj") if layer in attentions else None
        weight = getattr(projection, "weight", None)
        plain = weight is not None and weight.ndim == 2 and weight.is_floating_point() and weight.device.type != "meta"
        if projection is None or not plain:
            raise InputError(
                f"--method kvzip-plus needs the output projections (o_proj) as plain weights in memory, and layer "
                f"{layer} has none; use kvzip"
            )
        found.projections[layer] = projection
        block = model.get_submodule(attentions[layer].rpartition(".")[0])
        hooks.append(block.register_forward_pre_hook(_note(found, layer), with_kwargs=True))
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def _weight(projection: Any) -> torch.Tensor:
    weight: torch.Tensor = projection.weight
    return weight


def _note(found: Contributions, layer: int) -> Any:
    """A hook that notes the rows [1, n, hidden] a layer is given."""

    def hook(_module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        rows = args[0] if args else kwargs["hidden_states"]
        found.log_row_norms[layer] = rows[0].float().norm(dim=-1).log()

    return hook
