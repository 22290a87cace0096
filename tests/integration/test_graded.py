"""Graded budgets from end to end: what `score` writes of a model, and what `evaluate` makes of it and refuses."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from kvprofile.budget import probe, store
from kvprofile.budget.choice import choose
from kvprofile.cli import run
from kvprofile.scoring.chunk_store import ChunkStore
from kvprofile.scoring.probe_fit import ProbeFit
from tests.helpers.commands import refused
from tests.helpers.factories import make_geometry
from tests.helpers.models import POCKET

SCORE = ["--context-tokens", "480", "--chunk-tokens", "200", "--dtype", "float32", "--corpus", "prose"]
ASK = [
    *("--tasks", "needle", "--contexts", "2", "--questions", "2", "--context-tokens", "400", "--retention", "0.3"),
    *("--dtype", "float32", "--random-seeds", "1", "--json"),
]


@pytest.fixture(scope="module")
def scored(tmp_path_factory):
    """The bundled checkpoint's budget file and probe."""
    path = tmp_path_factory.mktemp("scored") / "pocket.json"
    trim = ["--sink-tokens", "16", "--recent-tokens", "64"]
    assert run(["score", str(POCKET), *SCORE, *trim, "--output", str(path)]) == 0
    return path


@pytest.fixture
def budget(scored, tmp_path):
    """A copy to break."""
    for path in (scored, probe.path_of(scored)):
        shutil.copy(path, tmp_path)
    return tmp_path / scored.name


def evaluated(capsys, budget, output, *options):
    capsys.readouterr()
    arguments = ["evaluate", str(POCKET), "--profile", str(budget), "--output", str(output), *ASK, *options]
    assert run(arguments) == 0, capsys.readouterr().err
    return json.loads(capsys.readouterr().out)


def test_score_writes_shares_and_a_probe_that_does_well_on_other_documents(scored):
    profile = store.load(scored)
    assert profile.schema_version == 2
    assert set(profile.budgets) == {"0.9", "0.7", "0.5", "0.3", "0.2", "0.15"}
    assert all(budget.retention_realised == float(key) for key, budget in profile.budgets.items())
    assert profile.probe.tokens == 3 * (480 - 64 - (16 - 2))  # two tokens stand before the context
    assert sum(profile.probe.r2) / len(profile.probe.r2) > 0.2
    weights = probe.load(probe.path_of(scored), profile).weights
    assert weights.shape == (6, 4, 16 + 32 + 7)
    assert weights.isfinite().all()


def test_documents_within_sinks_and_window_give_whole_budgets_only(tmp_path, capsys):
    path = tmp_path / "pocket.json"
    assert run(["score", str(POCKET), *SCORE, "--recent-tokens", "400", "--output", str(path)]) == 0
    assert "no document is longer than sinks and window" in capsys.readouterr().err
    assert store.load(path).schema_version == 1
    assert not probe.path_of(path).exists()


def test_both_kinds_with_their_controls_and_the_ceiling(capsys, budget, tmp_path):
    found = evaluated(capsys, budget, tmp_path / "run", "--kind", "whole", "--kind", "graded", "--own-scores")
    names = [row["name"] for row in found["rows"]]
    assert names[:3] == ["full", "kvzip", "graded"]
    controls = ["any tokens", "reversed", "key norms", "shuffled", "equal", "own scores"]
    assert [name for name in names if name in controls] == controls
    kept = {row["name"]: row["retention_realised"] for row in found["rows"]}
    graded = {name: kept[name] for name in ("graded", "any tokens", "reversed", "key norms", "shuffled", "own scores")}
    assert len({round(share, 6) for share in graded.values()}) == 1  # equal bytes
    assert kept["graded"] == pytest.approx(kept["kvzip"], abs=0.05)
    assert {profile["label"]: profile["kind"] for profile in found["profiles"]} == {
        "kvzip": "whole",
        "graded": "graded",
    }


def test_graded_is_the_default_where_there_is_a_probe(capsys, budget, tmp_path):
    found = evaluated(capsys, budget, tmp_path / "run", "--no-controls")
    assert [row["name"] for row in found["rows"]] == ["full", "graded"]
    found = evaluated(capsys, budget, tmp_path / "other", "--no-controls", "--statistic", "mean")
    assert [row["name"] for row in found["rows"]] == ["full", "kvzip"]


def test_shares_and_the_probe_beat_reversed_tokens_and_other_shares(capsys, budget, tmp_path):
    found = evaluated(capsys, budget, tmp_path / "run", "--contexts", "4", "--retention", "0.15")
    loss = {(row["name"], row["retention"]): row["kl"]["value"] for row in found["rows"]}
    for control in ("reversed", "shuffled", "equal"):
        assert loss["graded", 0.15] < loss[control, 0.15]


