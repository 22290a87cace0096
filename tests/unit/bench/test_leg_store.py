"""Finished legs on disk."""

from __future__ import annotations

import pytest

from kvprofile.bench.leg_store import LegStore
from kvprofile.errors import InputError
from kvprofile.records.record import Leg, Request
from tests.helpers.bench_plans import make_plan


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
