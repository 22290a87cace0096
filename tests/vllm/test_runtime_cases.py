"""Random cases on the real engine, each compared token by token with the simulation.

Drawn for every engine: architecture, which heads are full, sinks, window, block size, chunk size, pool, prefix caching,
how many requests run at once; for every request: prompt, shared beginnings, output. Pools are so small that requests
are preempted, and freed blocks are poisoned.
"""

from __future__ import annotations

import math
import random

import pytest

from kvprofile.budget import trim
from kvprofile.budget.float8 import of_cache
from kvprofile.budget.trim import ANCHORED, WINDOWS, TrimRule
from kvprofile.evaluate.token_choice import ByProbe
from kvprofile.runtime.packing import Piece, pack
from tests.vllm.engine import compare_all, environment, job, make_subject, serve_all, write_budget, write_graded

pytest.importorskip("vllm")
pytestmark = pytest.mark.vllm

FAMILIES = ("llama", "qwen2", "qwen3", "phi3", "mistral")
RETENTIONS = (0.9, 0.7, 0.5, 0.3, 0.1)
LONGEST = 512


def draw_heads(rng, retention, layers=4, kv_heads=4):
    """Full heads spread at random, so that some layers have none or nothing else."""
    count = max(1, round(retention * layers * kv_heads))
    full = set(rng.sample(range(layers * kv_heads), count))
    return [[float(layer * kv_heads + head in full) for head in range(kv_heads)] for layer in range(layers)]


def draw_shares(rng, layers=4, kv_heads=4):
    """Shares of at most four sizes, so that layers have up to four parts."""
    sizes = [rng.choice((1.0, 0.9)), *rng.sample((0.1, 0.25, 0.4, 0.6, 0.75), 2), rng.choice((0.0, 0.05))]
    return [[rng.choice(sizes) for _ in range(kv_heads)] for _ in range(layers)]


