"""Graded heads in a real engine: greedy tokens are the simulation's, in float32, whatever the scheduler does."""

from __future__ import annotations

import random

import pytest

from kvprofile.budget import trim
from kvprofile.budget.trim import TrimRule
from kvprofile.evaluate.token_choice import ByProbe
from tests.vllm.engine import (
    SHARES,
    compare_all,
    draw,
    draw_batch,
    finite,
    make_subject,
    serve,
    write_graded,
)
from tests.vllm.runners import V1, V1_ASYNC, V2, V2_ASYNC, WHERE_TRITON_IS, on

pytest.importorskip("vllm")
pytestmark = pytest.mark.vllm

EVEN = [[1.0, 0.3, 0.3, 1.0], [0.6, 0.0, 0.0, 0.6], [0.6, 0.6, 0.6, 0.6], [0.3, 0.0, 0.0, 0.3]]
"""Shares that two ranks hold equally many of, in layers with and without full heads."""
RULE = TrimRule(16, 64, 32)


@pytest.fixture(scope="module")
def subject(tmp_path_factory):
    return make_subject(tmp_path_factory.mktemp("graded") / "tiny")


def served(subject, folder, batches, rule=RULE, shares=SHARES, settings=None, runner=V1, **options):
    """Outputs of an engine under ``shares``, and how the simulation chooses the tokens that stay."""
    choice = ByProbe(write_graded(folder / "b.json", subject, shares, rule))
    env = runner.environment(folder / "b.json", **(settings or {}))
    return serve(subject, batches, env, graded=True, **runner.arguments, **options), choice


@on(V1, V2, V1_ASYNC, V2_ASYNC)
def test_pressure_chunks_and_prefix_hits(subject, tmp_path, runner):
    """A pool for one and a half requests, prompts in chunks of at most 70 tokens, blocks poisoned when freed."""
    rng = random.Random("graded pressure")
    shared = draw(rng, 200)
    longest, model_len = (400, 768) if runner is V1 else (260, 576)
    batches = [draw_batch(rng, 24, longest, shared) for _ in range(runner.some(2))]
    turns = [draw(rng, 150)]
    for _ in range(3):  # a conversation that comes back with its own answer, here as any other tokens
        turns.append(turns[-1] + draw(rng, 70))
    batches += [[(turn, 40)] for turn in turns]
    blocks = 5 * model_len // 32 + 6  # of five groups
    pool = {"num_gpu_blocks_override": blocks, "max_model_len": model_len}
    pool |= {"max_num_batched_tokens": 70, "max_num_seqs": 12}
    found, choice = served(subject, tmp_path, batches, runner=runner, **pool)
    assert (found["v2"], found["async"]) == (runner.v2, runner.asynchronous)
    assert sum(batch["preemptions"] for batch in found["batches"]) > 0, found["groups"]
    hits = [hit for batch in found["batches"] for output in batch["outputs"] for hit in output["hits"]]
    assert sum(hit > 0 for hit in hits) > runner.some(10)
    assert found["batches"][-1]["outputs"][0]["hits"][0] > 250  # the prompt of the turn before, after its move
    assert found["free_blocks"] == found["blocks"] - 1  # all but the null block
    assert finite(found)
    count, ties = compare_all(subject, SHARES, RULE, batches, found, choice)
    assert count > runner.some(1000)
    print(f"{count} tokens equal the simulation's, {ties} of them near ties")


