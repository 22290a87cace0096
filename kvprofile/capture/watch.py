"""What a worker does while a session is open: it follows marked requests through the attention layers of its rank.

Two calls are watched, on the objects of this worker alone: ``execute_model``, which knows the requests of a step, and
each full-attention layer's ``impl.forward``, which has queries, cache and block table but knows no requests. A step in
which a marked request is not alone cannot be told apart there, so it is noted as a problem and not scored.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import safetensors.torch
import torch
from vllm.distributed import get_pp_group, get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.models.utils import extract_layer_index
from vllm.v1.attention.backend import AttentionType

from kvprofile import unsupported
from kvprofile.budget import probe
from kvprofile.capture import layout, rows
from kvprofile.capture.marks import Mark


@dataclass
class Found:
    """What is known of a marked request so far; tensors by 'layer.name', the first axis being this rank's KV heads."""

    mark: Mark
    prompt_tokens: int
    covered: list[tuple[int, int]] = field(default_factory=list)
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    problems: set[str] = field(default_factory=set)


@dataclass(frozen=True)
class Step:
    """The rows [start, stop) of a marked request that the step under way computes."""

    found: Found
    start: int
    stop: int


class Watch:
    """Attached to one worker from ``attach`` to ``detach``; then every object is as it was."""

    def __init__(self, worker: Any) -> None:
        self.worker = worker
        self.layers = watched_layers(worker)
        self.first_head, self.kv_heads = _heads_of_rank(worker)
        # a rank that shares a head with others knows the scores of its own query heads only
        self.whole_heads = get_tensor_model_parallel_world_size() <= self.kv_heads
        self.requests: dict[str, Found] = {}
        self.step: Step | None = None
        self._layouts: dict[int, layout.Layout] = {}

    def attach(self) -> None:
        """Start watching. Raises ValueError where a cache cannot be read; then nothing is watched."""
        if "execute_model" in vars(self.worker):
            raise ValueError("something else has replaced this worker's execute_model")
        for index, layer in self.layers.items():
            self._layouts[index] = layout.probe(layer, layer.kv_cache, layer.kv_cache.dtype)
        _make_stage_buffers(self.worker.model_runner)
        for index, layer in self.layers.items():
            layer.impl.forward = self._watching(index, layer.impl.forward)
        self.worker.execute_model = self._stepping(self.worker.execute_model)

    def detach(self) -> None:
        """Stop watching."""
        for layer in self.layers.values():
            vars(layer.impl).pop("forward", None)
        vars(self.worker).pop("execute_model", None)

    def take(self, key: str) -> bytes:
        """What was found under a key, as safetensors; the worker forgets it."""
        names = [name for name, found in self.requests.items() if found.mark.key == key]
        if not names:
            return _packed({}, self._notes([], [f"no request {key}"]))
        found = self.requests.pop(names[-1])
        for name in names[:-1]:
            del self.requests[name]
        tensors = {name: tensor.cpu().contiguous() for name, tensor in found.tensors.items()}
        return _packed(tensors, self._notes(found.covered, sorted(found.problems)))

    def _notes(self, covered: list[tuple[int, int]], problems: list[str]) -> dict[str, Any]:
        return {
            "first_head": self.first_head,
            "kv_heads": self.kv_heads,
            "covered": covered,
            "problems": problems,
        }

    def _stepping(self, stock: Callable[..., Any]) -> Callable[..., Any]:
        def execute_model(scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
            self.step = self._step_of(scheduler_output)
            try:
                return stock(scheduler_output, *args, **kwargs)
            finally:
                if self.step is not None and self.step.found.mark.chunk is not None:
                    self.step.found.covered.append((self.step.start, self.step.stop))
                self.step = None

        return execute_model

    def _step_of(self, scheduled: Any) -> Step | None:
        starts = {}
        for new in scheduled.scheduled_new_reqs:
            starts[new.req_id] = new.num_computed_tokens
            mark = Mark.of(new.sampling_params)
            if mark is not None:
                self.requests[new.req_id] = Found(mark, new.prompt_len)
        again = scheduled.scheduled_cached_reqs
        starts |= dict(zip(again.req_ids, again.num_computed_tokens, strict=True))
        counts = scheduled.num_scheduled_tokens
        marked = [name for name in counts if name in self.requests]
        if not marked:
            return None
        if len(counts) > 1:
            for name in marked:
                self.requests[name].problems.add("another request ran in the same step")
            return None
        found, start = self.requests[marked[0]], starts[marked[0]]
        stop = min(start + counts[marked[0]], found.prompt_tokens)
        return Step(found, start, stop) if start < stop else None

    def _watching(self, index: int, stock: Callable[..., Any]) -> Callable[..., Any]:
        def forward(layer: Any, query: Any, key: Any, value: Any, cache: Any, metadata: Any, **others: Any) -> Any:
            result = stock(layer, query, key, value, cache, metadata, **others)
            if self.step is not None and metadata is not None:
                self._look(self.step, index, layer, query, key, cache, metadata)
            return result

        return forward

    def _look(self, step: Step, index: int, layer: Any, query: Any, key: Any, cache: Any, metadata: Any) -> None:
        where, found, mark = self._layouts[index], step.found, step.found.mark
        table = getattr(metadata, "block_table", None)
        if table is None or metadata.num_actual_tokens != step.stop - step.start:
            found.problems.add(f"attention backend {layer.attn_backend.get_name()} gives no block table of these rows")
            return
        table = table[0]
        count = step.stop - step.start
        written = where.keys(cache, table, step.start, step.stop).transpose(0, 1)
        if not torch.equal(written.nan_to_num(), key[:count].to(cache.dtype).nan_to_num()):
            found.problems.add(f"the cache of layer {index} does not hold the keys that were written to it")
            return
        if mark.chunk is None:
            if step.stop >= mark.context_tokens:
                self._summarise(found, index, where, cache, table)
            return
        first = max(step.start, mark.context_tokens)
        if first >= step.stop:
            return
        keys = [
            where.keys(cache, table, start, stop)
            for start, stop in ((0, mark.prefix_tokens), mark.chunk, (mark.context_tokens, step.stop))
        ]
        before = mark.prefix_tokens + mark.chunk[1] - mark.chunk[0]
        weights = rows.largest_weights(
            query[first - step.start : count].view(step.stop - first, layer.num_heads, layer.head_size),
            torch.cat(keys, 1),
            slice(mark.prefix_tokens, before),
            before + first - mark.context_tokens + 1,
            layer.impl.scale,
            getattr(layer.impl, "logits_soft_cap", None) or None,
            getattr(layer.impl, "sinks", None),
        )
        name = f"{index}.scores"
        found.tensors[name] = torch.maximum(found.tensors[name], weights) if name in found.tensors else weights
        if step.stop == found.prompt_tokens and self.whole_heads:
            self._sum_up(found, index, where, cache, table)

    def _sum_up(self, found: Found, index: int, where: layout.Layout, cache: Any, table: Any) -> None:
        """The sums of a probe's fit over the tokens that the mark names, once their scores are complete."""
        first, stop = found.mark.probed
        if first >= stop or found.mark.chunk is None:
            return
        keys, values = where.keys(cache, table, first, stop), where.values(cache, table, first, stop)
        scores = found.tensors[f"{index}.scores"][:, first - found.mark.chunk[0] : stop - found.mark.chunk[0]]
        for kind, tensor in probe.sums(keys, values, scores, first, found.mark.context_tokens).items():
            found.tensors[f"{index}.{kind}"] = tensor

    def _summarise(self, found: Found, index: int, where: layout.Layout, cache: Any, table: Any) -> None:
        for kind, states in (
            ("key", where.keys(cache, table, 0, found.mark.context_tokens)),
            ("value", where.values(cache, table, 0, found.mark.context_tokens)),
        ):
            for name, tensor in rows.summarise(states).items():
                found.tensors[f"{index}.{kind}_{name}"] = tensor


def _packed(tensors: dict[str, torch.Tensor], notes: dict[str, Any]) -> bytes:
    """What ``merge`` reads."""
    return safetensors.torch.save(tensors, metadata={"kvprofile": json.dumps(notes)})


def watched_layers(worker: Any) -> dict[int, Any]:
    """The full-attention layers of this rank by their index. Raises ValueError for one that cannot be read."""
    config = worker.vllm_config
    longest = config.model_config.max_model_len
    found: dict[int, Any] = {}
    for name, layer in config.compilation_config.static_forward_context.items():
        if not isinstance(layer, Attention) or layer.attn_type != AttentionType.DECODER:
            continue
        if layer.sliding_window is not None and layer.sliding_window < longest:
            continue
        problems = unsupported.holding(
            {
                "shares another layer's cache": layer.kv_sharing_target_layer_name is not None,
                "has ALiBi slopes": getattr(layer.impl, "alibi_slopes", None) is not None,
                "quantises its cache": layer.kv_cache_dtype not in unsupported.PLAIN_CACHES,
                "has values of another size than its keys": layer.head_size_v != layer.head_size,
                "is watched already": "forward" in vars(layer.impl),
            }
        )
        if problems:
            raise ValueError(f"layer {name} {problems[0]}")
        found[extract_layer_index(name)] = layer
    return found


def _make_stage_buffers(runner: Any) -> None:
    """What a later pipeline stage receives in. vLLM makes it while it warms up, which eager engines on a CPU do not."""
    if get_pp_group().is_first_rank or getattr(runner, "intermediate_tensors", False) is not None:
        return
    runner.intermediate_tensors = runner.model.make_empty_intermediate_tensors(
        batch_size=runner.max_num_tokens, dtype=runner.model_config.dtype, device=runner.device
    )


def _heads_of_rank(worker: Any) -> tuple[int, int]:
    """The first KV head of this rank, and how many the model has. Ranks beyond the number of heads hold copies."""
    total = worker.vllm_config.model_config.get_total_num_kv_heads()
    rank, size = get_tensor_model_parallel_rank(), get_tensor_model_parallel_world_size()
    return (rank * (total // size) if total >= size else rank // (size // total)), total
