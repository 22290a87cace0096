"""Graded heads when their prompt is done: the tokens that stay are moved together, from the scheduler to every worker.

The scheduler's cache managers note a move for each request and cache group (``stream_cache``): which blocks the spans
of the prompt's middle lay in, which new ones take the tokens of them that stay, and what the request's row names from
then on. Moves travel on vLLM's SchedulerOutput. A worker makes them before anything else of the step, request by
request and group by group in the order of the schedule: a block that one move takes may be one that an earlier move has
just given back, so its content is read by then, and blocks that others are given in the step are zeroed and written
later.

Which tokens stay is the probe's to say, for every head on its own (``budget.probe``); ranks need not agree.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from vllm.distributed import get_tensor_model_parallel_rank
from vllm.utils.torch_utils import async_tensor_h2d

from kvprofile.budget.probe import TIE
from kvprofile.capture import layout
from kvprofile.runtime import here
from kvprofile.runtime.settings import SHARED
from kvprofile.runtime.stats import counters

ATTRIBUTE = "kvprofile_moves"
"""Of a SchedulerOutput: its moves, where it has any."""

Replace = Callable[[Any, str, int, int, list[int]], None]

SLICE_TOKENS = 8192
"""Tokens that are scored at a time, which bounds the memory that takes."""


@dataclass(frozen=True)
class GroupMove:
    """Of one cache group: ``row`` names what stands in a request's row from block ``first`` on, ``kept`` of it blocks
    that hold tokens that stay. None where the request was preempted before the step began.

    ``sources`` are the blocks of spans that are to be moved, one after the other, and ``targets`` those that take what
    stays of them; ``spans`` counts both for each span. Spans that another request has moved already are not among them.
    """

    first: int
    kept: int
    row: list[int] | None
    sources: list[int]
    targets: list[int]
    spans: list[tuple[int, int]]


@dataclass(frozen=True)
class Move:
    """All of a request's moves, by cache group."""

    request_id: str
    groups: dict[int, GroupMove] = field(default_factory=dict)


