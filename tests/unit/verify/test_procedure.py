"""What a verification is about to do: the budgets that the plugin would serve, with the plugin's variables."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvprofile.cli import run
from kvprofile.errors import InputError
from kvprofile.runtime.attestation import path_of
from kvprofile.verify.procedure import prepare
from kvprofile.verify.verify_options import EngineChoice, VerifyOptions
from tests.helpers.models import POCKET, ROOT

PROFILE = ROOT / "models" / "kv_budget" / "pocket.json"


pytestmark = pytest.mark.usefixtures("workplace")


@pytest.fixture(autouse=True)
def no_variables(monkeypatch):
    for name in ("BUDGET", "RETENTION", "KIND", "SINK", "RECENT", "WINDOW", "ALLOW_UNTESTED"):
        monkeypatch.delenv(f"LLM_KVZIP_{name}", raising=False)


def prepared(**options):
    return prepare(VerifyOptions(str(POCKET), **{"profile": PROFILE, "output": Path("made.verified.json"), **options}))


def test_without_options_the_plugin_s_variables_decide(monkeypatch):
    (plain,) = prepared().budgets
    assert (plain.kind, plain.settings.retention) == ("graded", 0.5)  # the file has a probe
    assert plain.variables == {
        "LLM_KVZIP_BUDGET": str(PROFILE), "LLM_KVZIP_RETENTION": "0.5", "LLM_KVZIP_KIND": "graded",
        "LLM_KVZIP_WINDOW": "anchored", "LLM_KVZIP_SINK": "16", "LLM_KVZIP_RECENT": "64",
        "LLM_KVZIP_ALLOW_UNTESTED": "platform",
    }  # fmt: skip
    for name, value in {"BUDGET": str(PROFILE), "RETENTION": "0.3", "KIND": "whole", "RECENT": "96"}.items():
        monkeypatch.setenv(f"LLM_KVZIP_{name}", value)
    monkeypatch.setenv("LLM_KVZIP_ALLOW_UNTESTED", "release")
    found = prepared(profile=None, output=None)
    (served,) = found.budgets
    assert found.path == path_of(PROFILE)
    assert (served.kind, served.settings.retention, served.heads.recent_tokens) == ("whole", 0.3, 96)
    assert served.variables["LLM_KVZIP_ALLOW_UNTESTED"] == "platform,release"
    both = prepared(retention=0.7, kind=("whole", "graded", "whole"))
    assert [each.kind for each in both.budgets] == ["whole", "graded"]
    assert {each.settings.retention for each in both.budgets} == {0.7}
    (other,) = prepared(kind=("whole",)).budgets  # another file than the environment's: its retention is not for it
    assert other.settings.retention == 0.5


def test_a_runtime_file_states_its_retention():
    assert run(["export", str(PROFILE), "--format", "vllm", "--retention", "0.3", "--output", "made.json"]) == 0
    found = prepared(profile=Path("made.json"), output=None)
    assert found.path == Path("made.verified.json")
    (budget,) = found.budgets
    (direct,) = prepared(retention=0.3, kind=("whole",)).budgets
    assert budget.heads == direct.heads
    assert "LLM_KVZIP_RETENTION" not in budget.variables
    assert budget.variables["LLM_KVZIP_BUDGET"] == str(Path("made.json").resolve())


def test_ranks_and_quantised_weights_have_no_simulation():
    assert prepared().without_simulation is None
    found = prepared(engine=EngineChoice(tensor_parallel_size=2))
    assert found.without_simulation == "tensor-parallel engines"
    assert found.arguments["kv_cache_memory_bytes"] * 2 == pytest.approx(
        prepared().arguments["kv_cache_memory_bytes"], rel=0.01
    )


def test_an_environment_that_makes_no_sense_is_one_line(monkeypatch):
    monkeypatch.setenv("LLM_KVZIP_WINDOW", "rolling")
    with pytest.raises(InputError, match="LLM_KVZIP_WINDOW is 'rolling'"):
        prepared()
