"""What engines are asked, and what may be asked of a verification."""

from __future__ import annotations

import pytest

from kvprofile.errors import InputError
from kvprofile.verify.request_plan import AGAIN, LOAD, plan_requests
from kvprofile.verify.verify_options import EngineChoice

TEXTS = list(range(1000, 3000))


@pytest.mark.parametrize("block", [None, 1, 16, 32, 128])
@pytest.mark.parametrize("keeps", [(0, 1), (16, 64), (128, 256)])
@pytest.mark.parametrize("longest", [None, 3000])
def test_requests_fit_and_together_they_are_more_than_the_pool(block, keeps, longest):
    plan = plan_requests(TEXTS, *keeps, block, longest, seed=0)
    assert plan.max_model_len == longest or longest is None
    lengths = [len(request.prompt) + request.max_tokens for _, request in plan.requests]
    assert max(lengths) == plan.max_model_len
    assert min(len(request.prompt) for _, request in plan.requests) == 1
    assert all(request.max_tokens >= 1 for _, request in plan.requests)
    assert sum(lengths) > 2 * plan.pool_tokens > 2 * plan.max_model_len
    assert plan.chunk_tokens < plan.max_model_len / 2
    names = [request.name for _, request in plan.requests]
    assert len(names) == len(set(names))
    trimmed = [1 for _, request in plan.requests if len(request.prompt) > sum(keeps) + (block or 128)]
    assert len(trimmed) > 8


def test_some_begin_alike_and_one_comes_back():
    plan = plan_requests(TEXTS, 16, 64, 32, None, seed=3)
    assert plan == plan_requests(TEXTS, 16, 64, 32, None, seed=3)
    assert plan != plan_requests(TEXTS, 16, 64, 32, None, seed=4)
    prompts = {request.name: request.prompt for _, request in plan.requests}
    assert prompts["usual-0"][:200] == prompts["usual-3"][:200] != prompts["usual-1"][:200]
    (again,) = plan.batches[AGAIN]
    assert again.prompt[:300] in [request.prompt[:300] for request in plan.batches[LOAD]]


def test_requests_too_short_for_a_trim_are_refused():
    with pytest.raises(InputError, match="--max-model-len 300: heads keep 128 sinks and a window of 256"):
        plan_requests(TEXTS, 128, 256, 16, 300, seed=0)


def test_arguments_are_vllm_s():
    chosen = EngineChoice(dtype="bfloat16", block_size=16, vllm_arg=("load-format=safetensors", "max_logprobs=30"))
    found = chosen.arguments()
    assert found["block_size"] == 16
    assert (found["load_format"], found["max_logprobs"]) == ("safetensors", 30)
    assert "gpu_memory_utilization" not in found
    for text, said in (("plain", "give NAME=VALUE"), ("max_num_seqs=3", "kvprofile sets it itself")):
        with pytest.raises(InputError, match=said):
            EngineChoice(vllm_arg=(text,)).arguments()
