"""vLLM's own schedulers on random schedules: no step reads a freed or foreign block, nothing trimmed is handed on.

The worker is imitated down to the slot: it keeps block tables as model runners do, remembers what was written into
every slot of the pool, makes the moves of graded heads there, and reads through the real TrimmedView.
"""

from __future__ import annotations

import os
import random
from collections import Counter, deque

import numpy as np
import pytest
import torch

from kvprofile.budget import trim
from kvprofile.budget.trim import ANCHORED, SLIDING, WINDOWS, TrimRule
from tests.helpers.models import POCKET

pytest.importorskip("vllm")

from vllm import SamplingParams
from vllm.config import KVEventsConfig
from vllm.distributed.kv_events import BlockStored
from vllm.engine.arg_utils import EngineArgs
from vllm.utils.hashing import sha256
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.core.kv_cache_utils import (
    get_block_hash,
    get_group_id,
    get_request_block_hasher,
    init_none_hash,
    maybe_convert_block_hash,
)
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus
from vllm.v1.structured_output import StructuredOutputManager

from kvprofile.runtime import moves, stats, stream_cache
from kvprofile.runtime.backend import Rows, TrimmedView, note_rows, once
from kvprofile.runtime.settings import SHARED

BLOCK, BLOCKS, ROWS, LONGEST = 8, 56, 8, 160
GROUPS = ("full", "stream", "stream")
GRADED = ("full", 0.6, 0.25, 0.0)
"""Groups of a graded budget, by the share that their heads keep."""


@pytest.fixture(scope="module")
def config():
    stats.share()
    stream_cache.register()
    init_none_hash(sha256)
    arguments = EngineArgs(
        model=str(POCKET), max_model_len=LONGEST, max_num_batched_tokens=48, max_num_seqs=ROWS, block_size=32
    )
    yield arguments.create_engine_config()
    del os.environ[SHARED]
    stats.counters.cache_clear()


def blocks_of(groups):
    """Blocks of a pool that holds the longest request and little more."""
    return BLOCKS + 20 * (len(groups) - len(GROUPS))


def make_scheduler(kind, config, rule, caching, groups=GROUPS):
    shape = {"block_size": BLOCK, "num_kv_heads": 1, "head_size": 32, "dtype": torch.float32}
    trim = {"sink_tokens": rule.sink_tokens, "recent_tokens": rule.recent_tokens, "window": rule.window}
    specs = {"full": FullAttentionSpec(**shape), "stream": stream_cache.StreamSpec(**shape, **trim)}
    specs |= {share: stream_cache.StreamSpec(**shape, **trim, share=share) for share in GRADED[1:]}
    groups = [KVCacheGroupSpec([f"layer.{i}"], specs[name]) for i, name in enumerate(groups)]
    blocks = blocks_of(groups)
    pool = KVCacheConfig(num_blocks=blocks, kv_cache_tensors=[], kv_cache_groups=groups)
    config.cache_config.num_gpu_blocks = blocks
    config.cache_config.enable_prefix_caching = caching
    manager = StructuredOutputManager(config)
    return kind(config, pool, manager, block_size=BLOCK, hash_block_size=BLOCK, log_stats=True)


def generated(name, position):
    return random.Random(f"{name}:{position}").randrange(1000)


