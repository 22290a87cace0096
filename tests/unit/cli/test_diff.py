"""kvprofile diff."""

from __future__ import annotations

import json

import pytest

from tests.helpers.commands import NO_SCORES, refused, save, save_without_scores, shown

pytestmark = pytest.mark.usefixtures("workplace")


def test_diff_prints_warnings_first_and_the_changed_heads(capsys):
    save("a.json", layers=2, kv_heads=2, scores=[[0.9, 0.2], [0.7, 0.1]])
    save("b.json", layers=2, kv_heads=2, scores=[[0.3, 0.2], [0.7, 0.9]], method="loss")
    out = shown(capsys, "diff", "a.json", "b.json")
    assert out.startswith("warning: other method: kvzip and loss\n")
    assert "rank correlation (Spearman) of 4 heads: -0.400" in out
    assert "at retention 0.5: 2 heads change" in out
    assert "layer 0, KV head 0: full -> trimmed" in out
    assert "layer 1, KV head 1: trimmed -> full" in out


@pytest.mark.parametrize(
    ("shape", "side_by_side"), [((28, 4), True), ((36, 8), True), ((48, 8), False), ((80, 8), False)]
)
def test_diff_stacks_what_does_not_fit_80_columns(capsys, shape, side_by_side):
    save("a.json", layers=shape[0], kv_heads=shape[1])
    save("b.json", layers=shape[0], kv_heads=shape[1], seed=1, imported=True)
    out = shown(capsys, "diff", "a.json", "b.json", "--retention", "0.42", "--retention", "0.7")
    assert max(len(line) for line in out.splitlines()) <= 80
    assert any("A max" in line and "B max" in line for line in out.splitlines()) == side_by_side
    assert out.count("heads change") == 2
    assert "at retention 0.42" in out


def test_diff_json_is_one_document(capsys):
    save("a.json")
    save("b.json", seed=1)
    document = json.loads(shown(capsys, "diff", "a.json", "b.json", "--retention", "0.6", "--json"))
    assert document["warnings"] == []
    assert [at["retention"] for at in document["at"]] == [0.9, 0.7, 0.6, 0.5, 0.3]
    assert document["a"]["model"] == "example/model"
    moved = document["at"][3]["moved"]
    assert {"layer", "kv_head", "before", "after"} == set(moved[0])


def test_diff_of_a_file_with_itself(capsys):
    save("a.json")
    out = shown(capsys, "diff", "a.json", "a.json")
    assert "warning" not in out
    assert "at retention 0.5: no heads change" in out


def test_diff_refuses_another_geometry(capsys):
    save("a.json")
    save("b.json", layers=7)
    assert "only profiles of one geometry can be compared" in refused(capsys, "diff", "a.json", "b.json")


pytestmark = pytest.mark.usefixtures("workplace")


def test_diff_of_a_runtime_file_keeps_to_what_it_states(capsys):
    save("a.json")
    save_without_scores("v.json")
    out = shown(capsys, "diff", "a.json", "v.json")
    assert "warning: the second file has no scores (a runtime file): compared at 0.4 only" in out
    assert "at retention 0.4: no heads change" in out
    assert "A max" not in out
    document = json.loads(shown(capsys, "diff", "a.json", "v.json", "--json"))
    assert document["rank_correlation"] is None
    assert [(at["retention"], at["top_overlap"]) for at in document["at"]] == [(0.4, None)]
    assert NO_SCORES in refused(capsys, "diff", "v.json", "a.json", "--retention", "0.5")
    save_without_scores("w.json", 0.6)
    assert "state no retention in common: 0.4 and 0.6" in refused(capsys, "diff", "v.json", "w.json")
