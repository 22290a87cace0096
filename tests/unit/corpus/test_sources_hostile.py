"""Texts on stdin that are no texts."""

from __future__ import annotations

import io

import pytest

from kvprofile.corpus.sources import load_corpus
from kvprofile.errors import InputError


def test_json_lines_on_stdin_are_texts_or_refused(monkeypatch):
    for line in (b"[" * 10**6, b"{" * 10**6, b'{"text": ["x"]}', b"7", b"9" * 5000, b'{"text": "\\ud800"}'):
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(line)))
        with pytest.raises(InputError, match=r"^stdin line 1 "):
            load_corpus("-")
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b'{"name": "../../x\\u001b", "text": "t"}')))
    assert [text.name for text in load_corpus("-").texts] == ["../../x\\x1b"]  # a name, never a path
