"""`kvprofile verify` sees and names what is planted into the runtime; other kinds, dtypes and model runners hold."""

from __future__ import annotations

import os
import random
from dataclasses import replace

import pytest

from kvprofile.runtime import attestation, metrics
from kvprofile.runtime.find import Served, find
from kvprofile.runtime.settings import from_environment
from tests.helpers.attestations import make_attestation
from tests.helpers.models import POCKET, ROOT
from tests.vllm import interpreter
from tests.vllm.engine import Subject, draw, environment, serve
from tests.vllm.verify_command import budget_in, environment_with, failed, verify

pytest.importorskip("vllm")
pytestmark = [pytest.mark.vllm, pytest.mark.slow]

SEEN = {
    "early": {"blocks given back": "blocks held after the trim, the rule says ", "like simulated": "token "},
    "heads": {"like simulated": "log-probabilities "},
    "output": {"like stock": "request longest of batch load, token 451", "like simulated": "token "},
    "stale": {"like stock": "request longest of batch load, token ", "like simulated": "token "},
    "crash": {"engine": "RuntimeError: planted"},
    "whole-view": {"like simulated": "request longest of batch load, token 452"},
}


MOVES = "moves"
"""Of graded heads alone."""


@pytest.mark.parametrize("fault", [*SEEN, MOVES])
def test_a_planted_fault_is_seen_and_named_and_nothing_is_attested(fault, tmp_path):
    budget = budget_in(tmp_path / "budgets")
    path = attestation.path_of(budget)
    attestation.save(path, [make_attestation()])
    code, found, err = verify(
        budget, environment_with(tmp_path, fault), *(["--kind", "graded"] if fault == MOVES else [])
    )
    assert code == 1, err
    (result,) = found["results"]
    assert attestation.load(path) == [make_attestation()]
    assert set(result["key"]) == set(attestation.KEY)
    assert result["key"]["kind"] == ("graded" if fault == MOVES else "whole")
    if fault == "crash":  # the engine that told it had another window, and the key is of the budget all the same
        asked = from_environment(
            {"LLM_KVZIP_BUDGET": str(budget), "LLM_KVZIP_RETENTION": "0.5", "LLM_KVZIP_KIND": "whole"}
        )
        own, _ = find(asked, Served(("pocket",), 6, 8, 4, 32, 1))
        assert result["key"]["budget"] == metrics.identity(own)
    seen = failed(found)
    expected = SEEN.get(fault, {"like simulated": "token "})
    assert set(seen) == set(expected), seen
    for name, words in expected.items():
        assert words in seen[name]
    assert found["attestation"] is None


def test_both_kinds_and_another_dtype_lie_in_one_file(tmp_path):
    budget, env = budget_in(tmp_path / "budgets"), environment_with(tmp_path)
    both = ["--kind", "whole", "--kind", "graded"]
    code, found, err = verify(budget, env, *both)
    assert code == 0, (failed(found), err)
    code, found, err = verify(budget, env, *both, "--dtype", "bfloat16", "--retention", "0.3")
    assert code == 0, (failed(found), err)
    made = attestation.load(attestation.path_of(budget))
    assert sorted((each.key["kind"], each.key["dtype"]) for each in made) == [
        ("graded", "bfloat16"), ("graded", "float32"), ("whole", "bfloat16"), ("whole", "float32"),
    ]  # fmt: skip
    assert len({each.key["budget"] for each in made}) == 4


def test_caches_of_8_bit_floats_have_an_attestation_of_their_own(tmp_path):
    budget, env = budget_in(tmp_path / "budgets"), environment_with(tmp_path)
    code, found, err = verify(budget, env, "--kind", "whole", "--kind", "graded", "--kv-cache-dtype", "fp8")
    assert code == 0, (failed(found), err)
    made = attestation.load(attestation.path_of(budget))
    found = sorted((each.key["kind"], each.key["kv_cache_dtype"]) for each in made)
    assert found == [("graded", "fp8"), ("whole", "fp8")]


def test_a_block_size_that_the_workers_find_is_refused_there(tmp_path):
    budget, env = budget_in(tmp_path / "budgets"), environment_with(tmp_path, "untested")
    code, found, err = verify(budget, env)
    assert code == 0, (failed(found), err)
    (made,) = attestation.load(attestation.path_of(budget))
    attestation.save(attestation.path_of(budget), [replace(made, key={**made.key, "block_size": 64})])
    own = environment(budget, LLM_KVZIP_RETENTION="0.5", LLM_KVZIP_KIND="whole")
    own |= {name: env[name] for name in ("PYTHONPATH", "PLANTED")}
    with pytest.raises(AssertionError, match="block_size is 32, attested is 64"):
        serve(Subject(None, POCKET, None), [[(draw(random.Random(1), 90), 2)]], own, max_model_len=512)


def test_two_ranks_are_compared_with_themselves(tmp_path):
    """They are not simulated, and the output says what that is worth."""
    budget, env = budget_in(tmp_path / "budgets"), environment_with(tmp_path, VLLM_CPU_OMP_THREADS_BIND="nobind")
    code, found, err = verify(budget, env, "--tensor-parallel-size", "2")
    assert code == 0, (failed(found) if found else None, err)
    checks = {check["name"]: check["detail"] for check in found["results"][0]["checks"]}
    assert checks["like alone"].startswith("weaker: the same engine, one request at a time; no simulation of tensor")
    (made,) = attestation.load(attestation.path_of(budget))
    assert made.checks["reference"]["against"] == "alone"
    assert made.key["tensor_parallel_size"] == 2


INTERPRETED = """
import os, sys
exec(open(os.environ["NO_NETWORK"]).read())
if "kvprofile.verify.child_engine" in sys.orig_argv:
    path = os.environ["PYTHONPATH"]
    from tests.vllm import interpreter
    os.environ["PYTHONPATH"] = path  # tests put others in front, and the process that becomes the engine looks again
    interpreter.enable()
"""


@pytest.mark.skipif(not interpreter.is_here(), reason=interpreter.MISSING)
def test_model_runner_v2_in_the_interpreter(tmp_path):
    """The engines are started by what tests put in front of their path; the command does not know."""
    place = tmp_path / "interpreted"
    place.mkdir()
    (place / "sitecustomize.py").write_text(INTERPRETED)
    budget, env = budget_in(tmp_path / "budgets"), environment_with(tmp_path)
    env["PYTHONPATH"] = os.pathsep.join([str(place), env["PYTHONPATH"]])
    env["NO_NETWORK"] = str(ROOT / "tests" / "no_network" / "sitecustomize.py")
    code, found, err = verify(budget, env, "--max-model-len", "320")
    assert code == 0, (failed(found) if found else None, err)
    (made,) = attestation.load(attestation.path_of(budget))
    assert made.key["model_runner"] == "V2"
    assert not made.checks["load"]["poisoned"]
