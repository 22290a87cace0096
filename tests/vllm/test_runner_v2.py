"""Budgets on model runner V2, which GPUs take, with its kernels in Triton's interpreter: the simulation's tokens."""

from __future__ import annotations

import random

import pytest

from kvprofile.budget.trim import TrimRule
from kvprofile.evaluate.token_choice import ByProbe
from tests.vllm import interpreter
from tests.vllm.engine import (
    SHARES,
    UNEVEN,
    compare_all,
    draw,
    environment,
    finite,
    make_subject,
    serve,
    write_budget,
    write_graded,
)

pytest.importorskip("vllm")
pytestmark = [pytest.mark.vllm, pytest.mark.skipif(not interpreter.is_here(), reason=interpreter.MISSING)]

RULE = TrimRule(16, 64, 32)


@pytest.mark.parametrize("kind", ["graded", pytest.param("whole", marks=pytest.mark.slow)])
def test_pressure_chunks_and_prefix_hits(tmp_path, kind):
    """A pool for one request and a half, prompts in chunks: everything that changes a row, on few tokens."""
    rng = random.Random(f"runner v2:{kind}")
    subject = make_subject(tmp_path / "tiny")
    shared = draw(rng, 100)
    lengths = ((230, 30), (150, 60), (97, 40), (33, 12), (260, 20), (200, 50))
    batch = [(shared[: rng.choice((0, 64, 96))] + draw(rng, count), most) for count, most in lengths]
    graded = kind == "graded"
    if graded:
        choice = ByProbe(write_graded(tmp_path / "b.json", subject, SHARES, RULE))
    else:
        choice = None
        write_budget(tmp_path / "b.json", subject, UNEVEN, RULE)
    found = serve(
        subject,
        [batch],
        environment(tmp_path / "b.json", **{interpreter.WANTED: "1"}),
        graded=graded,
        max_model_len=512,
        num_gpu_blocks_override=84 if graded else 36,
        max_num_batched_tokens=128,
        max_num_seqs=6,
    )
    assert found["v2"]
    assert found["batches"][0]["preemptions"] > 0, found["groups"]
    assert found["reclaimed"]["reported"] > 0
    assert found["free_blocks"] == found["blocks"] - 1  # all but the null block
    assert finite(found)
    tokens, ties = compare_all(subject, SHARES if graded else UNEVEN, RULE, [batch], found, choice)
    assert tokens > 200
    print(f"{tokens} tokens equal the simulation's, {ties} of them near ties")