def carrying(stock: Callable[..., Any]) -> Callable[..., Any]:
    """``Scheduler.schedule`` whose output carries the moves that were noted while it was made."""

    def schedule(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = stock(self, *args, **kwargs)
        moves = _collected(self.kv_cache_manager.coordinator.single_type_managers)
        if moves:
            setattr(output, ATTRIBUTE, moves)
            # what a move writes is not to be zeroed afterwards; freed blocks are noted as ~number when poisoned
            taken = {block for move in moves for group in move.groups.values() for block in group.targets}
            zeroed = output.new_block_ids_to_zero or ()
            left = [block for block in zeroed if block not in taken and ~block not in taken]
            output.new_block_ids_to_zero = left or None
        return output

    return schedule


def _collected(managers: Iterable[Any]) -> list[Move]:
    """The moves of all groups, request by request in the order of the schedule."""
    found: dict[str, Move] = {}
    for group, manager in enumerate(managers):
        take = getattr(manager, "take_moves", None)
        for request_id, move in take().items() if take is not None else ():
            found.setdefault(request_id, Move(request_id)).groups[group] = move
    return list(found.values())


class Moved:
    """What a worker's model runner knows of the moves that it made: blocks kept by share, for each request."""

    def __init__(self) -> None:
        self.kept: dict[str, Mapping[float, int]] = {}
        self._layouts: dict[str, layout.Layout] = {}

    def ask_layouts(self, runner: Any) -> None:
        """Find out how the backend of every layer that moves tokens lays out a block.

        Raises ValueError where that cannot be found out.
        """
        config = runner.vllm_config
        layers, dtype = config.compilation_config.static_forward_context, config.model_config.dtype
        for group in runner.kv_cache_config.kv_cache_groups:
            for name in group.layer_names:
                if getattr(layers[name], "share", None):
                    self._layouts[name] = layout.probe(layers[name], layers[name].kv_cache, dtype)

    def make(self, runner: Any, moves: Iterable[Move], replace: Replace) -> None:
        """Make moves in the caches of a model runner, and let its rows name other blocks."""
        layers = runner.vllm_config.compilation_config.static_forward_context
        groups = runner.kv_cache_config.kv_cache_groups
        for move in moves:
            kept: dict[float, int] = {}
            for number, group in move.groups.items():
                names = groups[number].layer_names
                self._move(group, {name: layers[name] for name in names})
                if group.row is not None:
                    kept[layers[names[0]].share] = group.kept
                    replace(runner, move.request_id, number, group.first, group.row)
            if kept:
                self.kept[move.request_id] = kept

    def forget(self, request_ids: Iterable[str]) -> None:
        """Requests that are gone, or begin anew."""
        for request_id in request_ids:
            self.kept.pop(request_id, None)

    def _move(self, move: GroupMove, layers: Mapping[str, Any]) -> None:
        """In every layer of a group read the tokens that stay, then write them: sources and targets may overlap."""
        if not move.targets:
            return
        device = next(iter(layers.values())).kv_cache.device
        block_tokens = self._layouts[next(iter(layers))].block_tokens
        places = _places(move.spans, block_tokens)
        numbers = async_tensor_h2d([*move.sources, *move.targets, *places], device=device, dtype=torch.int64)
        sources, targets, chosen = numbers.split([len(move.sources), len(move.targets), len(places)])
        for name, layer in layers.items():
            where = self._layouts[name]
            keys, values = where.whole_blocks(layer.kv_cache, sources)
            scores = torch.cat([layer.probe.scores(0, *each) for each in _slices(where, keys, values)], dim=1)
            best = _best(scores.flatten(1), move.spans, block_tokens)
            kept = best.index_select(1, chosen).sort(dim=-1).values  # as in the text
            heads = torch.arange(len(kept), device=device)[:, None]
            here = heads, kept // block_tokens, kept % block_tokens
            where.write(layer.kv_cache, targets, keys[here], values[here])


def _slices(
    where: layout.Layout, keys: torch.Tensor, values: torch.Tensor
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Keys and values [G, .., block_tokens, D] as numbers, some blocks at a time."""
    step = max(1, SLICE_TOKENS // where.block_tokens)
    for start in range(0, keys.shape[1], step):
        yield where.numbers(keys[:, start : start + step], values[:, start : start + step])


def _places(spans: Sequence[tuple[int, int]], block_tokens: int) -> list[int]:
    """Where in what ``_best`` gives the tokens stand that stay."""
    most = max(kept for _, kept in spans)
    return [
        (number * most + block) * block_tokens + token
        for number, (_, kept) in enumerate(spans)
        for block in range(kept)
        for token in range(block_tokens)
    ]


def _best(scores: torch.Tensor, spans: Sequence[tuple[int, int]], block_tokens: int) -> torch.Tensor:
    """The best tokens [G, spans * most] by scores [G, m], as many of every span as stay of any, best first.

    Of two that score alike the earlier one comes first. All spans are equally long but for the last.
    """
    heads, tokens = scores.shape
    longest, most = (max(column) * block_tokens for column in zip(*spans, strict=True))
    # one number for score and place, so that no two are alike; what would fill up the last span is below all others
    worth = (scores / TIE).to(torch.int64) * longest
    worth = torch.nn.functional.pad(worth, (0, len(spans) * longest - tokens), value=torch.iinfo(torch.int64).min // 2)
    worth = worth.view(heads, len(spans), longest) - torch.arange(longest, device=scores.device)
    found = worth.topk(min(most, longest), dim=-1).indices
    starts = torch.arange(0, len(spans) * longest, longest, device=scores.device)
    return (found + starts[:, None]).flatten(1)


def preparing(stock: Callable[..., Any]) -> Callable[..., Any]:
    """``initialize_kv_cache`` of either model runner that gets ready to move tokens, or fails at start.

    It fails too where blocks are not as long as attested.
    """

    def initialize_kv_cache(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = stock(self, *args, **kwargs)
        here.require_attested_caches(self)
        moved_of(self).ask_layouts(self)
        return result

    return initialize_kv_cache


def moving(stock: Callable[..., Any]) -> Callable[..., Any]:
    """``GPUModelRunner._update_states`` of model runner V1 that makes the moves of a step first."""

    def _update_states(self: Any, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        moved_of(self).forget(scheduler_output.scheduled_cached_reqs.resumed_req_ids)
        _make(self, scheduler_output, _replace)
        return stock(self, scheduler_output, *args, **kwargs)

    return _update_states


def moving_v2(stock: Callable[..., Any]) -> Callable[..., Any]:
    """``GPUModelRunner.update_requests`` of model runner V2, likewise."""

    def update_requests(self: Any, scheduler_output: Any) -> Any:
        moved_of(self).forget(scheduler_output.preempted_req_ids or ())
        _make(self, scheduler_output, _replace_v2)
        return stock(self, scheduler_output)

    return update_requests


def _make(runner: Any, scheduler_output: Any, replace: Replace) -> None:
    moved, moves = moved_of(runner), getattr(scheduler_output, ATTRIBUTE, ())
    moved.forget(scheduler_output.finished_req_ids)
    if not moves:
        return
    begun = time.perf_counter()
    moved.make(runner, moves, replace)
    if SHARED in os.environ and get_tensor_model_parallel_rank() == 0:
        counters().moved(time.perf_counter() - begun)


def moved_of(runner: Any) -> Moved:
    """What a model runner knows of its moves."""
    found = getattr(runner, "_kvprofile_moved", None)
    if found is None:
        found = runner._kvprofile_moved = Moved()
    return found


def rows_of(runner: Any, request_ids: Sequence[str]) -> list[Mapping[float, int] | None]:
    """For each request of a batch, blocks kept by share; None for one that was not moved."""
    kept = moved_of(runner).kept
    return [kept.get(request_id) for request_id in request_ids]


def _replace(runner: Any, request_id: str, group: int, first: int, new: list[int]) -> None:
    """Let a request's row of model runner V1 name other blocks from block ``first`` on."""
    blocks = runner.requests[request_id].block_ids[group]
    blocks[first : first + len(new)] = new
    row = runner.input_batch.req_id_to_index.get(request_id)
    if row is not None:
        runner.input_batch.block_table[group].add_row(blocks, row)


def _replace_v2(runner: Any, request_id: str, group: int, first: int, new: list[int]) -> None:
    """The same on model runner V2, whose tables are written together later in the step."""
    row = runner.req_states.req_id_to_index[request_id]
    runner.block_tables.block_tables[group].stage_write(row, first, new)
