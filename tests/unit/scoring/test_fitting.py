"""Documents too long for a model are cut to what fits, and that is said and recorded."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvprofile.budget import store
from kvprofile.cli import run
from kvprofile.scoring.prompts import Frame, FramedDocument, most_context_tokens, required_positions
from tests.helpers.models import random_model, save_checkpoint

sizes = st.integers(0, 12)


@given(prefix=sizes, suffix=sizes, ask=sizes, ask_from=sizes, chunk=st.integers(1, 60), positions=st.integers(1, 200))
def test_no_more_and_no_less_than_what_fits(prefix, suffix, ask, ask_from, chunk, positions):
    frame = Frame("", "", (0,) * prefix, (0,) * suffix, (0,) * ask, (0,) * ask_from)

    def needed(tokens):
        return required_positions(FramedDocument("", (0,) * prefix, (0,) * tokens), frame, chunk)

    most = most_context_tokens(frame, prefix, chunk, positions)
    if most >= 1:
        assert needed(most) <= positions
    assert needed(max(most, 0) + 1) > positions


@pytest.fixture
def short(tmp_path, tokenizer):
    """A model of 256 positions, and a folder with a document that fits and one that does not."""
    texts = tmp_path / "texts"
    texts.mkdir()
    (texts / "long.txt").write_text("All day long it rained on the river and on the hills. " * 60)
    (texts / "short.txt").write_text("Then the sun came out.")
    model = save_checkpoint(random_model("llama", max_position_embeddings=256), tmp_path / "short", tokenizer)
    return [str(model), "--corpus", str(texts), "--chunk-tokens", "50"]


def test_the_first_command_on_a_model_of_few_positions(short, workplace, capsys):
    assert run(["score", *short]) == 0
    said = [line for line in capsys.readouterr().err.splitlines() if "cut to" in line]
    written = json.loads((workplace / "models/kv_budget/short.json").read_text())
    [record] = written["scoring"]["corpora"]
    assert written["scoring"]["context_tokens"] is None
    assert record["documents"] == 2
    assert 100 < record["cut_to_tokens"] < record["tokens"] < record["cut_to_tokens"] + 50
    assert len(said) == 1
    assert f"cut to the first {record['cut_to_tokens']} tokens, because max_position_embeddings is 256" in said[0]
    assert said[0].endswith("texts/long.txt")
    first = (workplace / "models/kv_budget/short.json").read_bytes()
    assert store.to_bytes(store.load(workplace / "models/kv_budget/short.json")) == first
    assert run(["score", *short]) == 0
    assert (workplace / "models/kv_budget/short.json").read_bytes() == first


def test_a_length_that_was_asked_for_is_not_cut(short, workplace, capsys):
    assert run(["score", *short, "--context-tokens", "250"]) == 2
    assert "needs" in capsys.readouterr().err
    assert not (workplace / "models").exists()


def test_a_file_of_whole_documents_does_not_mention_cuts(short, workplace):
    assert run(["score", *short, "--context-tokens", "20"]) == 0
    assert "cut_to_tokens" not in (workplace / "models/kv_budget/short.json").read_text()


@pytest.mark.usefixtures("workplace")
def test_a_model_too_short_for_any_document_is_refused(tmp_path, tokenizer, capsys):
    model = save_checkpoint(random_model("llama", max_position_embeddings=16), tmp_path / "stub", tokenizer)
    assert run(["score", str(model), "--corpus", "generate:prose:1:3000"]) == 2
    assert "max_position_embeddings is 16" in capsys.readouterr().err
