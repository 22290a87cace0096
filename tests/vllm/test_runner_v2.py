"""Graded heads on model runner V2, which GPUs take, its kernels in Triton's interpreter: the simulation's tokens.

Slow tests ask more of V2, with whole heads too: those of ``runners``, and of TRITON_ATTN in ``test_triton_engine``.
"""

from __future__ import annotations

import random

import pytest

from kvprofile.budget.trim import TrimRule
from kvprofile.evaluate.token_choice import ByProbe
from tests.vllm.engine import SHARES, compare_all, draw, finite, make_subject, serve, write_graded
from tests.vllm.runners import V2, WHERE_TRITON_IS

pytest.importorskip("vllm")
pytestmark = [pytest.mark.vllm, WHERE_TRITON_IS]

RULE = TrimRule(16, 64, 32)


def test_pressure_chunks_and_prefix_hits(tmp_path):
    """A pool for one request and a half, prompts in chunks: everything that changes a row, on few tokens."""
    rng = random.Random("runner v2:graded")
    subject = make_subject(tmp_path / "tiny")
    shared = draw(rng, 100)
    lengths = ((230, 30), (150, 60), (97, 40), (33, 12), (260, 20), (200, 50))
    batch = [(shared[: rng.choice((0, 64, 96))] + draw(rng, count), most) for count, most in lengths]
    choice = ByProbe(write_graded(tmp_path / "b.json", subject, SHARES, RULE))
    found = serve(
        subject,
        [batch],
        V2.environment(tmp_path / "b.json"),
        graded=True,
        max_model_len=512,
        num_gpu_blocks_override=84,
        max_num_batched_tokens=128,
        max_num_seqs=6,
    )
    assert found["v2"]
    assert found["batches"][0]["preemptions"] > 0, found["groups"]
    assert found["reclaimed"]["reported"] > 0
    assert found["free_blocks"] == found["blocks"] - 1  # all but the null block
    assert finite(found)
    tokens, ties = compare_all(subject, SHARES, RULE, [batch], found, choice)
    assert tokens > 200
    print(f"{tokens} tokens equal the simulation's, {ties} of them near ties")
