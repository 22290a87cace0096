"""What follows from run records: groups, differences, intervals, and the doubts that are told first."""

from __future__ import annotations

import json
import math

import pytest
from scipy import stats

from kvprofile.records.record import Bound, Load, Metrics, Request, Verdict
from kvprofile.report.compare import summarise
from kvprofile.statistics import student_mean
from tests.helpers.made_up import LEGS, make_leg, make_provenance, make_record


def records_of(*legs, **changes):
    return [make_record(1).model_copy(update={"legs": list(legs), **changes})]


def leg(name, repetition=0, throughput=100.0, **changes):
    """A made-up leg with a throughput of its own."""
    return make_leg(name, repetition, metrics=Metrics(output_throughput=throughput), **changes)


def test_legs_stand_in_the_order_of_the_page():
    summary = summarise([make_record(legs=("remote", "0.5", "0.9", "baseline", "0.7"))])
    assert [group.name for group in summary.groups] == ["baseline", "0.9", "0.7", "0.5", "remote"]
    assert [len(group.legs) for group in summary.groups] == [3] * 5
    assert summary.against_baseline.reference == "baseline"
    (remote,) = summary.against_remote
    assert remote.reference == "remote"
    assert set(remote.rows[0].values) == {"remote", *LEGS}


def test_one_repetition_says_what_the_record_says():
    record = make_record(1)
    rows = {row.key: row for row in summarise([record]).against_baseline.rows}
    for each in record.legs:
        for key in Metrics.model_fields:
            if key in rows:
                assert rows[key].values[each.name].value == getattr(each.metrics, key)
        assert rows["pool_bytes_peak"].values[each.name].value == each.memory.pool_bytes_peak
        assert rows["eviction_ratio"].values[each.name].value == each.eviction_ratio
        assert rows["cost"].values[each.name].value == (each.cost and each.cost.amount)
        assert rows["fraction"].values[each.name].value == (each.bound and each.bound.fraction)


def test_differences_of_speed_are_of_pairs():
    ratios = [1.30, 1.42, 1.36]
    legs = [leg("baseline", i, 100.0 + 10 * i) for i in range(3)]
    legs += [leg("0.5", i, (100.0 + 10 * i) * ratio) for i, ratio in enumerate(ratios)]
    row = summarise(records_of(*legs)).against_baseline.row("output_throughput")
    found = row.differences["0.5"]
    logs = [math.log(ratio) for ratio in ratios]
    low, high = stats.t.interval(0.95, 2, loc=sum(logs) / 3, scale=stats.sem(logs))
    assert found.value == pytest.approx(math.exp(sum(logs) / 3) - 1)
    assert (found.low, found.high) == pytest.approx((math.expm1(low), math.expm1(high)))
    assert "baseline" not in row.differences


def test_only_repetitions_of_both_legs_are_compared():
    legs = [leg("baseline", 0, 100.0), leg("baseline", 1, 200.0), leg("0.5", 1, 300.0)]
    summary = summarise(records_of(*legs))
    found = summary.against_baseline.row("output_throughput").differences["0.5"]
    assert (found.value, found.low, found.high) == (pytest.approx(0.5), None, None)
    assert any("0.5 ran fewer than 2 times" in warning for warning in summary.warnings)


@pytest.mark.parametrize("count", [2, 3, 4, 7, 40])
def test_students_interval_is_scipys(count):
    values = [math.sin(number) for number in range(count)]
    found = student_mean(values)
    low, high = stats.t.interval(0.95, count - 1, loc=found.value, scale=stats.sem(values))
    assert found.low == pytest.approx(low, rel=5e-3, abs=1e-3)
    assert found.high == pytest.approx(high, rel=5e-3, abs=1e-3)


def test_nothing_is_compared_with_zero_or_with_the_unknown():
    legs = [leg("baseline", 0, 0.0), leg("0.5", 0, 50.0), leg("0.7", 0, None)]
    row = summarise(records_of(*legs)).against_baseline.row("output_throughput")
    assert row.differences["0.5"].value is None
    assert row.values["0.7"].value is None
    assert row.differences["0.7"].value is None


def answers(*passes, warnings=0):
    """One request for each truth value, about documents a, b, a, b, ..."""
    return [
        Request(
            document="ab"[number % 2], question=f"q{number}", output="x",
            verdicts=[Verdict(name="answer", passed=passed, warnings=["w"] * warnings)],
        )
        for number, passed in enumerate(passes)
    ]  # fmt: skip


