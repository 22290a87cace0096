"""Which answers are right."""

from __future__ import annotations

import pytest

from kvprofile.questions.judge import is_right
from kvprofile.questions.tasks import Question


@pytest.mark.parametrize(
    ("expected", "answer", "right"),
    [
        (("2415",), "It is 2415.", True),
        (("2415",), "Kuvi=2415", True),
        (("2415",), "24157", False),
        (("2415",), "12415", False),
        (("2415", "17"), "17 and 2415", True),
        (("2415", "17"), "2415", False),
        (("short sentences",), "Short\n sentences, please", True),
        (("[Kuvi]",), "[kuvi]", True),
        (("北京",), "在北京市", True),
        (("a.c",), "abc", False),
    ],
)
def test_right_answers(expected, answer, right):
    assert is_right(Question("?", expected[0], expected, ()), answer) == right
    if len(expected) == 2:
        assert is_right(Question("?", expected[0], expected, (), any_of=True), answer)
