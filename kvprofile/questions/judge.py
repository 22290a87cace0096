"""Whether an answer is right: it holds what is expected, as whole words."""

from __future__ import annotations

import re

from kvprofile.questions.tasks import Question


def holds(answer: str, expected: str) -> bool:
    """Whether ``answer`` contains ``expected`` as whole words; case and white space do not matter."""
    return bool(_as_words(_folded(expected)).search(_folded(answer)))


def is_right(question: Question, answer: str) -> bool:
    """Whether an answer holds every string that the question expects or, with ``any_of``, one of them."""
    found = (holds(answer, text) for text in question.expected)
    return any(found) if question.any_of else all(found)


def _folded(text: str) -> str:
    return " ".join(text.split()).casefold()


def _as_words(text: str) -> re.Pattern[str]:
    """``text`` where no Latin letter or digit continues it: 2415 is not in 24157."""
    before = r"(?<![a-z0-9])" if re.match(r"[a-z0-9]", text) else ""
    after = r"(?![a-z0-9])" if re.search(r"[a-z0-9]\Z", text) else ""
    return re.compile(f"{before}{re.escape(text)}{after}")