def test_pass_rates_count_what_was_judged():
    requests = [*answers(True, True, False, None), Request(document="a", question="lost", error="timed out")]
    legs = [
        leg("baseline", documents=[], requests=answers(True, True, True, True)),
        leg("0.5", documents=[], requests=requests),
    ]
    row = summarise(records_of(*legs)).against_baseline.row("pass_rate")
    assert row.values["0.5"].value == 0.5  # two passed, one did not, one failed; the last was not judged
    assert row.differences["0.5"].value == pytest.approx(2 / 3 - 1)  # over the three that both answered
    assert row.differences["0.5"].low < row.differences["0.5"].value < row.differences["0.5"].high


def test_all_verifiers_must_pass_and_each_has_its_row():
    record = make_record(3, legs=("baseline", "0.5"))
    summary = summarise([record])
    rows = {row.key: row for row in summary.against_baseline.rows}
    requests = [request for each in record.legs if each.name == "0.5" for request in each.requests]
    for key, chosen in (("pass_rate", None), ("pass_rate:voice drift", "voice drift")):
        expected = [all(v.passed for v in request.verdicts if chosen in (None, v.name)) for request in requests]
        assert rows[key].values["0.5"].value == pytest.approx(sum(expected) / len(expected))
    warned = sum(len(verdict.warnings) for request in requests for verdict in request.verdicts)
    assert rows["warnings"].values["0.5"].value == pytest.approx(warned / len(requests))


def test_questions_that_agree_do_not_claim_certainty():
    legs = [leg(name, documents=[], requests=answers(True, True, True)) for name in ("baseline", "0.5")]
    rows = {row.key: row for row in summarise(records_of(*legs)).against_baseline.rows}
    assert rows["warnings"].differences["0.5"].low is None
    found = rows["pass_rate"].differences["0.5"]
    assert found.value == 0.0
    assert found.low < -0.2
    assert found.high > 0.2


def test_the_bound_stands_next_to_what_was_reached():
    bound = Bound(speedup=1.6)
    legs = [leg("baseline", i, 100.0) for i in range(2)]
    legs += [leg("0.5", 0, 140.0, bound=bound), leg("0.5", 1, 144.0, bound=bound)]
    rows = {row.key: row for row in summarise(records_of(*legs)).against_baseline.rows}
    assert rows["reached"].values["0.5"].value == pytest.approx(math.sqrt(1.40 * 1.44))
    assert rows["fraction"].values["0.5"].value == pytest.approx(math.sqrt(1.40 * 1.44) / 1.6)
    assert rows["reached"].values["baseline"].value is None
    keys = list(rows)
    assert keys.index("bound") + 1 == keys.index("reached") == keys.index("fraction") - 1


def test_what_a_leg_states_of_its_bound_is_not_computed_anew():
    record = make_record(1)
    stated = {each.name: each.bound.reached for each in record.legs if each.bound}
    row = summarise([record]).against_baseline.row("reached")
    assert {name: value.value for name, value in row.values.items() if value.value is not None} == stated


def test_records_of_one_experiment_are_one_and_equal_legs_count_once():
    whole = make_record(2)
    parts = [whole.model_copy(update={"legs": [each]}) for each in whole.legs]
    assert summarise([*parts, whole]).document() == summarise([whole]).document()


def test_repetitions_of_several_files_get_numbers_of_their_own():
    files = [records_of(leg(name, 0, speed)) for name, speed in (("baseline", 100), ("baseline", 90), ("0.5", 150))]
    summary = summarise([record for file in files for record in file])
    assert [each.repetition for each in summary.groups[0].legs] == [0, 1]


