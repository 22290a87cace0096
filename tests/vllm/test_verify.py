"""`kvprofile verify` on this machine, and what its attestation lifts where the platform is not a tested one."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest

from kvprofile.runtime import attestation
from tests.helpers.models import POCKET, ROOT
from tests.vllm.engine import Subject, draw, environment, finite, serve
from tests.vllm.verify_command import SMALL, budget_in, environment_with, failed, verify

pytest.importorskip("vllm")
pytestmark = pytest.mark.vllm

CONFIGURE = """
import json, os, sys
from vllm.engine.arg_utils import EngineArgs
for files, settings, changes in json.loads(sys.stdin.read()):
    for name, content in files.items():
        open(name, "w").write(content)
    for name in [name for name in os.environ if name.startswith("LLM_KVZIP_ALLOW")]:
        del os.environ[name]
    os.environ.update(settings)
    arguments = {"dtype": "float32", "block_size": 32, "enforce_eager": True, "max_model_len": 512, **changes}
    try:
        config = EngineArgs(sys.argv[1], skip_tokenizer_init=True, **arguments).create_engine_config()
    except Exception as error:
        print("SAID", json.dumps([type(error).__name__, str(error)]))
    else:
        print("SAID", json.dumps(config.additional_config.get("kvprofile_attested")))
