"""What libraries say, as one line that is whole."""

from __future__ import annotations

import pytest

from kvprofile.errors import first_line

SAID = {
    "a line": ("Not found.\nTry again.", "Not found."),
    "begins a list": (
        "Cannot build from one of: \n(1) a file, \n(2) a table.",
        "Cannot build from one of: (1) a file, (2) a table.",
    ),
    "a second paragraph": ("Only these:\na\nb\n\nUnrelated advice.", "Only these: a b"),
    "nothing": ("", "ValueError"),
}


@pytest.mark.parametrize(("message", "told"), SAID.values(), ids=SAID)
def test_a_message_is_cut_where_a_sentence_ends(message, told):
    assert first_line(ValueError(message)) == told


def test_what_is_too_long_is_cut_between_words_and_marked():
    told = first_line(ValueError("word " * 500))
    assert len(told) <= 602
    assert told.endswith("word …")
    assert first_line(ValueError("x" * 5000)) == "x" * 600 + " …"
