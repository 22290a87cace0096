"""Plans of a benchmark: their order, the keys that say what may continue, and what they need."""

from __future__ import annotations

import json

import pytest

from kvprofile.bench import documents
from kvprofile.bench.bench_options import EngineOptions, LoadPlan
from kvprofile.bench.scenario import LegPlan, local_legs
from kvprofile.budget.trim import GRADED, WHOLE
from kvprofile.errors import InputError
from kvprofile.records.record import Experiment
from tests.helpers.bench_plans import make_plan
from tests.helpers.models import ROOT


def test_schedule_turns_around():
    plan = make_plan(repetitions=2)
    assert [(leg.name, r) for leg, r in plan.schedule] == [
        ("baseline", 0), ("0.9", 0), ("0.5", 0), ("0.5", 1), ("0.9", 1), ("baseline", 1),
    ]  # fmt: skip
    assert plan.seed_of(1) == plan.seed + 1


def test_keys_say_what_may_continue():
    plan = make_plan()
    assert plan.run_key() == make_plan(legs=local_legs((0.3,)), repetitions=3, verifiers=("loops",)).run_key()
    assert plan.run_key() != make_plan(seed=1).run_key()
    assert plan.run_key() != make_plan(load=LoadPlan(concurrency=3)).run_key()
    assert plan.run_key() != make_plan(documents=tuple(documents.pocket(1))).run_key()
    assert plan.run_key() != make_plan(profile_sha256="0" * 64).run_key()
    leg = plan.legs[1]
    assert plan.leg_key(leg, 0) != plan.leg_key(leg, 1)
    assert plan.leg_key(leg, 0) != plan.leg_key(LegPlan("0.9", 0.8), 0)


def test_kinds_of_heads_are_legs_of_their_own():
    legs = local_legs((0.5, 0.3), kinds=(WHOLE, GRADED))
    assert [(leg.name, leg.heads) for leg in legs] == [
        ("baseline", WHOLE), ("0.5", WHOLE), ("graded 0.5", GRADED), ("0.3", WHOLE), ("graded 0.3", GRADED),
    ]  # fmt: skip
    plan = make_plan(legs=legs)
    assert len({plan.leg_key(leg, 0) for leg in plan.legs}) == 5
    with pytest.raises(InputError, match="a budget is whole or graded, not 'half'"):
        local_legs((0.5,), kinds=("half",))


def test_dtypes_of_the_cache_are_legs_of_their_own():
    legs = local_legs((0.5,), kinds=(GRADED,), caches=("auto", "fp8"))
    assert [(leg.name, leg.retention, leg.heads, leg.cache) for leg in legs] == [
        ("baseline", None, WHOLE, "auto"), ("graded 0.5", 0.5, GRADED, "auto"),
        ("baseline fp8", None, WHOLE, "fp8"), ("graded 0.5 fp8", 0.5, GRADED, "fp8"),
    ]  # fmt: skip
    plan = make_plan(legs=legs)
    same = LegPlan("graded 0.5 fp8", 0.5, heads=GRADED)
    assert len({plan.leg_key(leg, 0) for leg in (*plan.legs, same)}) == 5
    with pytest.raises(InputError, match="--kv-cache-dtype is auto, fp8, fp8_e4m3, fp8_e5m2, not 'fp9'"):
        local_legs((0.5,), caches=("fp9",))


def test_settings_fit_the_record():
    settings = make_plan(engine=EngineOptions(extra=("--max-num-seqs", "4"))).settings()
    assert Experiment(name="x", settings=settings).settings["engine_extra"] == ["--max-num-seqs", "4"]
    assert str(ROOT) not in json.dumps(settings)


def test_legs_need_a_budget_file():
    with pytest.raises(InputError, match="no budget file for pocket"):
        make_plan(profile=None)
    make_plan(profile=None, legs=local_legs((), baseline=True))
    with pytest.raises(InputError, match=r"retention 1\.5 is outside"):
        local_legs((1.5,))
