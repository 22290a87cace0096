"""Corpora: every kind of source, and what is wrong with it said in one line."""

from __future__ import annotations

import hashlib
import io
import json
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvprofile.corpus import generate
from kvprofile.corpus.generate import KINDS, generate_text
from kvprofile.corpus.sources import bundled_names, corpora_folder, cut, load_corpus
from kvprofile.errors import InputError


class Stdin:
    def __init__(self, raw):
        self.buffer = io.BytesIO(raw)


@pytest.mark.parametrize("kind", KINDS)
@given(seed=st.integers(0, 2**40), length=st.integers(1, 3000))
def test_generated_text_is_seeded_and_long_enough(kind, seed, length):
    text = generate_text(kind, seed, length)
    assert text == generate_text(kind, seed, length)
    assert len(text) >= length
    assert text != generate_text(kind, seed + 1, max(length, 200))


def test_generated_text_of_a_number_of_words():
    text = generate_text("prose", 3, 500, lambda t: len(t.split()))
    assert 500 <= len(text.split()) < 540


def test_generators_refuse_nothing_to_do():
    with pytest.raises(ValueError, match="at least 1"):
        generate.generate_text("prose", 0, 0)


def test_bundled_corpora_are_complete():
    assert set(bundled_names()) == {"prose", "code", "voice", "manual", "tables", "languages"}
    for name in bundled_names():
        manifest = json.loads((corpora_folder() / name / "manifest.json").read_text(encoding="utf-8"))
        assert manifest["licence"] == "Apache-2.0"
        assert len(manifest["purpose"]) > 40
        assert manifest["language"]
        corpus = load_corpus(name)
        assert [t.name for t in corpus.texts] == [d["file"] for d in manifest["documents"]]
        for text, entry in zip(corpus.texts, manifest["documents"], strict=True):
            assert hashlib.sha256(text.text.encode()).hexdigest() == entry["sha256"]
            assert entry["tokens"] > 4000


def test_a_file_is_read_verbatim_but_for_its_byte_order_mark(tmp_path):
    file = tmp_path / "a.txt"
    file.write_bytes("\ufeffzwei\r\nZeilen \n".encode())
    assert load_corpus(str(file)).texts[0].text == "zwei\r\nZeilen \n"


def test_a_folder_gives_its_files_in_order(tmp_path):
    for name in ("b.txt", "a/c.md", ".git/x", "README.md", "manifest.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    assert [t.name for t in load_corpus(str(tmp_path)).texts] == ["a/c.md", "b.txt"]
    assert len(load_corpus(str(tmp_path), limit=1).texts) == 1


def test_hash_covers_names_and_texts(tmp_path):
    (tmp_path / "a.txt").write_text("one")
    first = load_corpus(str(tmp_path)).sha256()
    (tmp_path / "a.txt").write_text("two")
    second = load_corpus(str(tmp_path)).sha256()
    (tmp_path / "a.txt").rename(tmp_path / "b.txt")
    assert len({first, second, load_corpus(str(tmp_path)).sha256()}) == 3


def test_json_lines_on_stdin(monkeypatch):
    monkeypatch.setattr(sys, "stdin", Stdin(b'{"text": "one", "name": "first"}\n\n"two"\n'))
    texts = load_corpus("-").texts
    assert [(t.name, t.text) for t in texts] == [("first", "one"), ("line 3", "two")]


def test_json_lines_end_at_newlines_only(monkeypatch):
    monkeypatch.setattr(sys, "stdin", Stdin('{"text": "a\u2028b"}\r\n'.encode()))
    assert [t.text for t in load_corpus("-").texts] == ["a\u2028b"]


@pytest.mark.parametrize(
    "raw", [b'{"text": "\\ud800"}', b"{", b"[1]\n", b'{"body": "x"}', b"\xff\xfe", b"", b'{"text": ""}']
)
def test_bad_stdin(monkeypatch, raw):
    monkeypatch.setattr(sys, "stdin", Stdin(raw))
    with pytest.raises(InputError, match=r"stdin"):
        load_corpus("-")


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "is empty"), (b" \n ", "is empty"), (b"caf\xe9", "not UTF-8 .byte 3"), (b"\x7fELF\0\0", "not a text file")],
)
def test_bad_files(tmp_path, content, message):
    file = tmp_path / "bad.txt"
    file.write_bytes(content)
    with pytest.raises(InputError, match=message):
        load_corpus(str(file))


def test_empty_folder(tmp_path):
    with pytest.raises(InputError, match="holds no files"):
        load_corpus(str(tmp_path))


def test_local_data_sets(tmp_path):
    datasets = pytest.importorskip("datasets")
    table = datasets.Dataset.from_dict({"text": ["one", "two", "three"], "other": ["x", "y", "z"]})
    table.save_to_disk(tmp_path / "saved")
    saved = load_corpus(f"datasets:{tmp_path / 'saved'}", limit=2)
    assert [t.text for t in saved.texts] == ["one", "two"]
    table.to_json(tmp_path / "rows.jsonl")
    rows = load_corpus(f"datasets:{tmp_path / 'rows.jsonl'}:train@other")
    assert rows.name == "datasets:rows.jsonl:train@other", "no machine path goes into a budget file"
    assert [t.text for t in rows.texts] == ["x", "y", "z"]
    with pytest.raises(InputError, match="no column 'absent'; it has text, other"):
        load_corpus(f"datasets:{tmp_path / 'rows.jsonl'}:train@absent")
    datasets.Dataset.from_dict({"text": ["one", None]}).to_json(tmp_path / "null.jsonl")
    with pytest.raises(InputError, match="row 1 of column 'text' is not text"):
        load_corpus(f"datasets:{tmp_path / 'null.jsonl'}")
    with pytest.raises(InputError, match="choose one split of train"):
        load_corpus(f"datasets:{tmp_path / 'rows.jsonl'}:test")


def test_cutting_to_tokens(tmp_path):
    (tmp_path / "long.txt").write_text("a b c d e")
    (tmp_path / "short.txt").write_text("a b")
    corpus = load_corpus(str(tmp_path))

    def words(text):
        return tuple(range(len(text.split())))

    assert list(cut(corpus, words, None)) == [("long.txt", (0, 1, 2, 3, 4)), ("short.txt", (0, 1))]
    assert list(cut(corpus, words, 3)) == [("long.txt", (0, 1, 2))]
    with pytest.raises(InputError, match="its longest document has 5 tokens, --context-tokens asks for 6"):
        list(cut(corpus, words, 6))