@pytest.mark.parametrize("what", ["missing", "changed", "another's"])
def test_a_budget_without_its_own_probe_is_one_line(capsys, budget, what):
    path = probe.path_of(budget)
    if what == "missing":
        path.unlink()
    elif what == "changed":
        path.write_bytes(path.read_bytes()[:-1] + b"\x00")
    else:
        path.write_bytes(probe.Probe((0,), torch.rand(1, 4, 55)).to_bytes())
    told = "no probe" if what == "missing" else "is not the probe that the budget file of pocket was written with"
    for command in (["evaluate", str(POCKET), "--profile", str(budget), *ASK], ["validate", str(budget.parent)]):
        capsys.readouterr()
        assert run(command) == 2
        captured = capsys.readouterr()
        assert told in captured.err + captured.out


def test_what_graded_budgets_do_not_go_with_is_one_line(capsys, budget, tmp_path):
    ask = ["evaluate", str(POCKET), "--profile", str(budget), *ASK]
    assert "leave out --window sliding, or ask for --kind whole" in refused(capsys, *ask, "--window", "sliding")
    assert "a budget is whole or graded, not 'both'" in refused(capsys, *ask, "--kind", "both")
    file = str(tmp_path / "out.json")
    told = refused(capsys, "export", str(budget), "--format", "vllm", "--kind", "graded", "--retention", "0.3",
                   "--output", file)  # fmt: skip
    assert "holds whole heads; leave out --kind graded" in told


def test_whole_heads_of_a_graded_file_are_exported_for_vllm(budget, tmp_path):
    output = tmp_path / "vllm.json"
    assert run(["export", str(budget), "--format", "vllm", "--retention", "0.5", "--output", str(output)]) == 0
    assert sum(len(row) for row in json.loads(output.read_text())["full_heads"]) == 12


def test_a_table_carries_shares_there_and_back(budget, tmp_path):
    table, back = tmp_path / "table.csv", tmp_path / "back.json"
    assert run(["export", str(budget), "--format", "csv", "--retention", "0.3", "--output", str(table)]) == 0
    arguments = ["import", str(table), "--format", "csv", "--model", str(POCKET), "--output", str(back)]
    assert run(arguments) == 0
    expected = choose(store.load(budget), 0.3).heads
    assert store.load(back).budgets["0.3"].heads == expected
    assert len({value for row in expected for value in row}) == 4


def test_chunks_whose_sums_are_not_written_are_scored_again(tmp_path):
    geometry = make_geometry(2, 2, head_size=8)
    output = tmp_path / "out.json"
    scores = torch.rand(2, 2, 30)

    def sums():
        for layer in range(2):
            generator = torch.Generator().manual_seed(layer)
            keys, values = torch.randn(2, 30, 8, generator=generator), torch.randn(2, 30, 8, generator=generator)
            yield probe.sums(keys, values, scores[layer], 0, 30)

    store_ = ChunkStore(output, "key", geometry)
    with store_.opened():
        store_.save(0, 0, scores, False, slice(0, 30), sums())
        before = ProbeFit.of(store_.fit.tensors(), geometry)
        written = (tmp_path / "out.json.partial" / "sums.safetensors").read_bytes()
        store_.save(0, 1, scores, False, slice(0, 30), sums())
    (tmp_path / "out.json.partial" / "sums.safetensors").write_bytes(written)  # killed between chunk and sums
    again = ChunkStore(output, "key", geometry)
    with again.opened() as kept:
        assert kept == 1
        assert again.finished(0) == {0}
        assert torch.equal(again.fit.solve()[0], before.solve()[0])
    (tmp_path / "out.json.partial" / "document-00000-chunk-00000.safetensors").unlink()
    third = ChunkStore(output, "key", geometry)
    with third.opened() as kept:
        assert kept == 0
        third.save(0, 0, scores, False, slice(0, 30), sums())  # in the sums already
        assert torch.equal(third.fit.solve()[0], before.solve()[0])


@pytest.mark.parametrize(("method", "target"), [("kvzip-plus", "x / (1 + x) of KVzip+"), ("gate", "KVzip score")])
def test_every_method_makes_graded_budgets_of_its_token_scores(tmp_path, method, target):
    path = tmp_path / "pocket.json"
    trim = ["--sink-tokens", "16", "--recent-tokens", "64", "--documents", "2", "--method", method]
    assert run(["score", str(POCKET), *SCORE, *trim, "--output", str(path)]) == 0
    profile = store.load(path)
    assert profile.probe.target == f"log({target} + 0.0001)"
    assert choose(profile, 0.5, kind="whole").statistic == profile.scoring.statistic