def groups_of(heads, rule):
    """Cache groups that the runtime will make of the heads."""
    pieces = []
    whole = -(-LONGEST // rule.block_tokens)
    for layer, row in enumerate(heads):
        for share in set(row):
            held = -(-rule.held_tokens(LONGEST, LONGEST, share) // rule.block_tokens)
            pieces.append(Piece(f"{layer}:{share}", f"{share}", row.count(share), held, whole))
    return len(pack(pieces).groups)


def draw_engine(seed, folder, requests, graded=False, cache="auto"):
    """A job and what its outputs are compared with."""
    rng = random.Random(f"cases:{seed}{':graded' if graded else ''}")
    family = FAMILIES[seed % len(FAMILIES)]
    subject = make_subject(folder / f"{family}-{seed}", family, hidden_size=256)
    heads = draw_shares(rng) if graded else draw_heads(rng, RETENTIONS[seed % len(RETENTIONS)])
    sizes = rng.choice((0, 1, 16, 40)), rng.choice((1, 33, 64, 100)), rng.choice((32, 32, 64, 96))
    rule = TrimRule(*sizes, ANCHORED if graded else WINDOWS[seed % 2])
    request_blocks = groups_of(heads, rule) * -(-LONGEST // rule.block_tokens)
    shared = [rng.randrange(4, 1000) for _ in range(200)]

    def draw():
        begin = shared[: rng.choice((0, 0, 32, 96, 100, 192))]
        prompt = begin + [rng.randrange(4, 1000) for _ in range(rng.choice((1, 3, 31, 32, 33, 65, 100, 180, 300)))]
        return prompt[: LONGEST - 110], rng.choice((1, 2, 5, 40, 64, 100))

    batches = [[draw() for _ in range(requests // 3)] for _ in range(3)]
    budget, choice = folder / f"{seed}.json", None
    if graded:
        choice = ByProbe(write_graded(budget, subject, heads, rule, seed))
    else:
        write_budget(budget, subject, heads, rule)
    made = job(
        subject,
        batches,
        budget,
        reload_before=rng.choice((None, 1)),
        window=rule.window,
        graded=graded,
        max_model_len=LONGEST,
        block_size=rule.block_tokens,
        num_gpu_blocks_override=int(request_blocks * rng.uniform(1.02, 1.25)) + 2,
        max_num_batched_tokens=rng.choice((33, 64, 150, 600)),
        max_num_seqs=rng.choice((6, 12)),
        enable_prefix_caching=seed % 3 > 0,
        kv_cache_dtype=cache,
    )
    return made, (subject, heads, rule, batches), choice


def run(seeds, folder, requests, graded=False, cache="auto", **settings):
    """All engines in one process. Gives counts of what happened."""
    drawn = [draw_engine(seed, folder, requests, graded, cache) for seed in seeds]
    env = environment(folder / f"{seeds[0]}.json", LLM_KVZIP_POISON="1", **settings)
    results, log = serve_all([made for made, *_ in drawn], env)
    seen = {"cases": 0, "tokens": 0, "near ties": 0, "preemptions": 0, "prefix hits": 0, "chunked": 0}
    for (_, expected, choice), found in zip(drawn, results, strict=True):
        outputs = [output for batch in found["batches"] for output in batch["outputs"]]
        assert all(math.isfinite(value) for output in outputs for value in output["logprobs"])
        assert found["free_blocks"] == found["blocks"] - 1  # all but the null block
        tokens, ties = compare_all(*expected, found, choice, of_cache(cache, "cpu"))
        seen["cases"] += len(outputs)
        seen["tokens"] += tokens
        seen["near ties"] += ties
        seen["preemptions"] += sum(batch["preemptions"] for batch in found["batches"])
        seen["prefix hits"] += sum(hit > 0 for output in outputs for hit in output["hits"])
        seen["chunked"] += sum(sum(n > 1 for _, n in life) > 1 for output in outputs for life in output["chunks"])
    print(", ".join(f"{count} {name}" for name, count in seen.items()))
    return seen, log


def test_two_hundred_random_cases(tmp_path):
    seen, log = run(range(6), tmp_path, requests=36)
    assert seen["cases"] >= 200
    assert min(seen["preemptions"], seen["prefix hits"], seen["chunked"]) > 10
    assert " load in order" in log


@pytest.fixture
def short_spans(monkeypatch):
    """Spans so short that prompts have several, and requests share what stays of those they have in common."""
    monkeypatch.setattr(trim, "SPAN_TOKENS", 64)
    return {"SPAN_TOKENS": "64"}


def test_random_cases_of_graded_heads(tmp_path, short_spans):
    seen, _ = run((1,), tmp_path, requests=36, graded=True, **short_spans)
    assert seen["cases"] == 36
    assert min(seen["preemptions"], seen["prefix hits"], seen["chunked"]) > 3


@pytest.mark.parametrize(("cache", "graded"), [("fp8_e4m3", False), ("fp8", True)])
def test_random_cases_in_caches_of_8_bit_floats(tmp_path, short_spans, cache, graded):
    seen, _ = run((1,), tmp_path, requests=36, graded=graded, cache=cache, **short_spans)
    assert seen["cases"] == 36
    assert seen["near ties"] < 0.02 * seen["tokens"]
    assert min(seen["preemptions"], seen["prefix hits"]) > 0


@pytest.mark.slow
@pytest.mark.parametrize("cache", ["fp8_e4m3", "fp8_e5m2"])
@pytest.mark.parametrize("graded", [False, True])
def test_hundreds_of_cases_more_in_caches_of_8_bit_floats(tmp_path, short_spans, cache, graded):
    seen, _ = run(range(2, 8), tmp_path, requests=36, graded=graded, cache=cache, **short_spans)
    assert seen["cases"] >= 200
    assert seen["near ties"] < 0.02 * seen["tokens"]
    assert min(seen["preemptions"], seen["prefix hits"], seen["chunked"]) > 10


@pytest.mark.slow
def test_hundreds_of_graded_cases_more(tmp_path, short_spans):
    seen, _ = run((0, *range(2, 8)), tmp_path, requests=36, graded=True, **short_spans)
    assert seen["cases"] >= 200
    assert min(seen["preemptions"], seen["prefix hits"], seen["chunked"]) > 10


def test_heads_that_cannot_be_ordered_are_gathered(tmp_path):
    seen, log = run((6,), tmp_path, requests=24, GATHER_HEADS="1")
    assert seen["tokens"] > 100
    assert "heads of 0 layers load in order" in log


@pytest.mark.slow
def test_hundreds_of_requests_more(tmp_path):
    """Also the proof under poison: no NaN and the simulation's tokens from hundreds of requests in small pools."""
    for first in (10, 20):
        seen, _ = run(range(first, first + 5), tmp_path, requests=90)
        assert seen["cases"] == 450
        assert seen["preemptions"] > 20
