"""Heads part by part from the start: the projections around a split layer load their rows and columns in that order.

Queries, keys and values of a part then are slices of what the projection gives, and the output projection takes the
parts' outputs as they come; without this they are gathered and put back at every step. The order is applied where a
parameter's loader is called, so weights that are loaded again later are in order too. Only plain attention modules
with unquantised projections are touched; what lies between projection and attention must treat all heads alike.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from vllm.distributed import get_tensor_model_parallel_rank
from vllm.model_executor.layers.linear import QKVParallelLinear, RowParallelLinear, UnquantizedLinearMethod
from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbeddingBase
from vllm.model_executor.model_loader.reload import record_metadata_for_reloading

from kvprofile.runtime.engine_budget import EngineBudget
from kvprofile.runtime.layer import SplitAttention
from kvprofile.runtime.settings import logger

LOAD_FORMATS = frozenset({"auto", "hf", "safetensors", "pt", "npcache", "mistral", "fastsafetensors", "instanttensor"})
"""Those that hand every weight to its parameter's loader, in the checkpoint's shape."""


def permuting(stock: Callable[..., Any]) -> Callable[..., Any]:
    """``BaseModelLoader.create_model`` whose model loads heads part by part where it can."""

    def create_model(self: Any, vllm_config: Any, *args: Any, **kwargs: Any) -> Any:
        model = stock(self, vllm_config, *args, **kwargs)
        if EngineBudget.of(vllm_config.additional_config).permute_weights:
            ordered, gathered = _permute(model)
            if ordered or gathered:
                logger.info("kvprofile: heads of %d layers load in order, of %d are gathered", ordered, gathered)
            if ordered:
                record_metadata_for_reloading(model)  # what vLLM noted does not know the new loaders
        return model

    return create_model


def _permute(model: torch.nn.Module) -> tuple[int, int]:
    """Change what can be changed. Gives the number of layers whose heads will be in order, and of the others."""
    ordered = gathered = 0
    for parent in model.modules():
        for layer in parent.children():
            if not isinstance(layer, SplitAttention) or layer.order is None:
                continue
            if _is_plain(parent, layer):
                _load_in_order(parent, layer)
                layer.expect_in_order()
                ordered += 1
            else:
                gathered += 1
    return ordered, gathered


def _is_plain(parent: Any, layer: Any) -> bool:
    """Whether ``parent`` holds unquantised projections, a rotary embedding and norms of single heads, nothing else."""

    def fits(module: Any) -> bool:
        if type(module) in (QKVParallelLinear, RowParallelLinear):
            return isinstance(module.quant_method, UnquantizedLinearMethod)
        sizes = {parameter.numel() for parameter in module.parameters()}
        return module is layer or isinstance(module, RotaryEmbeddingBase) or sizes == {layer.head_size}

    projections = [type(getattr(parent, name, None)) for name in ("qkv_proj", "o_proj")]
    return (
        projections == [QKVParallelLinear, RowParallelLinear]
        and not list(parent.parameters(recurse=False))
        and all(fits(module) for module in parent.children())
    )


def _load_in_order(parent: Any, layer: Any) -> None:
    qkv, size = parent.qkv_proj, layer.head_size
    group = qkv.total_num_heads // qkv.total_num_kv_heads
    first = get_tensor_model_parallel_rank() * layer.num_kv_heads  # more ranks than heads: one head each, in order
    keys = list(range(qkv.total_num_kv_heads))
    keys[first : first + layer.num_kv_heads] = [first + head for head in layer.order]
    queries = [head * group + member for head in keys for member in range(group)]
    rows = {"q": _expanded(queries, size), "k": _expanded(keys, size), "v": _expanded(keys, layer.head_size_v)}
    rows[None] = torch.cat(list(_behind_each_other(rows["q"], rows["k"], rows["v"])))  # type: ignore[index]
    for parameter in qkv.parameters():
        parameter.weight_loader = _reordering(parameter.weight_loader, rows, 0)
    parent.o_proj.weight.weight_loader = _reordering(
        parent.o_proj.weight.weight_loader, {None: _expanded(queries, layer.head_size_v)}, 1
    )


def _expanded(heads: list[int], size: int) -> torch.Tensor:
    """Indices of all elements of ``heads``, [len(heads) * size]."""
    return (torch.tensor(heads, device="cpu")[:, None] * size + torch.arange(size, device="cpu")).flatten()


def _behind_each_other(*parts: torch.Tensor) -> Iterator[torch.Tensor]:
    start = 0
    for part in parts:
        yield part + start
        start += len(part)


def _reordering(stock: Callable[..., None], orders: dict[Any, torch.Tensor], dim: int) -> Callable[..., None]:
    """A weight loader that puts ``dim`` of what it loads into the order of its shard, then calls ``stock``."""

    @functools.wraps(stock)
    def load_in_order(param: Any, loaded_weight: torch.Tensor, *shard: Any, **named: Any) -> None:
        order = orders[next(iter(shard), named.get("loaded_shard_id"))]
        if loaded_weight.shape[dim] != len(order):
            raise ValueError(
                f"kvprofile expected weights of {len(order)} elements to put heads in order, not "
                f"{loaded_weight.shape[dim]}; this checkpoint is sharded in a way it does not know"
            )
        stock(param, loaded_weight.index_select(dim, order.to(loaded_weight.device)), *shard, **named)

    return load_in_order
