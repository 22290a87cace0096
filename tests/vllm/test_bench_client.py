"""VLLMClient and GPUMemoryManager with an engine in the same process, with budgets from the environment alone."""

from __future__ import annotations

import json
import math
import subprocess
import sys

import pytest

from kvprofile.budget import store
from kvprofile.budget.trim import TrimRule
from tests.helpers.models import POCKET, ROOT
from tests.vllm.engine import environment

pytest.importorskip("vllm")
pytestmark = pytest.mark.vllm

BUDGET = ROOT / "models" / "kv_budget" / "pocket.json"


def test_an_engine_in_this_process():
    env = environment(BUDGET, LLM_KVZIP_RETENTION="0.5", LLM_KVZIP_KIND="whole")
    del env["VLLM_CPU_KVCACHE_SPACE"]
    run = subprocess.run(
        [sys.executable, "-m", "tests.vllm.bench_client", str(POCKET)],
        env=env,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=1500,
        check=False,
    )
    assert run.returncode == 0, (run.stdout + run.stderr)[-4000:]
    line = next(line for line in run.stdout.splitlines() if line.startswith("RESULT"))
    found = json.loads(line.removeprefix("RESULT"))
    assert found["timed_layers"][0] >= 6  # two halves where a layer is split
    assert len(found["decode_steps"]) == sum(answer["output_tokens"] - 1 for answer in found["answers"])
    assert min(found["decode_steps"]) > 0
    profile = store.load(BUDGET)
    rule = TrimRule(profile.runtime.sink_tokens, profile.runtime.recent_tokens, 32)
    for answer in found["answers"]:
        assert all(text in answer["text"] for text in answer["expected"])
        cache, look, prompt = answer["cache"], answer["look"], answer["input_tokens"]
        assert cache["blocks_after_prefill"] % math.ceil(prompt / 32) == 0
        freed = rule.first_recent_block(prompt, prompt) - rule.sink_blocks
        assert (cache["blocks_after_prefill"] - cache["blocks_after_trim"]) % freed == 0
        assert 0.3 < answer["eviction_ratio"] < 0.6
        # what the runtime says of the request at its end is what the pool held in its last step
        assert cache["blocks_at_end"] == answer["held_at_last_step"]
        assert 0 < answer["timings"]["ttft_ms"] < answer["timings"]["e2el_ms"]
        assert answer["timings"]["queue_ms"] >= 0
        assert look["cache_bytes_total"] == found["blocks"] * look["block_bytes"]
        assert look["cache_bytes_total"] <= 2**26
        assert look["process_memory_bytes"] > 2**27
        # vLLM reports its usage as a step ends, before the blocks of what finished are back
        assert abs(look["cache_bytes_in_use"]) <= answer["held_at_last_step"] * look["block_bytes"]
    assert found["held_after"] == 0
    assert found["short"]["output_tokens"] == 1
    assert found["short"]["cache"]["blocks_after_trim"] is None  # it ended before its trim was due


def test_a_plugin_that_is_not_loaded_is_noticed(tmp_path):
    """vLLM serves on without it; here because VLLM_PLUGINS names another one only."""
    code = (
        "import sys\n"
        "from kvprofile.client import VLLMClient, BudgetsNotAppliedError\n"
        "try:\n"
        "    VLLMClient(sys.argv[1], dtype='float32', max_model_len=512, enforce_eager=True, block_size=32)\n"
        "except BudgetsNotAppliedError as error:\n"
        "    print('NOTICED', error)\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", code, str(POCKET)],
        env=environment(BUDGET, LLM_KVZIP_RETENTION="0.5", VLLM_PLUGINS="somebody_elses"),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=1500,
        check=False,
    )
    assert "NOTICED LLM_KVZIP_ENABLED=1 and vLLM with" in run.stdout, (run.stdout + run.stderr)[-3000:]
    assert "serves without budgets" in run.stdout
