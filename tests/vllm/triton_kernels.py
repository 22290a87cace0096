"""TRITON_ATTN's metadata builder, attention kernels and cache write, in Triton's interpreter: a program of its own.

`python -m tests.vllm.triton_kernels CASES [stale]`. Every case draws a pool of one width for a group of full parts and
one of trimmed parts of a layer, rows that decode, prefill and pad, and fills what no row may read with NaN. Its last
line is JSON: cases, the worst difference to plain attention, and blocks that were filled. ``stale`` leaves lengths and
block tables as they are, which must show.
"""

from __future__ import annotations

import json
import random
import sys
from dataclasses import dataclass
from types import SimpleNamespace

from tests.vllm import interpreter

HEAD_SIZE, GROUP, BLOCKS = 32, 2, 96
LENGTHS = (1, 16, 17, 48, 65, 100, 129, 160, 175)


@dataclass(frozen=True)
class Row:
    """Tokens of a request so far, how many of them are new, and whether it still prefills."""

    length: int
    queries: int
    prefills: bool

    @property
    def trimmed(self):
        return self.queries == 1 and not self.prefills


def draw_rows(rng):
    """Rows that decode, then those that prefill, as runners put them in order."""
    rows = []
    for _ in range(rng.randrange(2, 5)):
        kind = rng.choice(("decodes", "decodes", "decodes", "prefills", "one token"))
        length = rng.choice(LENGTHS)
        rows.append(Row(length, rng.randrange(1, min(length, 20) + 1) if kind == "prefills" else 1, kind != "decodes"))
    return sorted(rows, key=lambda row: row.queries > 1)


