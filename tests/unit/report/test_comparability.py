"""What makes legs doubtful to compare, where results of several tools and kvprofile's own records meet on one page."""

from __future__ import annotations

import re

import pytest

from kvprofile.records import run_files
from kvprofile.records.record import Load
from kvprofile.report import html
from kvprofile.report.comparability import warnings_about
from kvprofile.report.compare import summarise
from tests.helpers.made_up import make_leg, make_record
from tests.helpers.models import ROOT

RESULTS = ROOT / "tests" / "data" / "results"
OWN = ROOT / "tests" / "data" / "run-record-v1.json"


def summary_of(*names):
    found = run_files.collect([*(RESULTS / name for name in names), OWN])
    return summarise(list(found.records.values()), found.notes)


@pytest.fixture(scope="module")
def mixed():
    """Stock vLLM measured by two tools, next to a record of kvprofile's own."""
    return summary_of("guidellm-0.8.1.json", "aiperf-0.13.0.json")


def test_two_tools_next_to_an_own_record_are_one_page_with_the_doubts_first(mixed):
    page = html.render(mixed)
    text = re.sub(r"<[^>]+>", " ", page.split("</style>")[1])
    first_number = text.index("Output throughput")
    for words in (
        "measured by different tools",
        "output tokens are counted by the client&#39;s tokenizer: 311, where the server reports 288",
        "endpoints differ",
        "data sets differ",
        "output lengths differ",
        "input lengths differ",
    ):
        assert 0 <= text.index(words) < first_number, words
    assert [group.name for group in mixed.groups] == ["baseline", "0.5", "guidellm-0.8.1", "aiperf-0.13.0", "remote"]
    for name in ("guidellm-0.8.1", "aiperf-0.13.0", "baseline"):
        assert name in text


def test_each_tools_doubts_are_named(mixed):
    lines = mixed.warnings
    assert lines[1].endswith(
        "guidellm 0.8.1: guidellm-0.8.1; aiperf 0.13.0: aiperf-0.13.0; kvprofile bench: baseline, 0.5, remote"
    )
    assert (
        "data sets differ: guidellm-0.8.1: synthetic_text; aiperf-0.13.0: synthetic; baseline, 0.5, remote: 3 documents"
        in lines
    )
    assert "ignore_eos settings of aiperf-0.13.0, baseline, 0.5, remote unknown" in lines
    (length,) = [each for each in lines if each.startswith("output lengths differ")]
    assert "guidellm-0.8.1 24, aiperf-0.13.0 26, baseline 96" in length
    assert len(lines) < 20


def test_what_the_file_of_one_tool_cannot_say_is_said_once():
    found = run_files.collect([RESULTS / "vllm-sweep-0.32.0"])
    lines = summarise(list(found.records.values()), found.notes).warnings
    assert not any("different tools" in each for each in lines)
    (unstated,) = [each for each in lines if each.startswith("not stated by any tool")]
    for words in ("data sets", "ignore_eos", "warm-up"):
        assert words in unstated
    assert "streaming" not in unstated  # this tool always streams


def test_own_records_alone_hear_nothing_of_tools():
    records = [run_files.load(OWN)]
    assert not any(word in each for each in summarise(records).warnings for word in ("tool", "endpoint", "ignore_eos"))
    # as the version that first wrote this record drew it
    assert summarise(records).warnings == (
        "made-up numbers: these records were invented for a test or a preview and measure nothing",
        "remote answers with another model, kimi-made-up: speed and answers are that model's",
        "one repetition of each leg: differences in speed and memory have no intervals",
    )


def test_repetitions_that_were_not_run_alike_are_said():
    legs = [
        make_leg("baseline", 0),
        make_leg("baseline", 1, load=Load(mode="closed", concurrency=16), dtype="float16"),
        make_leg("0.5", 0),
    ]
    found = warnings_about([make_record(1)], {"baseline": legs[:2], "0.5": legs[2:]})
    alike = [each for each in found if each.startswith("repetitions of ")]
    assert len(alike) == 2
    assert "repetitions of baseline are not alike, their dtypes differ: bfloat16; float16" in alike
    assert any("their loads differ" in each and "16 in flight" in each for each in alike)


def test_unknowns_of_the_same_legs_are_one_line():
    legs = {
        name: [make_leg(name, dtype=None, engine=None)] if name == "0.5" else [make_leg(name)]
        for name in ("baseline", "0.5")
    }
    found = warnings_about([make_record(1)], legs)
    assert "dtypes, engines of 0.5 unknown" in found


def test_lengths_within_a_twentieth_are_one_length():
    found = run_files.load(RESULTS / "guidellm-0.8.1.json")
    leg = found.legs[0]

    def lines(tokens):
        other = leg.model_copy(
            update={"name": "b", "metrics": leg.metrics.model_copy(update={"total_output_tokens": tokens})}
        )
        records = [found.model_copy(update={"legs": [leg, other]})]
        return [each for each in summarise(records).warnings if "lengths differ" in each]

    assert lines(round(288 * 1.04)) == []
    assert lines(None) == []
    assert lines(round(288 * 1.06)) == ["output lengths differ, mean tokens of a request: guidellm-0.8.1 24, b 25"]
