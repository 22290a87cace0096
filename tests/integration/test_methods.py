"""Every scoring method through the command line: what the file holds, that runs resume, what stays equal."""

from __future__ import annotations

import json

import pytest
import safetensors.torch
import torch

from kvprofile.budget import store
from kvprofile.budget.allocate import ranking
from kvprofile.budget.choice import choose_whole
from kvprofile.cli import run as run_here
from kvprofile.scoring import hf_engine
from kvprofile.scoring.methods import METHODS, repeats_read

ASKED = ["--corpus", "generate:prose:1:6000", "--corpus", "generate:code:2:6000", "--context-tokens", "120"]
ASKED += [
    "--chunk-tokens",
    "70",
    "--sink-tokens",
    "4",
    "--recent-tokens",
    "16",
    "--dtype",
    "float32",
    "--device",
    "cpu",
]


def score(checkpoint, output, method):
    assert run_here(["score", str(checkpoint), *ASKED, "--method", method, "--output", str(output)]) == 0
    return store.load(output)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_ranks_by_its_statistic(tiny_checkpoint, tmp_path, method):
    found = score(tiny_checkpoint, tmp_path / "a.json", method)
    plain = score(tiny_checkpoint, tmp_path / "b.json", "kvzip")
    assert found.scoring.method == method
    assert found.scoring.statistic == METHODS[method].statistic
    as_plain = not METHODS[method].weighs
    assert (found.scores.max == plain.scores.max) is as_plain
    assert (found.scores.mean == plain.scores.mean) is as_plain
    scores = found.scores.statistics()[found.scoring.statistic]
    best = ranking(scores)[:3]
    heads = choose_whole(found, 0.5).heads
    assert sum(value or 0.0 for row in heads for value in row) == 3
    assert all(heads[layer][head] == 1.0 for layer, head in best)
    assert (found.scores.loss is not None) == METHODS[method].loss_aware
    assert not list(tmp_path.glob("*.partial"))


def test_weighed_scores_are_not_for_vllm_nor_for_shortcuts(tiny_checkpoint, capsys):
    for flag, said in ((["--engine", "vllm"], "needs output projections"), (["--fast"], "ranks by maximum")):
        assert run_here(["score", str(tiny_checkpoint), "--method", "kvzip-plus", *flag]) == 2
        assert said in capsys.readouterr().err


def test_unknown_method_is_one_line(tiny_checkpoint, tmp_path, capsys):
    assert run_here(["score", str(tiny_checkpoint), "--method", "magic", "--output", str(tmp_path / "a.json")]) == 2
    assert capsys.readouterr().err.strip().endswith(f"unknown method 'magic'; known: {', '.join(METHODS)}")


def test_an_interrupted_run_keeps_the_losses_it_has(tiny_checkpoint, tmp_path, monkeypatch):
    whole = tmp_path / "whole.json"
    score(tiny_checkpoint, whole, "gate")
    asked = []
    real = hf_engine.gate_scores

    def fail_at_the_second(gated, documents, steps):
        asked.append(documents)
        if len(asked) == 2:
            raise KeyboardInterrupt
        return real(gated, documents, steps)

    monkeypatch.setattr(hf_engine, "gate_scores", fail_at_the_second)
    output = tmp_path / "again.json"
    assert run_here(["score", str(tiny_checkpoint), *ASKED, "--method", "gate", "--output", str(output)]) == 130
    assert not output.exists()
    assert run_here(["score", str(tiny_checkpoint), *ASKED, "--method", "gate", "--output", str(output)]) == 0
    assert len(asked) == 3  # the first document's losses were kept
    assert output.read_bytes() == whole.read_bytes()


def test_other_sinks_start_loss_aware_runs_anew(tiny_checkpoint, tmp_path, monkeypatch, capsys):
    def stop(*_):
        raise KeyboardInterrupt

    output = tmp_path / "a.json"
    with monkeypatch.context() as patch:
        patch.setattr(hf_engine, "gate_scores", stop)
        assert run_here(["score", str(tiny_checkpoint), *ASKED, "--method", "gate", "--output", str(output)]) == 130
    changed = [*ASKED, "--method", "gate", "--sink-tokens", "8", "--output", str(output)]
    assert run_here(["score", str(tiny_checkpoint), *changed]) == 0
    assert "starting anew" in capsys.readouterr().err


def test_weights_without_a_head_serve_kvzip_and_not_the_loss(checkpoint, tmp_path, capsys):
    file = checkpoint / "model.safetensors"
    tensors = safetensors.torch.load_file(file)
    del tensors["lm_head.weight"]
    safetensors.torch.save_file(tensors, file, metadata={"format": "pt"})
    score(checkpoint, tmp_path / "a.json", "kvzip")
    assert run_here(["score", str(checkpoint), *ASKED, "--method", "gate", "--output", str(tmp_path / "b.json")]) == 2
    assert "the weights lack lm_head.weight" in capsys.readouterr().err


def test_losses_are_means_over_tokens_of_all_documents(tiny_checkpoint, tmp_path):
    found = score(tiny_checkpoint, tmp_path / "both.json", "ablation")
    single = []
    for reference in ("generate:prose:1:6000", "generate:code:2:6000"):
        output = tmp_path / "one.json"
        asked = ["--corpus", reference, *ASKED[4:], "--method", "ablation", "--output", str(output), "--force"]
        assert run_here(["score", str(tiny_checkpoint), *asked]) == 0
        single.append(torch.tensor(store.load(output).scores.loss))
    torch.testing.assert_close(torch.tensor(found.scores.loss), torch.stack(single).mean(0), atol=1e-6, rtol=1e-3)


def test_a_loss_ranked_profile_travels_through_foreign_forms(tiny_checkpoint, tmp_path, capsys):
    profile = tmp_path / "a.json"
    found = score(tiny_checkpoint, profile, "ablation")
    order = ranking(found.scores.loss)
    for form, name in (("kvzip", "a.pt"), ("csv", "a.csv"), ("duo-attention", "duo")):
        target = tmp_path / name
        assert run_here(["export", str(profile), "--format", form, "--output", str(target)]) == 0, (
            capsys.readouterr().err
        )
        back = tmp_path / f"{form}.json"
        asked = ["import", str(target), "--format", form, "--model", str(tiny_checkpoint), "--output", str(back)]
        assert run_here(asked) == 0, capsys.readouterr().err
        assert ranking(store.load(back).scores.max) == order
    capsys.readouterr()
    assert run_here(["show", str(profile), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["statistic"] == "loss"


def test_repeats_read_counts_what_ablation_reads(tiny_checkpoint, tmp_path):
    geometry = score(tiny_checkpoint, tmp_path / "a.json", "kvzip").model.geometry
    assert repeats_read("ablation", geometry) == 7
    assert repeats_read("kvzip", geometry) == 0
