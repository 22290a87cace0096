"""The page as text: escaping, its policy, words for numbers, places on charts. Chromium opens it in tests/browser."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from typing import get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvprofile.cli import run
from kvprofile.records import run_files
from kvprofile.records.record import Leg, Load, Metrics, Request, Sample, Verdict
from kvprofile.report import html
from kvprofile.report.charts import HEIGHT, WIDTH, charts, nice_ticks, thinned
from kvprofile.report.compare import summarise
from kvprofile.report.page import cards, provenance
from kvprofile.report.wording import Scale, difference, number, scale_for, verdict, visible
from kvprofile.statistics import Estimate
from tests.helpers.made_up import make_leg, make_record


@pytest.fixture(scope="module")
def record():
    return make_record()


def test_the_page_is_one_file_of_stable_bytes(record, tmp_path):
    page = html.render(summarise([record]))
    html.write(summarise([record]), tmp_path / "page.html")
    assert (tmp_path / "page.html").read_text(encoding="utf-8") == page
    for attribute in ("src", "srcset", "action", "xlink:href", "style", "onclick", "onload"):
        assert f" {attribute}=" not in page
    assert not re.search(r'href="(?!#|data:,")', page)
    assert "<script" not in page
    assert "@import" not in page
    assert "url(" not in page


def test_the_policy_allows_the_pages_own_style_and_nothing_else(record):
    page = html.render(summarise([record]))
    css = re.search(r"<style>(.*?)</style>", page, re.DOTALL)[1]
    digest = base64.b64encode(hashlib.sha256(css.encode()).digest()).decode()
    assert f"default-src 'none'; style-src 'sha256-{digest}'; img-src data:;" in page


def test_text_of_models_and_people_is_escaped():
    evil = "</pre><script>alert(1)</script><img src=x onerror=alert(1)>{{ 7*7 }}\u202e\x00\x1b]0;x\x07"
    leg = make_leg(
        "baseline", documents=[], requests=[Request(document="d", question=evil, output=evil, expected=evil)]
    )
    page = html.render(summarise([make_record(1).model_copy(update={"legs": [leg]})]))
    assert "<script>" not in page
    assert "<img" not in page
    assert page.count("{{ 7*7 }}") >= 3
    assert "&lt;script&gt;" in page
    for character in "\u202e\x00\x1b\x07":
        assert character not in page
    assert "⟨U+202E⟩␀␛]0;x␇" in page


def test_very_long_text_is_shown_in_part():
    leg = make_leg("baseline", documents=[], requests=[Request(question="q", output="x" * 100_000)])
    page = html.render(summarise([make_record(1).model_copy(update={"legs": [leg]})]))
    assert "80,000 more characters are in the record" in page
    assert len(page) < 200_000


def test_provenance_says_once_what_legs_share_and_leaves_out_what_none_has(record):
    (found,) = provenance(summarise([record]))
    shared = dict(found["shared"])
    assert shared["load"] == "closed"
    assert shared["temperature"] == "0"
    assert found["columns"][:3] == ["leg", "repetition", "status"]
    assert {"model", "pool", "bound"} <= set(found["columns"])
    assert "requests/s" not in {*shared, *found["columns"]}
    assert [row[0] for row in found["rows"]] == [leg.name for leg in record.legs]
    (alone,) = provenance(summarise([make_record(1, legs=("0.5",))]))
    assert alone["columns"] == ["leg", "repetition", "status"]
    assert dict(alone["shared"])["model"] == "Qwen/Made-Up-14B"


def test_a_page_of_failures_has_no_tables_of_numbers():
    legs = [make_leg(name, status="failed", reason="no <memory>") for name in ("baseline", "0.5")]
    page = html.render(summarise([make_record(1).model_copy(update={"legs": legs})]))
    assert "No leg finished" in page
    assert "no &lt;memory&gt;" in page


@given(st.text(st.characters(codec=None), max_size=60))
def test_visible_text_commands_nothing(text):
    shown = visible(text)
    assert not set(shown) & {chr(code) for code in range(0x20) if chr(code) not in "\n\t"}
    assert not any(character in shown for character in "\x7f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
    shown.encode()


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"), (7, "7"), (12345, "12,345"), (12345.678, "12,346"), (612.34, "612"), (61.25, "61.2"), (6.1, "6.10"),
        (0.0613, "0.0613"), (0.00000001, "0.000000"), (-3.25, "\N{MINUS SIGN}3.25"), (25.0, "25"), (99.96, "100.0"),
    ],
)  # fmt: skip
def test_numbers(value, text):
    assert number(value) == text


def test_scales_say_the_unit_once():
    assert scale_for("bytes", [3 * 2**30, 5]) == Scale("GiB", 2**30)
    assert scale_for("bytes", [None, 900]).text(900) == "900"
    assert scale_for("share", [0.5]).text(0.963) == "96.3 %"
    assert scale_for("money", [1.0], "USD").unit == "USD"
    assert Scale("ms").text(None) == "\N{EN DASH}"


@pytest.mark.parametrize(
    ("estimate", "unit", "relative", "words"),
    [
        (Estimate(0.182, 0.121, 0.247), "ms", True, ("+18.2 %", "+12.1 to +24.7")),
        (Estimate(-0.037, -0.3, 0.24), "share", False, ("\N{MINUS SIGN}3.7 pts", "\N{MINUS SIGN}30.0 to +24.0")),
        (Estimate(2.0, None, None), "count", False, ("+2", "")),
        (Estimate(0.0, -1e-9, 1e-9), "ms", True, ("0.0 %", "0.0 to 0.0")),
        (Estimate(None, None, None), "ms", True, ("", "")),
    ],
)
def test_differences(estimate, unit, relative, words):
    assert difference(estimate, scale_for(unit, [1.0]), relative=relative) == words


def test_a_difference_is_called_better_only_where_its_whole_interval_is():
    assert verdict(Estimate(0.2, 0.1, 0.3), 1) == "better"
    assert verdict(Estimate(0.2, 0.1, 0.3), -1) == "worse"
    assert verdict(Estimate(-0.2, -0.3, -0.1), -1) == "better"
    assert verdict(Estimate(0.2, -0.1, 0.3), 1) == ""
    assert verdict(Estimate(0.2, None, None), 1) == ""
    assert verdict(Estimate(0.2, 0.1, 0.3), 0) == ""


@given(st.floats(-1e9, 1e9), st.floats(1e-6, 1e9))
def test_ticks_are_round_and_enclose(low, span):
    ticks = nice_ticks(low, low + span)
    assert 2 <= len(ticks) <= 8
    slack = 1e-6 * (abs(low) + span)
    assert ticks[0] <= low + slack
    assert ticks[-1] >= low + span - slack


def test_thinning_keeps_peaks_and_ends_in_order():
    points = [(float(i), 1.0 if i == 7777 else 0.0) for i in range(20_000)]
    found = thinned(points)
    assert len(found) <= 300
    assert (7777.0, 1.0) in found
    assert found == sorted(found)
    assert thinned(points[:10]) == points[:10]


def test_marks_stand_within_the_picture_and_in_order(record):
    found = {chart.key: chart for chart in charts(summarise([record]))}
    assert {"output_throughput", "median_ttft_ms", "pass_rate", "warnings", "reached", "eviction_ratio",
            "attention_mean_ms", "pool", "eviction", "device", "attention"} <= set(found)  # fmt: skip
    for chart in found.values():
        for series in chart.series:
            points = re.findall(r"(-?[\d.]+),(-?[\d.]+)", series.path)
            assert all(0 <= float(x) <= WIDTH and 0 <= float(y) <= HEIGHT for x, y in points)
            for mark in series.marks:
                assert 0 <= mark.x <= WIDTH
                assert 0 <= mark.y <= HEIGHT
        assert chart.table.rows
        assert chart.description
    marks = {series.name: series.marks[-1] for series in found["output_throughput"].series if series.marks}
    assert marks["0.5"].x < marks["0.7"].x < marks["0.9"].x < marks["baseline"].x
    assert marks["0.5"].y < marks["baseline"].y  # faster stands higher


def test_a_line_joins_legs_of_one_kind_of_heads_and_one_cache():
    heads = make_leg("0.5").heads
    shares = heads.model_copy(update={"budgets": [[0.5 for _ in row] for row in heads.budgets]})
    legs = [
        make_leg("baseline"), make_leg("0.7"), make_leg("0.5"),
        make_leg("0.5").model_copy(update={"name": "graded 0.5", "heads": shares}),
        make_leg("0.5").model_copy(update={"name": "0.5 fp8", "kv_cache_dtype": "fp8"}),
    ]  # fmt: skip
    chart = next(each for each in charts(summarise([make_record(1).model_copy(update={"legs": legs})]))
                 if each.key == "output_throughput")  # fmt: skip
    lines = [series.path for series in chart.series if series.style == "joined"]
    # baseline, 0.7 and 0.5; baseline and graded 0.5; nothing to join with fp8
    assert [line.count(",") for line in lines] == [3, 2]


def test_legs_without_retention_stand_side_by_side():
    legs = [make_leg(name, retention_asked=None, retention_realised=None, compressed=None) for name in ("0.9", "0.5")]
    summary = summarise([make_record(1).model_copy(update={"legs": legs})])
    chart = next(chart for chart in charts(summary) if chart.key == "output_throughput")
    assert [tick.text for tick in chart.x_ticks] == ["0.9", "0.5"]
    assert chart.x_label == ""


def test_the_command_writes_a_page_and_prints_what_it_shows(record, workplace, capsys):
    run_files.save(record, workplace / "runs" / "seed.json")
    (workplace / "runs" / "other.json").write_text("{}")
    assert run(["report", "runs", "--output", "page.html", "--json"]) == 0
    captured = capsys.readouterr()
    document = json.loads(captured.out)
    assert document["records"] == ["runs/seed.json"]
    assert document["warnings"] == list(summarise([record]).warnings)
    assert "skipped 1 JSON file" in captured.err
    assert (workplace / "page.html").read_text(encoding="utf-8") == html.render(summarise([record]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["absent.json"], "absent.json: cannot read: No such file or directory"),
        (["seed.json", "--output", "seed.json"], "--output seed.json is one of the run records"),
        (["seed.json", "--output", "folder"], "it is a folder"),
        (["folder"], "no run records in folder; run 'kvprofile bench' to make some"),
        (["old.json"], "old.json: schema_version of this run record is 0, this kvprofile reads 1"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(workplace, capsys, arguments, message):
    run_files.save(make_record(1, looks=1), workplace / "seed.json")
    before = (workplace / "seed.json").read_bytes()
    (workplace / "folder").mkdir()
    (workplace / "old.json").write_text('{"format": "kvprofile-run", "schema_version": 0}')
    assert run(["report", *arguments]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert len(captured.err.strip().splitlines()) == 1
    assert (workplace / "seed.json").read_bytes() == before
    assert not (workplace / "report.html").exists()


def test_links_in_a_circle_are_one_line(workplace, capsys):
    run_files.save(make_record(1), workplace / "seed.json")
    for name, target in (("a", "b"), ("b", "a")):
        (workplace / name).symlink_to(target)
    assert run(["report", "seed.json", "--output", "a"]) == 2
    assert run(["report", "a", "--output", "page.html"]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert ["cannot write a" in lines[0], "a: cannot read" in lines[1]] == [True, True]
    assert not (workplace / "page.html").exists()


def may_be_unknown(model, **needed):
    """Names of the fields of a model that may be null."""
    return [name for name, field in model.model_fields.items() if name not in needed and _takes_null(field.annotation)]


def _takes_null(annotation):
    return type(None) in get_args(annotation)


@pytest.mark.parametrize("name", may_be_unknown(Leg, reason=1))
def test_a_leg_may_not_know_something(name):
    legs = [make_leg(each, looks=2, **{name: None}) for each in ("baseline", "0.5")]
    assert html.render(summarise([make_record(1).model_copy(update={"legs": legs})]))


@settings(max_examples=25)
@given(st.sets(st.sampled_from([*may_be_unknown(Request), *may_be_unknown(Metrics), *may_be_unknown(Sample)])))
def test_numbers_may_be_unknown_anywhere(unknown):
    def without(part):
        return part.model_copy(update={name: None for name in type(part).model_fields if name in unknown})

    legs = [
        each.model_copy(
            update={
                "metrics": without(each.metrics),
                "requests": [without(request) for request in each.requests],
                "samples": [without(sample) for sample in each.samples],
            }
        )
        for each in BARE.legs
    ]
    summary = summarise([BARE.model_copy(update={"legs": legs})])
    assert html.render(summary)
    json.dumps(summary.document(), allow_nan=False)


BARE = make_record(1, legs=("baseline", "0.5", "remote"), looks=2)


def test_the_command_prints_the_cards(record, workplace, capsys):
    run_files.save(record, workplace / "seed.json")
    assert run(["report", "seed.json"]) == 0
    lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
    assert lines[1].split() == ["baseline", "0.9", "0.7", "0.5", "remote"]
    row = summarise([record]).against_baseline.row("output_throughput")
    (shown,) = [line for line in lines if line.startswith("Output throughput, tokens/s")]
    assert shown.split()[3:] == [number(value.value) for value in row.values.values()]
    assert max(map(len, lines)) <= 80


def test_agreement_is_a_number_beside_the_pass_rate():
    def request(question, passed, score):
        return Request(question=question, verdicts=[Verdict(name="agreement", passed=passed, score=score)])

    legs = [
        make_leg("baseline", documents=[], requests=[Request(question="a", output="x")]),
        make_leg("0.5", documents=[], requests=[request("a", True, 0.9), request("b", False, 0.2)]),
        make_leg("0.3", documents=[], requests=[Request(question="a", error="gone"), request("b", None, None)]),
    ]
    summary = summarise([make_record(1).model_copy(update={"legs": legs})])
    row = summary.against_baseline.row("agreement")
    assert row.values["0.5"].value == pytest.approx(0.55)
    assert row.values["0.3"].value == 0.0
    assert row.values["baseline"].value is None
    assert "agreement" in [card["key"] for card in cards(summary)]


def test_what_a_load_does_not_time_is_said_on_the_page():
    legs = [make_leg("baseline", load=Load(mode="closed", concurrency=4, description="decode steps alone"))]
    assert "closed, 4 in flight, decode steps alone" in html.render(
        summarise([make_record(1).model_copy(update={"legs": legs})])
    )