def test_experiments_keep_their_names_apart():
    records = [make_record(1, name="one"), make_record(1, name="two", made_up=False)]
    names = [group.name for group in summarise(records).groups]
    assert "one: baseline" in names
    assert "two: 0.5" in names
    assert summarise(records).title == "one and two"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pool_bytes": 4 * 2**30}, "pool sizes differ: baseline: 8,589,934,592 bytes; 0.5: 4,294,967,296 bytes"),
        ({"pool_bytes": None}, "pool sizes of 0.5 unknown"),
        ({"dtype": "float16"}, "dtypes differ: baseline: bfloat16; 0.5: float16"),
        ({"model": "other"}, "models differ: baseline: Qwen/Made-Up-14B; 0.5: other"),
        ({"seeds": [1]}, "seeds differ: baseline: 0; 0.5: 1"),
        ({"block_tokens": 32}, "block sizes differ: baseline: 16 tokens; 0.5: 32 tokens"),
        ({"documents": [], "requests": []}, "documents of 0.5 unknown"),
        ({"load": Load(mode="open", request_rate=2.0)}, "loads differ: baseline: closed, 8 in flight"),
        ({"engine": "vllm 0.33.0"}, "engines differ"),
        ({"status": "failed", "reason": "out of memory"}, "leg 0.5, repetition 1, failed: out of memory"),
        ({"metrics": Metrics(completed=7, failed=2)}, "leg 0.5, repetition 1: 2 of 9 requests failed"),
    ],
)
def test_what_legs_do_not_share_is_told(change, message):
    warnings = summarise(records_of(make_leg("baseline"), make_leg("0.5", **change))).warnings
    assert any(warning.startswith(message) for warning in warnings), warnings


def test_legs_that_share_everything_are_not_doubted():
    record = make_record(2, legs=tuple(LEGS), made_up=False)
    assert summarise([record]).warnings == ()
    seeded = [each.model_copy(update={"seeds": [each.repetition]}) for each in record.legs]
    assert summarise([record.model_copy(update={"legs": seeded})]).warnings == ()


def test_pools_of_whole_blocks_and_unknown_caching_elsewhere_are_not_doubted():
    pool = 2**33
    legs = [
        make_leg(name, i, pool_bytes=size, load=Load(mode="closed", prefix_caching=False))
        for name, size in (("baseline", pool), ("0.5", pool - pool // 200))
        for i in range(2)
    ]
    legs += [make_leg("remote", i, kind="remote", model=legs[0].model, load=Load(mode="closed")) for i in range(2)]
    record = make_record(1, made_up=False).model_copy(update={"legs": legs})
    assert summarise([record]).warnings == ()
    legs[2] = make_leg("0.5", 0, pool_bytes=pool, load=Load(mode="closed", prefix_caching=True))
    record = record.model_copy(update={"legs": legs})
    assert any(warning.startswith("cache settings differ") for warning in summarise([record]).warnings)


def test_what_was_not_recorded_is_told_in_one_line():
    legs = [make_leg(name, dtype=None, engine=None) for name in ("baseline", "0.5")]
    warnings = summarise(records_of(*legs)).warnings
    assert "not recorded, so perhaps not the same for all legs: dtypes, engines" in warnings


def test_a_full_pool_takes_as_many_requests_as_it_can():
    loads = {name: Load(mode="fill", concurrency=count) for name, count in (("baseline", 8), ("0.5", 15))}
    legs = [make_leg(name, i, load=load) for name, load in loads.items() for i in range(2)]
    record = make_record(1, made_up=False).model_copy(update={"legs": legs})
    assert summarise([record]).warnings == ()


def test_runs_on_other_machines_are_told_apart():
    first, second = make_record(1), make_record(1)
    machine = second.provenance.machine.model_copy(update={"cores": 2})
    changed = make_provenance(machine=machine, git_commit="f" * 40, git_dirty=True)
    warnings = summarise([first, second.model_copy(update={"provenance": changed})]).warnings
    assert "cores differ between the files: 16; 2" in warnings
    assert any(warning.startswith("commits differ") for warning in warnings)
    assert any("source differed from its commit" in warning for warning in warnings)


def test_nothing_finished_is_not_an_error():
    failed = [make_leg(name, status="failed", reason="no memory") for name in ("baseline", "0.5")]
    summary = summarise(records_of(*failed))
    assert summary.against_baseline.rows == ()
    assert summary.against_remote == ()
    assert len(summary.groups) == 2


def test_a_summary_is_json():
    document = summarise([make_record()]).document()
    found = json.loads(json.dumps(document, allow_nan=False))
    assert [row["key"] for row in found["against_baseline"]["rows"]] == list(
        dict.fromkeys(row["key"] for row in document["against_baseline"]["rows"])
    )
    assert found["legs"][1]["retention_asked"] == 0.9
    assert document["warnings"][0].startswith("made-up numbers")