@pytest.mark.parametrize(
    ("rule", "prefix_caching", "runner"),
    [
        pytest.param(RULE, False, V1, id="32"),
        pytest.param(RULE, False, V2, id="32-v2", marks=[pytest.mark.slow, WHERE_TRITON_IS]),
        pytest.param(TrimRule(1, 33, 96), True, V1, id="odd-96", marks=pytest.mark.slow),
        pytest.param(TrimRule(0, 1, 64), True, V1, id="no-sinks-64", marks=pytest.mark.slow),
    ],
)
def test_requests_hold_what_their_shares_say(subject, tmp_path, rule, prefix_caching, runner):
    """Block by block in every step; the same tokens as the simulation's."""
    rng = random.Random(f"graded blocks:{rule}")
    batches = [draw_batch(rng, runner.some(8)), [(draw(rng, 500), 60)]]
    options = {"block_size": rule.block_tokens, "enable_prefix_caching": prefix_caching}
    found, choice = served(subject, tmp_path, batches, rule, runner=runner, every_step=True, **options)
    assert set(found["shares"]) == {None, 0.6, 0.3, 0.0}
    assert found["reclaimed"]["reported"] == found["reclaimed"]["counted"] > found["reclaimed"]["kept"] > 0
    for batch, results in zip(batches, found["batches"], strict=True):
        for (prompt, _), output in zip(batch, results["outputs"], strict=True):
            for (start_at, tokens), held in zip(output["chunks"][0], output["held"], strict=True):
                whole = -(-(start_at + tokens) // rule.block_tokens)
                middle = rule.middle_tokens(len(prompt), len(prompt)) if start_at >= len(prompt) else 0
                kept = [middle if share is None else rule.kept_tokens(share, len(prompt)) for share in found["shares"]]
                freed = [(middle - each) // rule.block_tokens if middle else 0 for each in kept]
                assert held == [whole - blocks for blocks in freed]
    assert finite(found)
    compare_all(subject, SHARES, rule, batches, found, choice)


@pytest.mark.parametrize(
    ("how", "runner"),
    [
        pytest.param("missing", V1, id="missing"),
        pytest.param("missing", V2, id="missing-v2", marks=[pytest.mark.slow, WHERE_TRITON_IS]),
        pytest.param("late", V1, id="late", marks=pytest.mark.slow),
        pytest.param("stale", V1, id="stale", marks=pytest.mark.slow),
    ],
)
def test_a_broken_move_shows(subject, tmp_path, how, runner):
    """Tokens that were not moved, or moved once their blocks were freed and filled; rows left as they were."""
    rng = random.Random("graded sabotage")
    batches = [[(draw(rng, 400), 12), (draw(rng, 300), 12)]]
    settings = {"SABOTAGE_MOVES": how}
    found, choice = served(subject, tmp_path, batches, settings=settings, runner=runner, enable_prefix_caching=False)
    if finite(found):
        with pytest.raises(AssertionError, match="below the best"):
            compare_all(subject, SHARES, RULE, batches, found, choice)


def test_two_ranks_move_their_own_heads(subject, tmp_path):
    batches = [draw_batch(random.Random("graded ranks"), 8)]
    settings = {"VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    found, choice = served(subject, tmp_path, batches, shares=EVEN, settings=settings, tensor_parallel_size=2)
    compare_all(subject, EVEN, RULE, batches, found, choice)


@pytest.mark.slow
def test_compiled_graphs(subject, tmp_path):
    batches = [draw_batch(random.Random("graded compiled"), 8)]
    settings = {"VLLM_CACHE_ROOT": str(tmp_path / "cache")}
    found, choice = served(subject, tmp_path, batches, settings=settings, enforce_eager=False)
    compare_all(subject, SHARES, RULE, batches, found, choice)


@on(V1, V2)
def test_requests_that_begin_alike_share_what_stays(subject, tmp_path, monkeypatch, runner):
    """Several questions at once on a document of four spans, which is held once; later one more.

    Of a span that ends where what is near begins, each has its own.
    """
    monkeypatch.setattr(trim, "SPAN_TOKENS", 64)
    rng = random.Random("graded sharing")
    document = draw(rng, RULE.sink_end + 4 * 64)
    batches = [[(document + draw(rng, 80), 40) for _ in range(6)], [(document + draw(rng, 120), 30)]]
    found, choice = served(subject, tmp_path, batches, settings={"SPAN_TOKENS": "64"}, runner=runner)
    shares = [share for share in found["shares"] if share is not None]
    taken = 0
    for batch in batches:
        for share in shares:
            spans = RULE.spans(share, len(batch[0][0]))
            each = [1 if blocks == RULE.span_blocks(share) else len(batch) for blocks, _ in spans]
            taken += sum(kept * times for (_, kept), times in zip(spans, each, strict=True))
    assert found["reclaimed"]["kept"] == taken > 0
    assert found["free_blocks"] == found["blocks"] - 1
    compare_all(subject, SHARES, RULE, batches, found, choice)
