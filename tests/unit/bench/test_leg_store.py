"""Finished legs on disk."""

from __future__ import annotations

import pytest

from kvprofile.bench.leg_store import LegStore
from kvprofile.bench.scenario import local_legs
from kvprofile.budget.probe import path_of
from kvprofile.errors import InputError
from kvprofile.records.record import Leg, Request
from tests.helpers.bench_plans import make_plan
from tests.helpers.models import ROOT


def test_parts_keep_finished_legs_only_for_the_same_settings(tmp_path):
    plan = make_plan()
    leg = plan.legs[1]
    parts = LegStore(tmp_path / "run", plan)
    parts.open(force=False)
    assert parts.finished(leg, 0) is None
    done = Leg(name="0.9", kind="local", status="ok", model="pocket", load={"mode": "closed"})
    rows = parts.rows(leg, 0)
    rows.add(Request(document="needle", output="x\u2028<script>"))
    rows.close()
    assert [row.output for row in parts.interrupted(leg, 0)] == ["x\u2028<script>"]
    parts.save(leg, 0, done)
    assert parts.interrupted(leg, 0) == []
    assert LegStore(tmp_path / "run", make_plan(repetitions=2)).finished(leg, 0) == done
    assert parts.finished(leg, 1) is None
    with pytest.raises(InputError, match="other settings"):
        LegStore(tmp_path / "run", make_plan(seed=3)).open(force=False)


def test_graded_legs_keep_their_probe(tmp_path):
    profile = ROOT / "models" / "kv_budget" / "pocket.json"
    for kind, kept in (("whole", False), ("graded", True)):
        plan = make_plan(profile=str(profile), legs=local_legs((0.5,), kinds=(kind,)))
        parts = LegStore(tmp_path / kind, plan)
        parts.open(force=False)
        assert path_of(parts.profile).is_file() == kept
    assert path_of(parts.profile).read_bytes() == path_of(profile).read_bytes()
