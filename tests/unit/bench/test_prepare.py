"""What a benchmark decides before it starts, and why."""

from __future__ import annotations

import json

import pytest

from kvprofile.bench import prepare
from kvprofile.bench.bench_options import BenchOptions
from kvprofile.errors import InputError
from tests.helpers.models import POCKET, ROOT


@pytest.mark.usefixtures("workplace")
def test_prepare_says_why(monkeypatch):
    monkeypatch.delenv("MOONSHOT_API_KEY", raising=False)
    asked = BenchOptions(model=str(POCKET), profile=ROOT / "models/kv_budget/pocket.json", preset="seed")
    found = prepare.prepare(asked)
    plan = found.plan
    assert [leg.name for leg in plan.legs] == ["baseline", "graded 0.9", "graded 0.7", "graded 0.5", "remote"]
    assert plan.repetitions == 2
    assert len(plan.documents) == 3
    assert any("reads 4,096 positions" in reason for reason in found.reasons)
    described = prepare.described(plan, found.reasons)
    json.dumps(described)
    assert "provider moonshot needs a key: set MOONSHOT_API_KEY" in described["missing"]
    assert described["estimate"]["cost_at_most"]["remote"] == {"amount": None, "currency": None}
    with pytest.raises(InputError, match="no preset 'x'"):
        prepare.prepare(BenchOptions(model=str(POCKET), preset="x"))
    with pytest.raises(InputError, match="no budget file"):
        prepare.prepare(BenchOptions(model=str(POCKET)))


@pytest.mark.usefixtures("workplace")
def test_graded_legs_need_a_probe(tmp_path):
    asked = {"model": str(POCKET), "retentions": (0.3,), "local": True}
    found = prepare.prepare(BenchOptions(profile=ROOT / "models/kv_budget/pocket.json", **asked))
    assert [(leg.name, leg.heads) for leg in found.plan.legs] == [("baseline", "whole"), ("graded 0.3", "graded")]
    lone = tmp_path / "pocket.json"
    lone.write_bytes((ROOT / "models/kv_budget/pocket.json").read_bytes())
    with pytest.raises(InputError, match=r"no probe .* which graded budgets need"):
        prepare.prepare(BenchOptions(profile=lone, **asked))
    whole = prepare.prepare(BenchOptions(profile=lone, kinds=("whole",), **asked))
    assert [leg.name for leg in whole.plan.legs] == ["baseline", "0.3"]
