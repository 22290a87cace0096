"""Results of other tools: read as they are, told apart by path and settings, and unknown where nothing was measured."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvprofile.errors import InputError
from kvprofile.records import run_files
from kvprofile.records.foreign import Place, tool_of
from kvprofile.records.leg_names import leg_names
from kvprofile.records.record import LATENCIES, Metrics
from kvprofile.report import html
from kvprofile.report.compare import summarise
from kvprofile.report.figures import LATENCY, SPEED, figures
from tests.helpers.models import ROOT

RESULTS = ROOT / "tests" / "data" / "results"
FILES = sorted(RESULTS.glob("*.json*"))


def serve_result(**changes):
    """What `vllm bench serve --save-result --save-detailed` of vLLM 0.32 writes, two requests of which one failed."""
    latency = {f"{kind}_{name}_ms": 1.5 for kind in ("mean", "median", "std", "p99") for name in LATENCIES[:3]}
    return {
        "date": "20261124-101500", "endpoint_type": "openai", "backend": "openai", "label": None,
        "model_id": "/srv/models/pocket", "tokenizer_id": "/srv/models/pocket", "num_prompts": 2,
        "request_rate": "inf", "burstiness": 1.0, "max_concurrency": 4, "duration": 2.5, "completed": 1, "failed": 1,
        "total_input_tokens": 100, "total_output_tokens": 7, "request_throughput": 0.4, "request_goodput": None,
        "output_throughput": 2.8, "total_token_throughput": 42.8, "input_lens": [100, 90], "output_lens": [7, 0],
        "ttfts": [0.25, 0.0], "itls": [[0.01, 0.02], []], "latencies": [0.28, 0.0], "start_times": [50.5, 50.0],
        "queue_times": [0.0, 0.0], "generated_texts": ["a <b>", ""], "errors": ["", "503"],
        "max_output_tokens_per_s": 9.0, "max_concurrent_requests": 2, "rtfx": 0.0, **latency,
    } | changes  # fmt: skip


def write(path, *results):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(json.dumps(each) for each in results))
    return path


def legs_of(*places):
    """(name, repetition) of every leg that the places give, and what the summary warns of."""
    found = run_files.collect(list(places))
    summary = summarise(list(found.records.values()), found.notes)
    return {group.name: len(group.legs) for group in summary.groups}, list(summary.warnings)


def test_results_of_vllm_bench_serve_are_read(tmp_path):
    path = write(tmp_path / "openai-infqps-pocket.json", serve_result())
    record = run_files.load(path)
    (leg,) = record.legs
    assert (leg.name, leg.model, leg.kind, leg.compressed) == (path.stem, "pocket", None, None)
    assert leg.retention_asked is None
    assert (leg.load.mode, leg.load.concurrency, leg.load.request_rate) == ("closed", 4, None)
    for key in Metrics.model_fields:
        expected = None if key == "max_concurrent_requests" else serve_result().get(key)  # all that touched a second
        assert getattr(leg.metrics, key) == expected, key
    first, second = leg.requests
    assert (first.ttft_ms, first.e2el_ms, first.itl_ms, first.start_s) == (250.0, 280.0, [10.0, 20.0], 0.5)
    assert (second.error, second.ttft_ms, second.e2el_ms, second.itl_ms) == ("503", None, None, None)
    assert "/srv" not in run_files.to_bytes(record).decode()


def test_what_the_tool_cannot_know_comes_from_its_metadata(tmp_path):
    metadata = {"leg": "0.5", "retention": "0.5", "kind": "local", "dtype": "float32"}
    path = write(tmp_path / "result.json", serve_result(request_rate=3.5, **metadata))
    (leg,) = run_files.load(path).legs
    assert (leg.name, leg.kind, leg.retention_asked) == ("0.5", "local", 0.5)
    assert (leg.compressed, leg.dtype, leg.load.mode, leg.load.request_rate) == (True, "float32", "open", 3.5)
    write(path, serve_result(retention="half"))
    with pytest.raises(InputError, match="half"):
        run_files.load(path)


def test_appended_results_are_repetitions(tmp_path):
    path = write(tmp_path / "result.json", *(serve_result(label="a", duration=each) for each in (1, 2)))
    legs = run_files.load(path).legs
    assert [(leg.name, leg.repetition, leg.metrics.duration) for leg in legs] == [("a", 0, 1), ("a", 1, 2)]
    with path.open("a") as stream:
        stream.write('\n{"duration": 3')
    with pytest.raises(InputError, match="line 3 is not JSON"):
        run_files.load(path)


def test_files_of_one_name_in_two_folders_are_two_legs(tmp_path):
    for folder, speed in (("baseline", 200.0), ("trimmed", 320.0)):
        write(tmp_path / folder / "result.json", serve_result(output_throughput=speed))
    for places in ([tmp_path], [tmp_path / "baseline" / "result.json", tmp_path / "trimmed" / "result.json"]):
        found = run_files.collect(places)
        row = summarise(list(found.records.values())).against_baseline.row("output_throughput")
        assert {name: value.value for name, value in row.values.items()} == {"baseline": 200.0, "trimmed": 320.0}
        page = html.render(summarise(list(found.records.values())))
        assert str(tmp_path) not in page
        assert tmp_path.name not in page


def test_a_file_given_twice_is_read_once(tmp_path):
    path = write(tmp_path / "a" / "result.json", serve_result())
    link = tmp_path / "link.json"
    link.symlink_to(path)
    found = run_files.collect([path, tmp_path, tmp_path / "a" / ".." / "a" / "result.json", link])
    assert list(found.records) == [path]


def test_copies_under_other_names_are_said(tmp_path):
    for name in ("a", "b"):
        write(tmp_path / f"{name}.json", serve_result())
    legs, warnings = legs_of(tmp_path)
    assert legs == {"a": 1, "b": 1}
    assert "legs a and b have the same numbers: perhaps copies of one result" in warnings


def sweep(folder, *combinations, runs=2, **changes):
    """A folder as `vllm bench sweep serve` leaves it: for each server and load its runs, and a list of all of them."""
    for number, (server, load) in enumerate(combinations):
        parts = [
            "SERVE-",
            *(f"-{k}={v}" for k, v in server.items()),
            "-BENCH-",
            *(f"-{k}={v}" for k, v in load.items()),
        ]
        place = folder / "".join(parts)
        rows = [
            serve_result(**changes, **server, **load, run_number=run, duration=10.0 * number + run + 1)
            for run in range(runs)
        ]
        for run, row in enumerate(rows):
            write(place / f"run={run}.json", row)
        (place / "summary.json").write_text(json.dumps(rows))
        write(place / "warmup.json", serve_result(**changes, **server, **load, run_number=-1))
    return folder


def test_a_sweep_is_a_leg_for_each_server_and_load_with_its_runs_as_repetitions(tmp_path):
    sweep(tmp_path, ({"max_num_seqs": 4}, {"max_concurrency": 2}), ({"max_num_seqs": 8}, {"max_concurrency": 2}))
    assert legs_of(tmp_path)[0] == {"max_num_seqs=4": 2, "max_num_seqs=8": 2}
    assert run_files.collect([tmp_path]).others == []


def test_loads_labels_and_run_numbers_of_a_sweep_tell_legs_apart_or_not_as_they_should(tmp_path):
    sweep(tmp_path / "a", ({}, {"max_concurrency": 2, "label": "x"}), ({}, {"max_concurrency": 4, "label": "x"}))
    assert legs_of(tmp_path / "a")[0] == {"max_concurrency=2": 2, "max_concurrency=4": 2}
    sweep(tmp_path / "b", ({}, {"label": "x"}), ({}, {"label": "y"}), runs=3)
    assert legs_of(tmp_path / "b")[0] == {"label=x": 3, "label=y": 3}


def test_two_sweeps_of_the_same_settings_stay_apart(tmp_path):
    for name in ("stock", "trimmed"):
        sweep(tmp_path / name, ({"max_num_seqs": 4}, {}), ({"max_num_seqs": 8}, {}), output_throughput=len(name) * 1.0)
    legs, _ = legs_of(tmp_path)
    assert legs == {
        f"{name}/max_num_seqs={size}": 2 for name in ("stock", "trimmed") for size in (4, 8)
    }  # fmt: skip


def test_a_summary_alone_is_read_and_a_failed_run_is_a_failed_repetition(tmp_path):
    place = next(sweep(tmp_path, ({"max_num_seqs": 4}, {})).iterdir())
    (place / "run=1.json").unlink()
    note = {"run_number": 1, "error_type": "CalledProcessError", "error": "Command '/home/x/vllm' died",
            "serve_overrides": {"max_num_seqs": 4}, "bench_overrides": {}}  # fmt: skip
    write(place / "run=1.failure.json", note)
    found = run_files.collect([tmp_path])
    summary = summarise(list(found.records.values()), found.notes)
    (group,) = summary.groups
    assert (len(group.legs), len(group.failed)) == (1, 1)
    assert any("repetition 2, failed: vllm bench sweep serve: CalledProcessError" in w for w in summary.warnings)
    assert "/home/x" not in html.render(summary)
    for path in place.glob("run=*"):
        path.unlink()
    assert list(legs_of(tmp_path)[0].values()) == [2]


def test_one_name_over_several_files_is_one_leg_and_said_with_what_is_mixed(tmp_path):
    write(tmp_path / "a.json", serve_result(leg="base", max_num_seqs=4, duration=1.0))
    write(tmp_path / "deep" / "b.json", serve_result(leg="base", max_num_seqs=8, max_concurrency=9, duration=2.0))
    legs, warnings = legs_of(tmp_path)
    assert legs == {"base": 2}
    assert "leg base is in 2 files, which call it so themselves: they count as its repetitions" in warnings
    assert "leg base mixes settings, max_num_seqs: 4; 8" in warnings
    (mixed,) = [each for each in warnings if each.startswith("repetitions of base are not alike, their loads differ")]
    assert "4 in flight" in mixed
    assert "9 in flight" in mixed


paths = st.lists(st.sampled_from(["a", "b", "run=0", "result", "x y", "é"]), min_size=1, max_size=4).map("/".join)


@given(st.lists(st.tuples(paths, st.sampled_from([".json", ".jsonl", ""])), min_size=1, max_size=8, unique=True))
def test_names_are_as_many_as_paths_and_hold_nothing_that_all_paths_share(found):
    places = [Place(Path("/machine/of mine") / f"{path}{ending}") for path, ending in found]
    names = leg_names(places)
    assert len(set(names.values())) == len({place.path for place in places})
    for name in names.values():
        assert 1 <= len(name) <= 200
        assert name.isprintable()
        assert "machine" not in name


def test_names_of_settings_stay_short_and_complete():
    folders = [Place(Path(f"/m/{n}"), {"rate": n, "long": "x" * 300 if n else None}) for n in range(3)]
    assert list(leg_names(folders).values()) == ["0", "1", "2"]
    folders = [Place(Path(f"/m/{n}"), {"rate": n or None, "same": 1}) for n in range(2)]
    assert list(leg_names(folders).values()) == ["rate=unset", "rate=1"]
    alike = [Place(Path(f"/m/{n}"), {"rate": 1}) for n in "ab"]
    assert list(leg_names(alike).values()) == ["a", "b"]


def load_words(leg):
    load = leg.load
    return load.mode, load.concurrency, load.requests, load.streaming, load.warmup_requests


def test_a_real_file_of_guidellm(tmp_path):
    record = run_files.load(RESULTS / "guidellm-0.8.1.json")
    (leg,) = record.legs
    assert tool_of(record) == "guidellm 0.8.1"
    assert load_words(leg) == ("closed", 4, 12, True, 0)
    assert record.experiment.settings["ignore_eos"] is True  # read from the request that was sent
    found = leg.metrics
    assert (found.completed, found.failed, found.total_input_tokens, found.total_output_tokens) == (12, 0, 2400, 288)
    assert found.output_throughput == pytest.approx(288 / found.duration)
    assert found.request_throughput == pytest.approx(12 / found.duration)
    assert found.total_token_throughput == pytest.approx(2688 / found.duration)
    assert found.mean_e2el_ms == pytest.approx(2144.646, abs=0.001)  # the file has seconds
    assert found.mean_tpot_ms == pytest.approx(64.879, abs=0.001)  # not the 88.7 that count the first token in
    assert (found.median_itl_ms, found.max_concurrent_requests) == (None, None)
    first = leg.requests[0]
    assert first.e2el_ms == pytest.approx(first.ttft_ms + 23 * first.tpot_ms, rel=1e-3)
    # several strategies in one file are several legs
    raw = json.loads((RESULTS / "guidellm-0.8.1.json").read_text())
    other = copy.deepcopy(raw["benchmarks"][0])
    other["config"]["strategy"] = {"type_": "poisson", "rate": 2.5, "max_concurrency": None}
    raw["benchmarks"].append(other)
    legs = run_files.load(write(tmp_path / "g.json", raw)).legs
    assert [leg.name for leg in legs] == ["g concurrent 4", "g poisson 2.5"]
    assert (legs[1].load.mode, legs[1].load.request_rate, legs[1].load.burstiness) == ("open", 2.5, 1.0)
    raw["metadata"]["version"] = 3
    with pytest.raises(InputError, match="version 3 of guidellm's reports; this kvprofile reads 2"):
        run_files.load(write(tmp_path / "g.json", raw))


def test_a_real_file_of_aiperf(tmp_path):
    source = RESULTS / "aiperf-0.13.0.json"
    record = run_files.load(source)
    (leg,) = record.legs
    assert tool_of(record) == "aiperf 0.13.0"
    assert load_words(leg) == ("closed", 4, 12, True, 2)
    found = leg.metrics
    assert (found.completed, found.failed, found.total_input_tokens, found.total_output_tokens) == (12, 0, 2400, 311)
    assert found.output_throughput == pytest.approx(found.request_throughput * 311 / 12)  # not over its duration
    assert found.mean_e2el_ms == pytest.approx(2001.115, abs=0.001)
    assert found.mean_tpot_ms == pytest.approx(58.2165, abs=0.001)
    assert found.mean_itl_ms == pytest.approx(65.36, abs=0.001)
    assert found.max_concurrent_requests == 4
    (warning,) = leg.warnings
    assert "311, where the server reports 288" in warning
    # a unit is read, not assumed
    raw = json.loads(source.read_text())
    raw["request_latency"] |= {"unit": "sec", "avg": 2.0}
    assert run_files.load(write(tmp_path / "a.json", raw)).legs[0].metrics.mean_e2el_ms == 2000
    raw["request_latency"]["unit"] = "fortnights"
    with pytest.raises(InputError, match="request_latency is in 'fortnights'"):
        run_files.load(write(tmp_path / "a.json", raw))


def test_a_folder_of_aiperf_is_a_leg_for_each_run_and_its_phases_are_none(tmp_path):
    raw = json.loads((RESULTS / "aiperf-0.13.0.json").read_text())
    for name in ("stock", "trimmed"):
        for trial in range(2):
            place = tmp_path / name / "profile_runs" / f"run_{trial + 1:04d}"
            changed = raw | {"run_info": {"trial": trial}, "benchmark_duration": {"unit": "sec", "avg": 6.0 + trial}}
            for part in ("", "phases/warmup", "phases/profiling"):
                write(place / part / "profile_export_aiperf.json", changed)
            (place / "profile_export.jsonl").write_text('{"metadata": {}}\n')
    legs, warnings = legs_of(tmp_path)
    assert legs == {"stock": 2, "trimmed": 2}
    assert any("have the same numbers" in each for each in warnings)


def test_a_real_file_of_sglang(tmp_path):
    source = RESULTS / "sglang-0.5.23.jsonl"
    record = run_files.load(source)
    (leg,) = record.legs
    assert tool_of(record) == "sglang.bench_serving"
    assert load_words(leg) == ("closed", 4, 12, None, None)
    assert (leg.name, leg.model) == ("sglang-0.5.23", "unknown")
    found = leg.metrics
    assert (found.completed, found.failed, found.total_input_tokens, found.total_output_tokens) == (12, 0, 2400, 288)
    assert found.output_throughput == pytest.approx(288 / found.duration)
    assert found.mean_e2el_ms == pytest.approx(1524.023, abs=0.001)
    assert "288; the client's tokenizer finds 223" in leg.warnings[0]
    assert found.max_concurrent_requests is None  # the file's 8 are all that touched one second, of 4 in flight
    assert leg.requests[0].ttft_ms == pytest.approx(207.263, abs=0.001)
    # lines of one load are repetitions, of another load another leg
    raw = json.loads(source.read_text())
    lines = [raw, raw | {"duration": 5.0}, raw | {"max_concurrency": 8}]
    legs = run_files.load(write(tmp_path / "s.jsonl", *lines)).legs
    assert [leg.repetition for leg in legs] == [0, 1, 0]
    assert legs[0].name == legs[1].name != legs[2].name
    assert run_files.collect([tmp_path]).records  # .jsonl files of a folder are looked into


def test_a_folder_may_hold_lines_of_something_else(tmp_path):
    write(tmp_path / "r.json", serve_result())
    (tmp_path / "log.jsonl").write_text('{"a": 1}\nnot json\n')
    (tmp_path / "noise.jsonl").write_bytes(b"\xff\x00")
    assert len(run_files.collect([tmp_path]).records) == 1


def test_a_real_sweep_and_a_real_detailed_file_of_vllm():
    legs, _ = legs_of(RESULTS / "vllm-sweep-0.32.0")
    assert legs == {"max_num_seqs=2": 2, "max_num_seqs=8": 2}
    (leg,) = run_files.load(RESULTS / "vllm-0.32.0-detailed.json").legs
    found = leg.metrics
    assert found.output_throughput == pytest.approx(found.total_output_tokens / found.duration)
    assert [request.error for request in leg.requests] == [None] * 4
    assert sum(request.output_tokens for request in leg.requests) == found.total_output_tokens
    assert found.mean_ttft_ms == pytest.approx(sum(request.ttft_ms for request in leg.requests) / 4)


NOTHING = {
    "vllm bench serve 0.32": json.loads((RESULTS / "vllm-0.32.0-all-failed.json").read_text()),
    "vllm bench serve": serve_result(
        completed=0, failed=2, total_input_tokens=0, total_output_tokens=0, request_throughput=0.0,
        output_throughput=0.0, total_token_throughput=0.0, errors=["503", "503"], itls=[[], []],
        ttfts=[0.0, 0.0], latencies=[0.0, 0.0], output_lens=[0, 0],
        **{f"{kind}_{name}_ms": 0.0 for kind in ("mean", "median", "p99") for name in LATENCIES},
    ),
    # numpy's mean of nothing is NaN, which Python writes as such
    "sglang.bench_serving": json.loads((RESULTS / "sglang-0.5.23.jsonl").read_text()) | {
        "completed": 0, "errors": ["503"] * 12, "output_throughput": 0.0, "request_throughput": 0.0,
        "total_throughput": 0.0, "total_input_tokens": 0, "total_output_tokens": 0,
        **{f"{kind}_{name}_ms": math.nan if name == "e2e_latency" else 0.0
           for kind in ("mean", "median", "p99") for name in ("ttft", "tpot", "itl", "e2e_latency")},
    },
    "guidellm": json.loads((RESULTS / "guidellm-0.8.1-all-failed.json").read_text()),
    "aiperf": {
        "schema_version": "1.4", "aiperf_version": "0.13.0", "run_info": {"trial": 0},
        "error_request_count": {"unit": "requests", "avg": 4.0}, "request_latency": {"unit": "ms", "avg": 0.0},
        "output_token_throughput": {"unit": "tokens/sec", "avg": 0.0}, "total_osl": {"unit": "tokens", "avg": 0.0},
    },
}  # fmt: skip


@pytest.mark.parametrize("tool", NOTHING)
def test_where_all_requests_failed_everything_but_the_count_is_a_dash(tmp_path, tool):
    (leg,) = run_files.load(write(tmp_path / "failed.json", NOTHING[tool])).legs
    assert leg.metrics.completed == 0
    assert leg.metrics.failed > 0
    known = {figure.key: figure.of(leg) for figure in figures() if figure.of(leg) is not None}
    assert set(known) <= {"duration", "completed", "failed"}
    good = write(tmp_path / "good.json", serve_result())
    found = run_files.collect([good, tmp_path / "failed.json"])
    summary = summarise(list(found.records.values()), found.notes)
    assert any(f"{leg.metrics.failed} of {leg.metrics.failed} requests failed" in each for each in summary.warnings)
    (other,) = [group.name for group in summary.groups if group.name.endswith("failed")]
    for row in summary.against_baseline.rows:
        if row.section in (SPEED, LATENCY):
            assert row.values[other].value is None
            assert row.differences.get(other) is None or row.differences[other].value is None


@given(st.sampled_from(figures()), st.floats(0, 1e6), st.integers(0, 5))
def test_no_figure_of_speed_is_zero_for_a_leg_without_an_answer(figure, value, failed):
    (leg,) = run_files.load(RESULTS / "aiperf-0.13.0.json").legs
    numbers = {key: value for key in Metrics.model_fields if key not in ("completed", "failed")}
    counts = {key: int(value) for key in ("total_input_tokens", "total_output_tokens")}
    unanswered = leg.model_copy(
        update={"metrics": Metrics.model_validate(numbers | counts | {"completed": 0, "failed": failed})}
    )
    if figure.key not in ("duration", "completed", "failed"):
        assert figure.of(unanswered) is None


odd = st.one_of(
    st.none(), st.booleans(), st.integers(-(2**63), 2**64 - 1), st.floats(-1e99, 1e99),
    st.sampled_from([math.nan, math.inf, 0, -1, "", "inf", "\x00\u202e", "x" * 5000, [], {}, [[]], [None], {"a": {}}]),
    st.text(max_size=5),
)  # fmt: skip


def ways_into(raw, way=()):
    """Every place in nested JSON."""
    yield way
    items = raw.items() if isinstance(raw, dict) else enumerate(raw) if isinstance(raw, list) else ()
    for key, value in items:
        yield from ways_into(value, (*way, key))


def changed(raw, way, value, *, gone):
    raw = copy.deepcopy(raw)
    inner = raw
    for key in way[:-1]:
        inner = inner[key]
    if not way:
        return value
    if gone:
        del inner[way[-1]]
    else:
        inner[way[-1]] = value
    return raw


KINDS = {path.name: json.loads(path.read_text()) for path in FILES} | {
    "vllm-detailed.json": serve_result(),
    "vllm-sweep.json": [serve_result(run_number=0, max_num_seqs=4)],
    "vllm-failure.json": {
        "run_number": 1,
        "error_type": "E",
        "error": "e",
        "serve_overrides": {},
        "bench_overrides": {},
    },
}
WAYS = {name: list(ways_into(raw)) for name, raw in KINDS.items()}


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(data=st.data())
def test_odd_values_are_a_dash_or_one_line_and_never_a_traceback(kind, data, tmp_path):
    raw = KINDS[kind]
    for _ in range(data.draw(st.integers(1, 3))):
        raw = changed(
            raw, data.draw(st.sampled_from(list(ways_into(raw)) or [()])), data.draw(odd), gone=data.draw(st.booleans())
        )
        if not isinstance(raw, (dict, list)):
            break
    path = tmp_path / kind
    path.write_text(json.dumps(raw))
    found, refused = None, ""
    try:
        found = run_files.collect([path])
    except InputError as error:
        refused = str(error)
    if found is None:
        assert refused.startswith(str(path))
        assert len(refused.splitlines()) == 1
        return
    summary = summarise(list(found.records.values()), found.notes)
    assert html.render(summary)
    json.dumps(summary.document(), allow_nan=False)
    for row in summary.against_baseline.rows:
        if row.section in (SPEED, LATENCY):
            assert 0 not in [value.value for value in row.values.values()]