class Worker:
    """Block tables, the pool's contents, and checks on every read."""

    def __init__(self, rule, v2, groups=GROUPS):
        self.rule, self.v2, self.groups = rule, v2, groups
        self.tables, self.tokens, self.prompt, self.prefill_end = {}, {}, {}, {}
        self.pool = {}
        shares = [None if name in GROUPS else name for name in groups]
        self.views = [TrimmedView(rule, 2 * ROWS, torch.device("cpu"), share) for share in shares]
        self.kept = {}
        self.trimmed_rows = self.moved = self.shared = self.unmade = 0

    def make(self, move):
        """Move tokens of a request together, in every group others of them, of a span those that its beginning says."""
        name = move.request_id
        self.kept[name] = {}
        for group, found in move.groups.items():
            share, table = self.groups[group], self.tables[name][group]
            targets = iter(found.targets)
            assert sum(blocks for blocks, _ in found.spans) == len(found.sources)
            assert sum(kept for _, kept in found.spans) == len(found.targets)
            at, written = 0, {}
            for blocks, kept in found.spans:
                sources = found.sources[at : at + blocks]
                at += blocks
                held = [self.pool[block, place] for block in sources for place in range(BLOCK)]
                taken = [next(targets) for _ in range(kept)]
                for number, place in enumerate(self.stays(held[-1], len(held), kept * BLOCK)):
                    written[taken[number // BLOCK], number % BLOCK] = held[place]
            self.pool |= written  # sources and targets may overlap
            if found.row is None:  # preempted since; others may share what was moved
                self.kept.pop(name, None)
                self.unmade += 1
                continue
            spans = self.rule.spans(share, self.prompt[name])
            assert found.first == self.rule.sink_blocks
            near = self.rule.near_blocks(share, self.prompt[name])
            assert len(found.row) == sum(blocks for blocks, _ in spans) + near
            assert found.kept == sum(kept for _, kept in spans) + near
            assert found.kept * BLOCK == self.rule.kept_tokens(share, self.prompt[name])
            table[found.first : found.first + len(found.row)] = found.row
            positions, start = [], self.rule.sink_end
            for blocks, kept in spans:
                end = self.identity(name, start + blocks * BLOCK - 1)
                places = self.stays((group, end, True), blocks * BLOCK, kept * BLOCK)
                positions += [start + place for place in places]
                start += blocks * BLOCK
            self.kept[name][share] = positions + list(range(start, start + near * BLOCK))
            self.moved += len(found.targets)
            self.shared += found.kept - near - len(found.targets)

    def stays(self, last, count, kept):
        """Places of a span that stay, by what its last slot holds: the same for all requests that begin so."""
        return sorted(random.Random(repr(last)).sample(range(count), kept))

    def run(self, output, requests):
        for move in getattr(output, moves.ATTRIBUTE, ()):
            self.make(move)
        for new in output.scheduled_new_reqs:
            self.admit(requests[new.req_id], new.block_ids)
        cached = output.scheduled_cached_reqs
        for name, blocks in zip(cached.req_ids, cached.new_block_ids, strict=True):
            if name in cached.resumed_req_ids:
                self.admit(requests[name], blocks)
            elif blocks is not None:
                for table, more in zip(self.tables[name], blocks, strict=True):
                    table.extend(more)
        starts = dict(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
        starts |= {new.req_id: new.num_computed_tokens for new in output.scheduled_new_reqs}
        rows = [(name, starts[name], count) for name, count in output.num_scheduled_tokens.items()]
        skips = self.skipped(rows)
        for name, start, count in rows:
            self.write(name, start, count, skips[name])
        for group in range(len(self.groups)):
            self.read(group, rows, skips)
        return self.sample(rows)

    def admit(self, request, blocks):
        name = request.request_id
        self.kept.pop(name, None)
        self.tables[name] = [list(group) for group in blocks]
        self.tokens[name] = list(request.all_token_ids)
        self.prompt[name], self.prefill_end[name] = request.num_prompt_tokens, request.num_tokens

    def flagged(self, name, start):
        return start < (self.prefill_end[name] if self.v2 else self.prompt[name])

    def skipped(self, rows):
        """Blocks that the rule leaves out of each row, said in plain Python."""
        found = {}
        for name, start, count in rows:
            decodes = count == 1 and not self.flagged(name, start)
            if self.groups is GRADED:
                decodes = start >= self.prefill_end[name]
            first_recent = self.rule.first_recent_block(start, self.prompt[name])
            found[name] = first_recent - self.rule.sink_blocks if decodes else 0
        return found

    def identity(self, name, position):
        """What a slot holds: the hash of a prefix, which is what prefix caching goes by."""
        return hash(tuple(self.tokens[name][: position + 1]))

    def write(self, name, start, count, skipped):
        for position in range(start, start + count):
            for group, table in enumerate(self.tables[name]):
                slot = (table[position // BLOCK], position % BLOCK)
                assert slot[0] != 0, "a row writes into the null block"
                self.pool[slot] = (group, self.identity(name, position), not skipped)

    def read(self, group, rows, skips):
        share, stream = self.groups[group], self.groups[group] != "full"
        table, lengths = self.raw(group, rows)
        if stream:
            seen = self.views[group].of(self.metadata(rows, table, lengths))
            table, lengths = seen.block_table_tensor, seen.seq_lens
        for row, (name, start, count) in enumerate(rows):
            last = start + count - 1
            trimmed = stream and skips[name] > 0
            assert share in GROUPS or (name in self.kept) == trimmed or not skips[name]
            kept = self.kept.get(name, {}).get(share, ()) if trimmed else ()
            positions = [
                k for k in range(last + 1) if not trimmed or k in kept or self.rule.sees(last, k, self.prompt[name])
            ]
            self.trimmed_rows += trimmed
            assert int(lengths[row]) == len(positions)
            for place, position in enumerate(positions):
                block = int(table[row, place // BLOCK])
                where, what, whole = self.pool.get((block, place % BLOCK), (None, None, None))
                assert (where, what) == (group, self.identity(name, position)), f"{name} reads a foreign slot"
                assert whole or position >= self.prompt[name], "part of a prompt was computed on a trimmed cache"

    def raw(self, group, rows):
        table = torch.zeros(ROWS + 3, LONGEST // BLOCK, dtype=torch.int32)
        lengths = torch.zeros(ROWS + 3, dtype=torch.int32)
        for row, (name, start, count) in enumerate(rows):
            blocks = self.tables[name][group]
            table[row, : len(blocks)] = torch.tensor(blocks, dtype=torch.int32)
            lengths[row] = start + count
        return table, lengths

    def metadata(self, rows, table, lengths):
        """As the runners give it: V2 pads the batch for CUDA graphs and leaves the flags unpadded."""
        padded = len(rows) + (3 if self.v2 else 0)
        counts = torch.tensor([0, *(count for _, _, count in rows), *([0] * (padded - len(rows)))])
        starts = counts.cumsum(0).to(torch.int32)
        flags = torch.tensor([self.flagged(name, start) for name, start, _ in rows], dtype=torch.bool)
        prompts = [self.prompt[name] for name, _, _ in rows]
        kept = [self.kept.get(name) for name, _, _ in rows]
        blocks = [each and {share: len(held) // BLOCK for share, held in each.items()} for each in kept]
        note_rows(Rows(np.array(prompts if self.v2 else [*prompts, *[999] * ROWS], dtype=np.int32), blocks))
        return CommonAttentionMetadata(
            query_start_loc=starts,
            query_start_loc_cpu=starts,
            seq_lens=lengths[:padded],
            seq_lens_cpu_upper_bound=lengths[:padded].clone(),
            num_reqs=padded,
            num_actual_tokens=int(starts[-1]),
            max_query_len=int(counts.max()),
            max_seq_len=LONGEST,
            block_table_tensor=table[:padded],
            slot_mapping=torch.empty(0),
            is_prefilling=flags,
        )

    def sample(self, rows):
        sampled = []
        for name, start, count in rows:
            done = start + count == len(self.tokens[name])
            sampled.append([generated(name, start + count)] if done else [])
            self.tokens[name] += sampled[-1]
        names = [name for name, _, _ in rows]
        return ModelRunnerOutput(names, {name: i for i, name in enumerate(names)}, sampled)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("v2", [False, True], ids=["v1", "v2"])
@pytest.mark.parametrize("kind", [Scheduler, AsyncScheduler])
@pytest.mark.parametrize("window", [*WINDOWS, "graded"])
def test_no_step_reads_a_freed_or_foreign_block(config, window, kind, v2, seed, monkeypatch):
    """Rows of graded heads, whose window is anchored, are trimmed from their first step after prefill on.

    Their spans are short here, so that prompts have several, and requests share what stays of what they share.
    """
    groups, window = (GRADED, ANCHORED) if window == "graded" else (GROUPS, window)
    monkeypatch.setattr(trim, "SPAN_TOKENS", 2 * BLOCK)
    rng = random.Random(f"{kind.__name__}:{v2}:{seed}")
    rule = TrimRule(rng.choice((0, 5, 16)), rng.choice((1, 9, 24, 60 if window == SLIDING else 33)), BLOCK, window)
    caching = rng.random() < 0.7
    scheduler = make_scheduler(kind, config, rule, caching, groups)
    schedule = moves.carrying(kind.schedule)
    hasher = get_request_block_hasher(BLOCK, sha256)
    worker, in_flight = Worker(rule, v2, groups), deque()
    shared = [rng.randrange(1000) for _ in range(100)]
    reclaimed = stats.read()["kv_blocks_reclaimed_total"]
    preemptions = finished = 0
    for step in range(500):
        while step < 200 and len(scheduler.requests) < 7 and rng.random() < 0.5:
            begin = rng.choice((0, 8, 16, 35)) if groups is GROUPS else rng.choice((0, 16, 50, 80))
            prompt = shared[:begin] + [rng.randrange(1000) for _ in range(rng.randrange(1, 95 - begin))]
            options = SamplingParams(max_tokens=rng.choice((1, 5, 40, 50)), ignore_eos=True)
            scheduler.add_request(Request(f"{seed}-{step}-{rng.random()}", prompt, options, None, block_hasher=hasher))
        if scheduler.requests and rng.random() < 0.01:
            scheduler.finish_requests(rng.choice(list(scheduler.requests)), RequestStatus.FINISHED_ABORTED)
        output = schedule(scheduler)
        preemptions += len(output.preempted_req_ids or ())
        finished += len(output.finished_req_ids)
        in_flight.append((output, worker.run(output, scheduler.requests)))
        if kind is Scheduler or len(in_flight) == 2:
            scheduler.update_from_output(*in_flight.popleft())
        if step > 200 and not scheduler.requests:
            break
    while in_flight:
        scheduler.update_from_output(*in_flight.popleft())
    assert not scheduler.requests
    assert scheduler.kv_cache_manager.block_pool.get_num_free_blocks() == blocks_of(groups) - 1
    managers = scheduler.kv_cache_manager.coordinator.single_type_managers
    for manager in managers[1:]:
        noted = (manager._prefill_end, manager._lives, manager._prompt_tokens, manager._due, manager._moves)
        noted += (manager._moved, manager._holds)
        assert not any(noted)
    assert stats.read()["kv_blocks_reclaimed_total"] > reclaimed
    assert preemptions > 0
    assert finished > 5
    assert worker.trimmed_rows > 50
    assert (worker.moved > 10) == (groups is GRADED)
    assert (worker.shared > 0) == (groups is GRADED and caching)


class Subscriber:
    """Counts what KV events say is cached: (group, hash of a prefix) of every block."""

    def __init__(self):
        self.cached, self.kinds = Counter(), set()

    def publish(self, batch):
        for event in batch.events:
            change = 1 if isinstance(event, BlockStored) else -1
            for block in event.block_hashes:
                self.cached[event.group_idx, block] += change
            if isinstance(event, BlockStored):
                self.kinds.add((GROUPS[event.group_idx], event.kv_cache_spec_kind))
                assert len(event.token_ids) == len(event.block_hashes) * BLOCK, "an event leaves out tokens or blocks"


def test_kv_events_say_what_the_pool_has_cached(config, monkeypatch):
    """A router may rely on ``--kv-events-config``: through trims and preemptions no event is missing or wrong."""
    monkeypatch.setattr(config, "kv_events_config", KVEventsConfig(enable_kv_cache_events=True, publisher="null"))
    rng = random.Random("events")
    scheduler = make_scheduler(Scheduler, config, TrimRule(5, 9, BLOCK), caching=True)
    scheduler.kv_event_publisher = subscriber = Subscriber()
    hasher = get_request_block_hasher(BLOCK, sha256)
    worker, pool = Worker(TrimRule(5, 9, BLOCK), v2=True), scheduler.kv_cache_manager.block_pool
    shared = [rng.randrange(1000) for _ in range(100)]
    reclaimed = stats.read()["kv_blocks_reclaimed_total"]
    for step in range(400):
        while step < 150 and len(scheduler.requests) < 7 and rng.random() < 0.5:
            prompt = shared[: rng.choice((0, 8, 16, 35))] + [rng.randrange(1000) for _ in range(rng.randrange(1, 60))]
            options = SamplingParams(max_tokens=rng.choice((1, 5, 40)), ignore_eos=True)
            scheduler.add_request(Request(f"events-{step}-{rng.random()}", prompt, options, None, block_hasher=hasher))
        output = scheduler.schedule()
        scheduler.update_from_output(output, worker.run(output, scheduler.requests))
        held = Counter(
            (get_group_id(block.block_hash), maybe_convert_block_hash(get_block_hash(block.block_hash)))
            for block in pool.blocks
            if block.block_hash is not None
        )
        assert +subscriber.cached == held
    assert stats.read()["kv_blocks_reclaimed_total"] > reclaimed
    assert subscriber.kinds == {("full", "full_attention"), ("stream", "unknown")}
    assert len(subscriber.cached) > len(+subscriber.cached) > 0, "nothing was ever removed, or nothing is left"


def test_no_host_synchronisation_and_buffers_stay(config):
    """The view's results live where CUDA graphs captured them, whatever the batch."""
    del config
    view = TrimmedView(TrimRule(16, 24, BLOCK), ROWS, torch.device("cpu"))
    worker = Worker(TrimRule(16, 24, BLOCK), v2=True)
    for name, length in (("a", 100), ("b", 30)):
        worker.tables[name] = [list(range(1, 20))] * 3
        worker.prompt[name] = worker.prefill_end[name] = length
        worker.tokens[name] = [0] * (length + 1)
    places = set()
    for rows in ([("a", 100, 1), ("b", 30, 1)], [("a", 101, 1)], [("a", 10, 20)]):
        seen = view.of(worker.metadata(rows, *worker.raw(1, rows)))
        trimmed = rows[0][2] == 1  # otherwise the bound is as it came: that of a graph that is captured holds for all
        assert seen.max_seq_len == (int(seen.seq_lens_cpu_upper_bound.max()) if trimmed else LONGEST)
        assert int(seen.seq_lens_cpu_upper_bound.max()) == int(seen.seq_lens.max()) < LONGEST
        places.add((seen.block_table_tensor.data_ptr(), seen.seq_lens.data_ptr()))
    assert len(places) == 1


def test_builders_of_one_group_share_a_view(config):
    """The second is given what the first made; another rule, another share or another batch is worked out anew."""
    del config
    worker = Worker(TrimRule(16, 24, BLOCK), v2=True)
    worker.tables["a"], worker.prompt["a"], worker.prefill_end["a"] = [list(range(1, 20))] * 3, 100, 100
    rules = (TrimRule(16, 24, BLOCK), None), (TrimRule(16, 24, BLOCK), 0.5), (TrimRule(16, 32, BLOCK), None)
    views = [[TrimmedView(rule, ROWS, torch.device("cpu"), share) for _ in range(2)] for rule, share in rules]
    batch, another = (worker.metadata(rows, *worker.raw(1, rows)) for rows in ([("a", 100, 1)], [("a", 101, 1)]))
    seen = []
    for metadata in (batch, another):
        for first, second in views:
            seen.append(once(first, metadata))
            assert once(second, metadata) is seen[-1]
    assert len({id(each) for each in seen}) == 6
