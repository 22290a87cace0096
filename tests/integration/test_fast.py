"""`score --fast` and `score --dry-run` on a tiny checkpoint: what they change, what they record, what they refuse."""

from __future__ import annotations

import json

import pytest
import torch

from kvprofile.budget import store
from kvprofile.cli import run
from kvprofile.corpus.generate import generate_text
from kvprofile.scoring import attention, effort
from kvprofile.scoring.attention import recording
from kvprofile.scoring.chunk_store import ChunkStore
from kvprofile.scoring.prompts import chat_frame, encode, frame_document
from kvprofile.scoring.reconstruction import Scorer
from tests.helpers.models import random_model

CORPORA = [option for seed in range(10) for option in ("--corpus", f"generate:prose:{seed}:3000")]
FAST = ["--fast", "--method", "kvzip-mean"]
SMALL = ["--context-tokens", "160", "--chunk-tokens", "32", "--dtype", "float32", "--device", "cpu"]


def arguments(checkpoint, output, *options):
    return ["score", str(checkpoint), *CORPORA, *SMALL, "--output", str(output), *options]


def scores_of(tokenizer, geometry, model, chunk_tokens, sparse_rows):
    frame = chat_frame(tokenizer)
    document = frame_document("test", encode(tokenizer, generate_text("prose", 7, 4000))[:150], frame)
    with recording(model, geometry, sparse_rows=sparse_rows) as recorder:
        scorer = Scorer(model, recorder, frame, document_tokens=170, chunk_tokens=chunk_tokens)
        return torch.cat([scored.token_scores for scored in scorer.score(document)], -1)


def test_sparse_rows_thin_out_the_rest_of_the_context(tokenizer, tmp_path, monkeypatch):
    """With one chunk there is no rest; with several, the first layer's scores do not depend on it and others do."""
    monkeypatch.setattr(effort, "REST_RECENT_TOKENS", 16)
    from kvprofile.checkpoint import Source, describe

    model = random_model("llama")
    model.save_pretrained(tmp_path)
    geometry = describe(Source("test", tmp_path, None)).geometry
    one = [scores_of(tokenizer, geometry, model, 200, sparse) for sparse in (False, True)]
    torch.testing.assert_close(*one)
    many = [scores_of(tokenizer, geometry, model, 50, sparse) for sparse in (False, True)]
    torch.testing.assert_close(many[0][0], many[1][0])
    assert (many[0][1:] - many[1][1:]).abs().max() > 1e-3


def test_sparse_rows_that_leave_out_nothing_are_exact(tokenizer, tmp_path, monkeypatch):
    from kvprofile.checkpoint import Source, describe

    for module in (effort, attention):
        monkeypatch.setattr(module, "REST_STRIDE", 1)
    monkeypatch.setattr(effort, "REST_RECENT_TOKENS", 16)
    model = random_model("llama")
    model.save_pretrained(tmp_path)
    geometry = describe(Source("test", tmp_path, None)).geometry
    exact, sparse = (scores_of(tokenizer, geometry, model, 40, rows) for rows in (False, True))
    torch.testing.assert_close(exact, sparse, atol=1e-5, rtol=1e-5)


@pytest.fixture(scope="module")
def fast_file(tiny_checkpoint, tmp_path_factory):
    output = tmp_path_factory.mktemp("fast") / "tiny.json"
    assert run(arguments(tiny_checkpoint, output, *FAST)) == 0
    return output


def test_the_file_says_what_was_left_out(fast_file):
    shortcuts = store.load(fast_file).scoring.shortcuts
    assert shortcuts.sparse_rows
    assert shortcuts.stop_early
    assert shortcuts.chunk_share == 0.5
    assert shortcuts.chunks == 10 * 5
    assert shortcuts.chunks_read == 3 * shortcuts.documents_read
    assert shortcuts.stopped_early == (shortcuts.documents_read < 10)


def test_an_interrupted_fast_run_ends_in_the_same_bytes(tiny_checkpoint, fast_file, tmp_path, monkeypatch):
    class Stopped(BaseException):
        pass

    saved = []
    save = ChunkStore.save

    def stop_after_five(self, *these):
        save(self, *these)
        saved.append(these)
        if len(saved) == 5:
            raise Stopped

    output = tmp_path / "tiny.json"
    monkeypatch.setattr(ChunkStore, "save", stop_after_five)
    with pytest.raises(Stopped):
        run(arguments(tiny_checkpoint, output, *FAST))
    monkeypatch.setattr(ChunkStore, "save", save)
    assert run(arguments(tiny_checkpoint, output, *FAST)) == 0
    assert output.read_bytes() == fast_file.read_bytes()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ([], "--fast keeps the ranking by mean, not by maximum"),
        (["--method", "gate"], "--fast has no shortcut for --method gate"),
        (["--save-token-scores", "x.safetensors"], "--save-token-scores needs every chunk; leave out --fast"),
    ],
)
def test_what_has_no_shortcut_is_refused(tiny_checkpoint, workplace, capsys, options, words):
    assert run(arguments(tiny_checkpoint, "out.json", "--fast", *options)) == 2
    assert words in capsys.readouterr().err
    assert not list(workplace.iterdir())


def test_a_dry_run_counts_and_writes_nothing(tiny_checkpoint, workplace, capsys, monkeypatch):
    from kvprofile.scoring import hf_engine

    def loaded(*_args, **_kwargs):
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(hf_engine, "load_model", loaded)
    found = {}
    for options in ((), tuple(FAST)):
        assert run(arguments(tiny_checkpoint, "folder/out.json", "--dry-run", "--json", *options)) == 0
        found[options] = json.loads(capsys.readouterr().out)
    exact, fast = found.values()
    assert exact["documents"] == 10
    assert exact["context_tokens"] == 1600
    assert exact["prefill_multiply_adds"] == fast["prefill_multiply_adds"]
    assert exact["scoring_multiply_adds"] > 1.5 * fast["scoring_multiply_adds"]
    assert exact["least_seconds"] > 0
    # float32: 1,024 embeddings of 64, tied or not, and three layers; the cache holds keys and values of 2 heads of 16
    assert exact["weight_bytes"] > 4 * 1024 * 64
    tokens, remainder = divmod(exact["cache_bytes"], 4 * 2 * 3 * 2 * 16)
    assert remainder == 0
    assert 160 + 32 < tokens < 160 + 32 + 60
    assert not list(workplace.iterdir())
    assert run(arguments(tiny_checkpoint, "out.json", "--dry-run")) == 0
    assert "so no run takes less than" in capsys.readouterr().out