def test_a_fast_run_makes_whole_budgets_only(tmp_path, capsys):
    path = tmp_path / "pocket.json"
    trim = ["--sink-tokens", "16", "--recent-tokens", "64", "--method", "kvzip-mean", "--fast"]
    assert run(["score", str(POCKET), *SCORE, *trim, "--output", str(path)]) == 0
    assert "fast: no graded budgets, and no probe" in capsys.readouterr().err
    assert store.load(path).schema_version == 1


def test_a_probe_goes_with_the_budget_file_that_replaces_it(budget):
    assert run(["score", str(POCKET), *SCORE, "--recent-tokens", "400", "--output", str(budget)]) == 0
    assert store.load(budget).schema_version == 1
    assert not probe.path_of(budget).exists()


def test_files_that_are_not_probes_are_left_alone(budget, capsys):
    path = probe.path_of(budget)
    path.write_bytes(b"mine")
    score = ["score", str(POCKET), *SCORE, "--recent-tokens", "64", "--output", str(budget)]
    assert "exists and is not a probe; pass --force" in refused(capsys, *score)
    assert path.read_bytes() == b"mine"
    path.unlink()
    told = refused(capsys, *score, "--save-token-scores", str(path))
    assert "is the probe's file too" in told
    path.mkdir()
    refused(capsys, *score)


def test_token_scores_do_not_replace_a_probe(budget, tmp_path, capsys):
    other = tmp_path / "other.json"
    score = ["score", str(POCKET), *SCORE, "--recent-tokens", "64", "--output", str(other)]
    told = refused(capsys, *score, "--save-token-scores", str(probe.path_of(budget)))
    assert "exists and holds no token scores" in told


def test_what_ranks_or_lays_out_whole_heads_is_refused_for_graded_ones(budget, capsys, tmp_path):
    assert "a statistic ranks whole heads" in refused(
        capsys, "show", str(budget), "--kind", "graded", "--statistic", "mean"
    )
    ask = ["evaluate", str(POCKET), "--profile", str(budget), *ASK]
    assert "--statistic ranks whole heads" in refused(capsys, *ask, "--kind", "graded", "--statistic", "mean")
    assert "--own-scores is a ceiling for graded" in refused(capsys, *ask, "--kind", "whole", "--own-scores")
    table = ["export", str(budget), "--format", "csv", "--retention", "0.3", "--output", str(tmp_path / "t.csv")]
    assert "graded ones are not; ask for --kind whole" in refused(capsys, *table, "--pipeline-parallel-size", "2")
    assert "hold scores, not budgets" in refused(
        capsys, "export", str(budget), "--format", "kvzip", "--kind", "graded", "--output", str(tmp_path / "k.pt")
    )


def test_a_whole_and_a_graded_file_are_compared_by_whole_heads(budget, capsys, tmp_path):
    old = tmp_path / "old.json"
    profile = store.load(budget)
    whole = {
        "schema_version": 1,
        "probe": None,
        "budgets": {"0.5": choose(profile, 0.5, kind="whole").allocation.budgets},
    }
    store.save(profile.model_copy(update=whole), old)
    assert run(["diff", str(old), str(budget), "--retention", "0.5"]) == 0
    assert "at retention 0.5: no heads change" in capsys.readouterr().out


def test_shares_for_other_sinks_and_window_are_told_where_that_matters(budget, capsys, tmp_path):
    less = ["--kind", "graded", "--no-controls", "--questions", "1", "--contexts", "1"]
    near = evaluated(capsys, budget, tmp_path / "near", *less, "--recent-tokens", "128")["warnings"]
    far = evaluated(capsys, budget, tmp_path / "far", *less, "--recent-tokens", "256")["warnings"]
    whole = evaluated(capsys, budget, tmp_path / "whole", *less, "--kind", "whole", "--recent-tokens", "256")
    told = "the shares of graded were made for 16 sinks and a window of 64, on documents of 480 tokens"
    assert not any("shares" in warning for warning in near)
    assert [warning.startswith(told) for warning in far].count(True) == 1
    assert [warning.startswith(told) for warning in whole["warnings"]].count(True) == 1  # of graded, not of whole heads


def test_own_scores_of_a_context_that_leaves_no_room_for_its_repeat_are_refused(budget, capsys):
    ask = ["evaluate", str(POCKET), "--profile", str(budget), *ASK, "--own-scores", "--context-tokens"]
    told = refused(capsys, *ask, "3900")
    assert "--own-scores repeats each context after itself, at least 256 tokens at a time" in told
    assert "of 4,096 positions; ask about shorter contexts" in told
