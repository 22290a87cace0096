"""Scores from several worker processes, each with some of the KV heads, or with copies of one."""

from __future__ import annotations

import pytest

from tests.helpers.models import random_model
from tests.vllm.capture import TOLERANCE, case_of, draw_documents, hf_scores, run_cases, worst_difference

pytest.importorskip("vllm")
pytestmark = pytest.mark.vllm

CHUNK = 60


@pytest.mark.parametrize(
    ("kv_heads", "core_process"),
    [(4, "1"), pytest.param(1, "0", marks=pytest.mark.slow)],
    ids=["heads dealt out, core in its own process", "one head on both"],
)
def test_two_tensor_parallel_ranks(tmp_path, kv_heads, core_process, capsys):
    """Each rank has half of the KV heads, or a copy of the only one and half of its query heads."""
    model = random_model("llama", head_dim=32, num_attention_heads=8, num_key_value_heads=kv_heads).eval()
    folder, output = tmp_path / "model", tmp_path / "scores.safetensors"
    model.save_pretrained(folder)
    documents = draw_documents("ranks", (277, 61))
    arguments = ("block_size=32", "max_num_batched_tokens=100")
    case = case_of(folder, documents, CHUNK, output, ranks=2, arguments=arguments)
    settings = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}
    (found,) = run_cases([case], VLLM_ENABLE_V1_MULTIPROCESSING=core_process, **settings)
    worst = worst_difference(hf_scores(model, folder, documents, CHUNK), found["scores"])
    with capsys.disabled():
        print(f" worst difference {worst:.1e}", end="")
    assert worst < TOLERANCE
    assert (found["evictions"], found["shortcuts"]) == (0, 0)