"""
"""What the process says that configures an engine, once files are as given: a refusal, or what workers are to check."""


@pytest.fixture(scope="module")
def verified(tmp_path_factory):
    """The budget file with its attestation, the environment in which the CPU is untested, and what verify found."""
    place = tmp_path_factory.mktemp("verified")
    budget, env = budget_in(place / "budgets"), environment_with(place, "untested")
    code, found, err = verify(budget, env)
    assert code == 0, (found, err)
    return budget, env, found


def serving(budget, env):
    """The environment of an engine that serves what was verified."""
    return environment(budget, LLM_KVZIP_RETENTION="0.5", LLM_KVZIP_KIND="whole") | {
        name: env[name] for name in ("PYTHONPATH", "PLANTED")
    }


def configured(cases, env, cwd=ROOT):
    run = subprocess.run(
        [sys.executable, "-c", CONFIGURE, str(POCKET)], input=json.dumps(cases), env=env, cwd=cwd, capture_output=True,
        text=True, timeout=600, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-3000:]
    return [json.loads(line.removeprefix("SAID")) for line in run.stdout.splitlines() if line.startswith("SAID")]


def test_everything_holds_and_is_attested(verified):
    budget, _, found = verified
    (result,) = found["results"]
    checks = ["like stock", "blocks given back", "load", "like simulated"]
    assert [check["name"] for check in result["checks"]] == checks
    assert failed(found) == {}
    assert found["attestation"] == str(attestation.path_of(budget))
    (made,) = attestation.load(attestation.path_of(budget))
    assert made.key == result["key"]
    assert {name: made.key[name] for name in ("platform", "model", "dtype", "block_size", "kind", "model_runner")} == {
        "platform": "cpu", "model": "pocket", "dtype": "float32", "block_size": 32, "kind": "whole",
        "model_runner": "V1",
    }  # fmt: skip
    load = made.checks["load"]
    assert load["preemptions"] > 0
    assert load["prefix_hits"] > 0
    assert load["chunks"] > 5
    assert load["poisoned"]
    assert made.checks["reference"]["against"] == "simulation"
    assert made.checks["reference"]["tokens"] > 600
    assert made.checks["blocks"]["given_back"] > 20
    assert set(result["seconds_per_token"]) == {"stock", "plugin"}


def test_it_lifts_the_refusal_of_exactly_what_was_verified(verified):
    budget, env, _ = verified
    path = attestation.path_of(budget)
    whole = path.read_text()
    (made,) = attestation.load(path)
    todo = "; run 'kvprofile verify MODEL' on this machine, or set LLM_KVZIP_ALLOW_UNTESTED=platform"

    def holding(**changes):
        copy = path.with_name("copy.verified.json")
        attestation.save(copy, [replace(made, key={**made.key, **changes})])
        return copy.read_text()

    backends = {"path": str(path), "device": made.key["device"], "pairs": [["CPU_ATTN", 32]]}
    edited = json.loads(whole)
    edited["attestations"][0]["key"]["device"] = "another"
    cases = [
        ({str(path): whole}, {}, {}, backends),
        ({str(path): json.dumps(edited)}, {}, {}, "attestation 1 was changed after it was written"),
        ({str(path): "{"}, {}, {}, "not JSON"),
        ({str(path): whole}, {}, {"dtype": "bfloat16"}, "dtype is bfloat16, attested is float32"),
        ({str(path): whole}, {}, {"enforce_eager": False}, "graphs is "),
        ({str(path): whole}, {"LLM_KVZIP_RETENTION": "0.3"}, {}, "budget is "),
        ({str(path): whole}, {"LLM_KVZIP_RETENTION": "0.5"}, {"enable_lora": True}, "LoRA adapters"),
        ({str(path): whole}, {"LLM_KVZIP_ALLOW_UNTESTED": "platform"}, {"dtype": "bfloat16"}, None),
        ({str(path): whole}, {"LLM_KVZIP_ALLOW_UNTESTED": "lora"}, {"enable_lora": True}, "head_order is gathered"),
    ]
    for name, value in made.key.items():
        if name not in attestation.CHECKED_IN_WORKERS:
            other = value + 1 if isinstance(value, int) else "another"
            cases.append(({str(path): holding(**{name: other})}, {}, {}, f"{name} is "))
    try:
        said = configured([case[:3] for case in cases], serving(budget, env))
        path.unlink()
        (missing,) = configured([({}, {}, {})], serving(budget, env))
        package = budget.parent.parent / "changed"
        shutil.copytree(ROOT / "kvprofile", package / "kvprofile", ignore=shutil.ignore_patterns("__pycache__"))
        with (package / "kvprofile" / "runtime" / "layer.py").open("a") as file:
            file.write("#")
        changed = serving(budget, env)
        changed["PYTHONPATH"] = os.pathsep.join([str(package), changed["PYTHONPATH"]])
        (outdated,) = configured([({str(path): whole}, {}, {})], changed, cwd=package)
    finally:
        path.write_text(whole)
    for (*_, expected), found in zip(cases, said, strict=True):
        if not isinstance(expected, str):
            assert found == expected
            continue
        assert found[0] == "ValueError", (expected, found)
        assert expected in found[1]
        assert found[1].endswith(todo) or "LoRA" in expected
        assert "\n" not in found[1]
    without = f"the attestation {path} does not exist"
    assert missing[1] == f"kvprofile does not serve with platform cpu (tested: ): {without}{todo}"
    assert "does not hold here: runtime is " in outdated[1]


def test_the_attested_engine_serves_and_a_worker_that_differs_does_not(verified, tmp_path):
    budget, env, _ = verified
    subject = Subject(None, POCKET, None)
    batches = [[(draw(random.Random("attested"), 300), 8)]]
    found = serve(subject, batches, serving(budget, env), max_model_len=512)
    assert finite(found)
    assert found["reclaimed"]["reported"] > 0
    assert "attested in" in found["log"]

    other = budget_in(tmp_path / "budgets")
    (made,) = attestation.load(attestation.path_of(budget))
    told = replace(made, key={**made.key, "attention_backend": "FLASH_ATTN"})
    attestation.save(attestation.path_of(other), [told])
    with pytest.raises(AssertionError) as caught:
        serve(subject, batches, serving(other, env), max_model_len=512)
    assert "does not hold: attention_backend is CPU_ATTN, attested is FLASH_ATTN; run 'kvprofile" in str(caught.value)


def test_the_doctor_says_whether_one_holds(verified, tmp_path):
    budget, env, _ = verified
    path, none = attestation.path_of(budget), budget_in(tmp_path / "b")
    settings = [{}, {"LLM_KVZIP_BUDGET": str(none)}, {"LLM_KVZIP_ALLOW_UNTESTED": "platform"}]
    code = (
        "import os, json; from kvprofile.runtime import configure, doctor; configure.TESTED_PLATFORMS = ();"
        f"found = [doctor.attested(os.environ | each) for each in {settings!r}];"
        "print(json.dumps([[each.good, each.detail] for each in found]))"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], env=serving(budget, env), capture_output=True, text=True, check=True
    )
    holds, missing, allowed = json.loads(run.stdout.splitlines()[-1])
    assert holds == [True, f"{path} holds on this machine for whole heads, float32, blocks of 32"]
    assert not missing[0]
    assert missing[1].startswith("platform cpu is not tested, and the attestation ")
    assert missing[1].split(";")[0].endswith(" does not exist")
    assert allowed[0] is None


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--profile", "models/kv_budget/SmolLM2-135M-Instruct.json"], "is for SmolLM2-135M-Instruct, vLLM serves"),
        (["--profile", "none.json"], "none.json"),
        (["--retention", "1"], "every head is full, so there is nothing to verify"),
        (["--kind", "halves"], "whole or graded, not 'halves'"),
        (["--max-model-len", "200"], "so nothing would be trimmed; give at least 272"),
        (["--max-model-len", "9000"], "pass a smaller --max-model-len"),
        (["--vllm-arg", "max_num_seqs=2"], "kvprofile sets it itself"),
        (["--output", "models"], "it is a folder"),
    ],
)
def test_wrong_input_is_one_line_before_any_engine_starts(words, said, capsys, monkeypatch):
    from kvprofile.cli import run

    monkeypatch.chdir(ROOT)
    assert run(["verify", str(POCKET), *SMALL, *words]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


def test_what_vllm_refuses_is_one_line(tmp_path):
    budget, env = budget_in(tmp_path / "budgets"), environment_with(tmp_path)
    code, found, err = verify(budget, env, "--vllm-arg", "load_format=no-such-format")
    assert (code, found) == (2, None)
    assert "vLLM does not start (stock vLLM): " in err.splitlines()[-1]
    assert not attestation.path_of(budget).exists()