class Pool:
    """One buffer of blocks of one width, all NaN, which two cache groups share."""

    def __init__(self, rng, width):
        self.width = width
        self.buffer = torch.full((width * BLOCKS // 4,), float("nan")).view(torch.int8)
        self.free = rng.sample(range(1, BLOCKS), BLOCKS - 1)

    def caches(self, spec, layers):
        """The caches of a group's layers."""
        where = KVCacheTensor(
            size=self.buffer.numel(), layers=[str(n) for n in range(layers)], layer_stride=spec.page_size_bytes,
            block_stride=self.width, offset=0,
        )  # fmt: skip
        return create_kv_cache_views(self.buffer, spec, BLOCKS, LAYOUT, where)


def builder_of(backend, spec, heads, three_dimensional):
    """The backend's metadata builder for a group whose parts have so many query heads."""
    triton_attn.get_num_attention_heads_from_layers = lambda *_: heads
    config = SimpleNamespace(
        model_config=SimpleNamespace(
            get_num_attention_heads=lambda _: heads, get_num_kv_heads=lambda _: heads // GROUP,
            get_head_size=lambda: HEAD_SIZE, rswa_window=None,
        ),
        parallel_config=None,
        compilation_config=SimpleNamespace(cudagraph_mode=None, cudagraph_capture_sizes=None),
        scheduler_config=SimpleNamespace(max_num_seqs=16),
    )  # fmt: skip
    made = backend.get_builder_cls()(spec, ["layer"], config, torch.device("cpu"))
    if not three_dimensional:
        made.seq_threshold_3D = 0
    return made


def check(rng, spec, layers, pool, rows, backend):
    """The worst difference of one layer's outputs to plain attention, and the blocks of it that were made NaN."""
    heads, size, trim = spec.num_kv_heads, spec.block_size, getattr(spec, "trim", None)
    cache = pool.caches(spec, layers)[layers - 1]
    impl = triton_attn.TritonAttentionImpl(
        num_heads=heads * GROUP, head_size=HEAD_SIZE, scale=HEAD_SIZE**-0.5, num_kv_heads=heads, alibi_slopes=None,
        sliding_window=None, kv_cache_dtype="auto",
    )  # fmt: skip
    layer = SimpleNamespace(**{f"_{name}_scale": torch.ones(1) for name in "kvq"})
    padding = rng.choice((0, 2))
    table = torch.zeros(len(rows) + padding, max(-(-row.length // size) for row in rows) + 2, dtype=torch.int32)
    keys, values, seen, prompts, kept, filled = [], [], [], [], [], 0
    for number, row in enumerate(rows):
        count = -(-row.length // size)
        blocks = [pool.free.pop() for _ in range(count)]
        cache[blocks] = 0.0
        slots = torch.tensor([blocks[place // size] * size + place % size for place in range(row.length)])
        # written from strided keys, as slices of a projection are
        wide = torch.randn(2, row.length, heads + 2, HEAD_SIZE)
        mine = wide[:, :, 1:-1]
        impl.do_kv_cache_update(layer, *mine, cache, slots)
        keys.append(mine[0])
        values.append(mine[1])
        # the prompt ended some tokens ago; a trimmed row keeps some blocks between sinks and window
        prompts.append(max(1, row.length - rng.randrange(1, 40)) if row.trimmed else row.length)
        visible = list(range(row.length))
        if trim is not None and row.trimmed:
            first, stop = trim.sink_blocks, trim.first_recent_block(row.length - 1, prompts[-1])
            stay = rng.randrange(0, max(0, stop - first) + 1) if spec.share is not None else 0
            if stop > first:
                middle = blocks[first:stop]
                order = [*rng.sample(middle, stay), *[0] * (len(middle) - stay)]
                gone = [block for block in middle if block not in order]
                cache[gone] = float("nan")
                filled += len(gone)
                places = [blocks.index(block) for block in order[:stay]]
                blocks[first:stop] = order
                visible = [
                    *range(first * size),
                    *(place * size + each for place in places for each in range(size)),
                    *range(stop * size, row.length),
                ]
            kept.append({spec.share: stay})
        else:
            kept.append(None)
        seen.append(visible)
        table[number, :count] = torch.tensor(blocks, dtype=torch.int32)
    queries = [row.queries for row in rows]
    starts = torch.tensor([0, *queries, *[0] * padding]).cumsum(0).to(torch.int32)
    lengths = torch.tensor([*(row.length for row in rows), *[0] * padding], dtype=torch.int32)
    note_rows(Rows(np.array(prompts, np.int32), kept))
    metadata = CommonAttentionMetadata(
        query_start_loc=starts, query_start_loc_cpu=starts.clone(), seq_lens=lengths, num_reqs=len(lengths),
        num_actual_tokens=sum(queries), max_query_len=max(queries), max_seq_len=int(lengths.max()),
        block_table_tensor=table, slot_mapping=torch.zeros(sum(queries), dtype=torch.int64),
        is_prefilling=torch.tensor([row.prefills for row in rows]), seq_lens_cpu_upper_bound=lengths.clone(),
    )  # fmt: skip
    built = builder_of(backend, spec, heads * GROUP, rng.random() < 0.5).build(0, metadata)
    query = torch.randn(sum(queries), heads * GROUP + 3, HEAD_SIZE)[:, 2:-1]
    output = torch.full((sum(queries), heads * GROUP, HEAD_SIZE), 7.0)
    impl.forward(layer, query, None, None, cache, built, output)
    worst, token = 0.0, 0
    for row, key, value, visible in zip(rows, keys, values, seen, strict=True):
        for position in range(row.length - row.queries, row.length):
            places = [place for place in visible if place <= position]
            k, v = (tensor[places].repeat_interleave(GROUP, 1) for tensor in (key, value))
            weights = (torch.einsum("hd,nhd->hn", query[token], k) * HEAD_SIZE**-0.5).softmax(-1)
            difference = (output[token] - torch.einsum("hn,nhd->hd", weights, v)).abs().max()
            worst = max(worst, float(torch.nan_to_num(difference, nan=torch.inf)))
            token += 1
    return worst, filled


def case(seed):
    """Full parts and trimmed parts of some layers, in one pool."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    size = rng.choice((16, 32, 48))
    shape = {"block_size": size, "head_size": HEAD_SIZE, "dtype": torch.float32}
    full = FullAttentionSpec(num_kv_heads=rng.choice((1, 2, 3)), **shape)
    stream = StreamSpec(
        num_kv_heads=rng.choice((1, 3)), sink_tokens=rng.choice((0, 1, 16, 20)), share=rng.choice((None, 0.3)),
        recent_tokens=rng.choice((1, 16, 33)), **shape,
    )  # fmt: skip
    pool = Pool(rng, max(2 * full.page_size_bytes, 3 * stream.page_size_bytes))
    budgeted = with_layout(triton_attn.TritonAttentionBackend)
    found = [
        check(rng, spec, layers, pool, draw_rows(rng), backend)
        for spec, layers, backend in ((full, 2, budgeted), (stream, 3, with_trimming(budgeted)))
    ]
    return max(worst for worst, _ in found), sum(filled for _, filled in found)


def main():
    if sys.argv[2:] == ["stale"]:
        TrimmedView.of = lambda _, metadata: metadata
    found = [case(seed) for seed in range(int(sys.argv[1]))]
    worst, filled = max(worst for worst, _ in found), sum(filled for _, filled in found)
    print(json.dumps({"cases": len(found), "worst": worst, "filled": filled}))


if __name__ == "__main__":
    interpreter.enable()
    import numpy as np
    import torch
    import vllm.v1.worker.cpu.shm  # noqa: F401 - as the CPU worker does
    from vllm.v1.attention.backend import CommonAttentionMetadata
    from vllm.v1.attention.backends import triton_attn
    from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheTensor, create_kv_cache_views

    from kvprofile.runtime.backend import LAYOUT, Rows, TrimmedView, note_rows, with_layout, with_trimming
    from kvprofile.runtime.stream_cache import StreamSpec

    torch.cuda.get_device_capability = lambda *_: (9, 0)  # the cache write asks
    main()
