"""kvprofile show."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kvprofile.budget import store
from kvprofile.cli import heatmap
from tests.helpers.commands import NO_SCORES, refused, save, save_without_scores, shown
from tests.helpers.factories import make_graded, make_profile

pytestmark = pytest.mark.usefixtures("workplace")


@pytest.mark.parametrize("shape", [(6, 4), (28, 4), (36, 8), (48, 8), (32, 32), (80, 8), (126, 8)])
@pytest.mark.parametrize("imported", [False, True])
def test_show_fits_80_columns(capsys, shape, imported):
    save("a.json", layers=shape[0], kv_heads=shape[1], imported=imported, query_groups=5)
    out = shown(capsys, "show", "a.json", "--retention", "0.6")
    assert max(len(line) for line in out.splitlines()) <= 80
    assert ("imported from https://github.com/snu-mllab/KVzip, not verified against weights" in out) == imported


def test_show_previews_a_retention_without_writing(capsys):
    path = save("a.json", layers=4, kv_heads=4)
    before = path.read_bytes()
    out = shown(capsys, "show", "a.json", "--retention", "0.6")
    assert "10 of 16 heads keep the whole context (retention 0.625)" in out
    assert "preview, ranked now by max" in out
    assert "128 sinks + last 256 tokens" in out
    assert "stored in the file" in shown(capsys, "show", "a.json")
    assert path.read_bytes() == before
    assert list(Path().iterdir()) == [path]


def test_show_draws_another_statistic(capsys):
    mean = [[0.001 * (layer + head) for head in range(4)] for layer in range(6)]
    save("a.json", mean=mean)
    out = shown(capsys, "show", "a.json", "--statistic", "mean")
    assert "score (mean) from 0 to 0.008" in out
    assert "preview, ranked now by mean" in out
    document = json.loads(shown(capsys, "show", "a.json", "--statistic", "mean", "--json"))
    assert document["scores"] == mean
    assert document["statistic"] == "mean"
    assert "has no statistic p99; it has max, mean" in refused(capsys, "show", "a.json", "--statistic", "p99")
    assert "median" in refused(capsys, "show", "a.json", "--statistic", "median")


def test_show_json_is_one_document(capsys):
    save("a.json", sliding=(0,))
    document = json.loads(shown(capsys, "show", "a.json", "--retention", "0.5", "--json"))
    assert document["retention_realised"] == 0.5
    assert document["heads"][0] == [None] * 4
    assert document["sink_tokens"] == 128


def test_show_says_where_equal_scores_are_cut(capsys):
    save("a.json", layers=2, kv_heads=2, scores=[[0.9, 0.4], [0.4, 0.1]])
    out = shown(capsys, "show", "a.json", "--retention", "0.5")
    assert "the cut falls among 2 equal scores" in out
    assert "equal scores" not in shown(capsys, "show", "a.json", "--retention", "0.75")
    document = json.loads(shown(capsys, "show", "a.json", "--retention", "0.5", "--json"))
    assert document["heads_tied_at_the_cut"] == 2
    assert document["heads"] == [[1.0, 1.0], [0.0, 0.0]]


@pytest.mark.parametrize("retention", ["0", "1.5", "-0.1", "nan", "half"])
def test_show_refuses_what_is_not_a_retention(capsys, retention):
    save("a.json")
    refused(capsys, "show", "a.json", "--retention", retention)


def test_show_names_what_is_missing(capsys):
    assert "kvprofile score no/model" in refused(capsys, "show", "no/model")


def test_show_finds_a_model_by_name_and_marks_sliding_layers(capsys):
    save(str(store.BUDGET_DIR / store.file_name("org/name")), name="org/name", sliding=(1,))
    assert heatmap.BLANK_NOTE in shown(capsys, "show", "org/name")


pytestmark = pytest.mark.usefixtures("workplace")


def test_show_of_a_runtime_file_keeps_to_what_it_states(capsys):
    save_without_scores("v.json")
    for arguments in ((), ("--retention", "0.4")):
        out = shown(capsys, "show", "v.json", *arguments)
        assert "10 of 24 heads keep the whole context (retention 0.417)\nstored in the file" in out
        assert "no scores" in out
    assert json.loads(shown(capsys, "show", "v.json", "--json"))["scores"] is None
    assert NO_SCORES in refused(capsys, "show", "v.json", "--retention", "0.2")
    assert "--retention" in refused(capsys, "show", "v.json", "--retention", "nan")


def test_graded_heads_are_shown_by_default_where_there_is_a_probe(capsys):
    store.save(make_graded(), Path("graded.json"))
    out = shown(capsys, "show", "graded.json", "--retention", "0.3")
    assert "heads keep 30.0% of what lies between sinks and window, in 4 classes" in out
    assert "R2 on other documents 0.50" in " ".join(out.split())
    document = json.loads(shown(capsys, "show", "graded.json", "--retention", "0.3", "--json"))
    assert (document["kind"], len(document["probe"]["r2"])) == ("graded", 6)
    assert "heads keep the whole context" in shown(capsys, "show", "graded.json", "--kind", "whole")
    store.save(make_profile(), Path("whole.json"))
    assert "which need a probe" in refused(capsys, "show", "whole.json", "--kind", "graded")
