"""Whole runs of `kvprofile score` in processes of their own: what they write, and that stopping them loses nothing."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
from contextlib import contextmanager
from unittest import mock

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from kvprofile.budget import store
from kvprofile.cli import run as run_here
from kvprofile.corpus.generate import generate_text
from kvprofile.scoring.chunk_store import ChunkStore
from tests.helpers.clocks import stepping
from tests.helpers.score_runs import CHUNKS, command, finish, start, wait_for_chunks


@pytest.fixture(scope="module")
def undisturbed(tiny_checkpoint, tmp_path_factory):
    output = tmp_path_factory.mktemp("undisturbed") / "tiny.json"
    finish(tiny_checkpoint, output)
    return output.read_bytes()


def test_same_run_same_bytes(tiny_checkpoint, undisturbed, tmp_path):
    output = tmp_path / "tiny.json"
    finish(tiny_checkpoint, output)
    assert output.read_bytes() == undisturbed
    assert sorted(file.name for file in tmp_path.iterdir()) == ["tiny.json", "tiny.probe.safetensors"]


@pytest.mark.parametrize("chunks", [1, 9, CHUNKS // 2 + 3])
def test_killed_and_run_again_gives_the_same_bytes(tiny_checkpoint, undisturbed, tmp_path, chunks):
    output = tmp_path / "tiny.json"
    process = start(tiny_checkpoint, output)
    wait_for_chunks(output, chunks, process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert not output.exists()
    again = finish(tiny_checkpoint, output)
    assert "chunks are finished already" in again.stderr
    assert output.read_bytes() == undisturbed
    assert sorted(file.name for file in tmp_path.iterdir()) == ["tiny.json", "tiny.probe.safetensors"]


def test_interrupt_says_how_to_continue(tiny_checkpoint, undisturbed, tmp_path):
    output = tmp_path / "tiny.json"
    process = start(tiny_checkpoint, output)
    wait_for_chunks(output, 3, process)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "run the same command again to continue" in errors
    assert "Traceback" not in errors
    finish(tiny_checkpoint, output)
    assert output.read_bytes() == undisturbed


def test_chunks_of_another_run_are_not_used(tiny_checkpoint, undisturbed, tmp_path):
    output = tmp_path / "tiny.json"
    process = start(tiny_checkpoint, output, "--chunk-tokens", "40")
    wait_for_chunks(output, 5, process)
    process.kill()
    process.communicate()
    again = finish(tiny_checkpoint, output)
    assert "finished already" not in again.stderr
    assert output.read_bytes() == undisturbed


@pytest.mark.parametrize("changed", ["weights", "text", "template"])
def test_a_run_with_other_inputs_starts_anew(tiny_checkpoint, tmp_path, capsys, changed):
    """Same shapes, same lengths: only what is inside differs."""
    checkpoint = shutil.copytree(tiny_checkpoint, tmp_path / "tiny")
    text = tmp_path / "text.txt"
    text.write_text(generate_text("prose", 1, 6000))
    output = tmp_path / "out.json"
    arguments = ["score", str(checkpoint), "--corpus", str(text), "--context-tokens", "320", "--chunk-tokens", "32"]
    arguments += ["--output", str(output)]
    with monkeypatched_saves(after=4), pytest.raises(Stopped):
        run_here(arguments)
    if changed == "weights":
        weights = load_file(checkpoint / "model.safetensors")
        weights["model.layers.0.self_attn.q_proj.weight"] *= 1.5
        save_file(weights, checkpoint / "model.safetensors", metadata={"format": "pt"})
    elif changed == "text":
        text.write_text(generate_text("prose", 2, 6000))
    else:
        template = checkpoint / "chat_template.jinja"
        template.write_text(template.read_text().replace("'<|' + message['role']", "'<|user|><|' + message['role']"))
    assert run_here(arguments) == 0
    assert "starting anew: 4 finished chunks" in capsys.readouterr().err
    resumed = output.read_bytes()
    output.unlink()
    assert run_here(arguments) == 0
    assert output.read_bytes() == resumed


class Stopped(BaseException):
    """A crash in the middle of a run."""


@contextmanager
def monkeypatched_saves(after):
    saves = []
    save = ChunkStore.save

    def stop_after(self, *arguments):
        save(self, *arguments)
        saves.append(arguments)
        if len(saves) == after:
            raise Stopped

    with mock.patch.object(ChunkStore, "save", stop_after):
        yield


def test_a_half_written_chunk_is_scored_again(tiny_checkpoint, undisturbed, tmp_path):
    output = tmp_path / "tiny.json"
    process = start(tiny_checkpoint, output)
    wait_for_chunks(output, 4, process)
    process.kill()
    process.communicate()
    broken = sorted((tmp_path / "tiny.json.partial").glob("document-*.safetensors"))[1]
    broken.write_bytes(broken.read_bytes()[:100])
    finish(tiny_checkpoint, output)
    assert output.read_bytes() == undisturbed


def test_token_scores_agree_with_the_head_scores(tiny_checkpoint, undisturbed, tmp_path):
    output, scores_file = tmp_path / "tiny.json", tmp_path / "scores.safetensors"
    result = json.loads(finish(tiny_checkpoint, output, "--save-token-scores", str(scores_file), "--json").stdout)
    assert result["file"] == str(output)
    profile = store.load(output)
    assert output.read_bytes() == undisturbed
    with safe_open(scores_file, "pt") as tensors:
        found = [tensors.get_tensor(name) for name in tensors.keys()]  # noqa: SIM118 - safe_open is no dict
    assert [tuple(t.shape) for t in found] == [(3, 2, 640), (3, 2, 640)]
    both = torch.stack([t.double() for t in found])
    torch.testing.assert_close(torch.tensor(profile.scores.max).double(), both.amax((0, -1)), rtol=1e-4, atol=0)
    torch.testing.assert_close(torch.tensor(profile.scores.mean).double(), both.mean((0, -1)), rtol=1e-4, atol=0)
    quantile = both.quantile(0.99, dim=-1, interpolation="higher").mean(0)
    torch.testing.assert_close(torch.tensor(profile.scores.p99).double(), quantile, rtol=0.03, atol=0)
    spread = both.amax(-1).std(0, correction=0)
    torch.testing.assert_close(torch.tensor(profile.scores.spread).double(), spread, rtol=1e-3, atol=1e-7)


def test_the_file_says_how_it_was_made(tiny_checkpoint, undisturbed):
    document = json.loads(undisturbed)
    assert document["scoring"]["corpora"][0]["name"] == "generate:prose:1:6000"
    assert document["scoring"]["corpora"][0]["tokens"] == 640
    assert document["scoring"]["prefix"] == "<|user|>\n"
    assert document["scoring"]["dtype"] == "float32"
    assert document["budgets"]["0.5"]["retention_realised"] == 0.5
    assert str(tiny_checkpoint.parent) not in undisturbed.decode()
    assert os.uname().nodename not in undisturbed.decode()


def test_steps_of_the_clock_change_nothing(tiny_checkpoint, undisturbed, tmp_path, capsys, monkeypatch):
    output = tmp_path / "tiny.json"
    stepping(monkeypatch)
    assert run_here([*map(str, command(tiny_checkpoint, output)[3:])]) == 0
    assert output.read_bytes() == undisturbed
    seconds = int(re.search(r"wrote .* in (-?\d+) s;", capsys.readouterr().err)[1])
    assert 0 <= seconds < 600
