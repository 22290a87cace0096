"""Whole engines on what GPUs take, interpreted: model runner V2, TRITON_ATTN's kernels, full graphs where rows decode.

The model is tiny and tokens are few, because every program of every kernel runs in Python.
"""

from __future__ import annotations

import random

import pytest

from kvprofile.budget.trim import TrimRule
from kvprofile.evaluate.token_choice import ByProbe
from tests.vllm import graphs
from tests.vllm.engine import CLOSE, compare_all, draw, finite, make_subject, serve, write_budget, write_graded
from tests.vllm.runners import ASKED, V2, V2_ASYNC, WHERE_TRITON_IS

pytest.importorskip("vllm")
pytestmark = [pytest.mark.vllm, pytest.mark.slow, WHERE_TRITON_IS]

RULE = TrimRule(1, 33, 16)
HEADS = {
    "whole": [[1.0, 0.0, 0.0, 0.0], [0.0, 1.0, 1.0, 0.0]],
    "graded": [[1.0, 0.3, 0.0, 0.3], [0.3, 0.3, 0.6, 0.0]],
}
KINDS = pytest.mark.parametrize("kind", HEADS)
REQUESTS = ((70, 10), (97, 12), (129, 6), (40, 11))
"""Tokens of prompt and output: of every number of rows from four to one, some steps only decode."""

OTHER = "below the best|log-probability"
"""What a comparison says of a planted fault."""


@pytest.fixture(scope="module")
def subject(tmp_path_factory):
    return make_subject(tmp_path_factory.mktemp("triton") / "tiny", num_hidden_layers=2, num_attention_heads=4)


def served(subject, folder, kind, requests=REQUESTS, runner=V2, **settings):
    """What an engine did, and the arguments to compare it with the simulation."""
    rng = random.Random(f"triton:{kind}")
    shared = draw(rng, 32)
    batches = [[(shared + draw(rng, length - 32), most) for length, most in requests]]
    budget, choice = folder / "b.json", None
    if kind == "graded":
        choice = ByProbe(write_graded(budget, subject, HEADS[kind], RULE))
    else:
        write_budget(budget, subject, HEADS[kind], RULE)
    found = serve(
        subject, batches, runner.environment(budget, **ASKED | settings), graded=kind == "graded",
        async_scheduling=runner.asynchronous, attention_backend="TRITON_ATTN", block_size=16, max_model_len=160,
        max_num_seqs=4, max_num_batched_tokens=64, num_gpu_blocks_override=120,
    )  # fmt: skip
    assert (found["v2"], found["async"], found["backends"]) == (True, runner.asynchronous, ["TRITON_ATTN"])
    return found, (subject, HEADS[kind], RULE, batches, found, choice)


@KINDS
def test_tokens_are_the_simulations(subject, tmp_path, kind):
    """Prompts in chunks of at most 64 tokens, which begin alike; rows that decode next to rows that prefill."""
    found, compared = served(subject, tmp_path, kind)
    assert found["reclaimed"]["reported"] > 0
    assert found["free_blocks"] == found["blocks"] - 1
    assert finite(found)
    compare_all(*compared, close=CLOSE)


def test_a_table_that_is_not_rewritten_shows(subject, tmp_path):
    _, compared = served(subject, tmp_path, "whole", ((129, 6),), SABOTAGE_VIEW="whole-table")
    with pytest.raises(AssertionError, match=OTHER):
        compare_all(*compared, close=CLOSE)


def test_tokens_that_are_not_moved_show(subject, tmp_path):
    _, compared = served(subject, tmp_path, "graded", ((129, 6),), SABOTAGE_MOVES="missing")
    with pytest.raises(AssertionError, match=OTHER):
        compare_all(*compared, close=CLOSE)


@pytest.mark.parametrize(("kind", "runner"), [("whole", V2), ("graded", V2_ASYNC)], ids=["whole", "graded-async"])
def test_graphs_that_are_replayed(subject, tmp_path, kind, runner):
    """Graphs for two and for four requests; three of them, or one, are padded."""
    found, compared = served(subject, tmp_path, kind, runner=runner, **{graphs.WANTED: "2,4"})
    assert found["graphs"]["captured"] == 2
    assert found["graphs"]["replays"] > found["graphs"]["padded"] > 0
    assert found["free_blocks"] == found["blocks"] - 1
    assert finite(found)
    compare_all(*compared, close=CLOSE)


@pytest.mark.parametrize("fault", ["copies", "frozen"])
def test_a_view_that_replays_do_not_see_shows(subject, tmp_path, fault):
    """Lengths and tables of a step in tensors of its own, or not made at all."""
    requests, settings = ((129, 6), (100, 8)), {graphs.WANTED: "2", "SABOTAGE_VIEW": fault}
    found, compared = served(subject, tmp_path, "whole", requests, **settings)
    assert found["graphs"]["replays"] > 3
    with pytest.raises(AssertionError, match=OTHER):
        compare_all(*compared, close=CLOSE)
