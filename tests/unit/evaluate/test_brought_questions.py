"""Questions that people bring, as an evaluation takes and tells them."""

from __future__ import annotations

import pytest

from kvprofile.cli import quality_table
from kvprofile.errors import InputError
from kvprofile.evaluate.options import EvaluationOptions
from kvprofile.questions.columns import Columns


def test_a_mapping_without_rows_to_map_is_refused():
    with pytest.raises(InputError, match="--columns is for questions that you bring"):
        EvaluationOptions(tasks=("needle",), columns=Columns.parse("answers=any"))
    EvaluationOptions(tasks=("needle", "mine.jsonl"), columns=Columns.parse("answers=any"))


def test_the_heading_says_what_accuracy_is_of_what_was_brought():
    summary = {
        "settings": {"sink_tokens": 16, "recent_tokens": 64},
        "model": {"name": "pocket"},
        "context_tokens": [200, 200],
        "questions": 3,
        "exercises": 1,
        "questions_with_known_evidence": 0,
        "questions_outside": 0,
        "accuracy": {
            "needle": "share of answers that hold the reference as whole words",
            "datasets:a-long-name-of-somebody/and-a-set:test": "mean F1 of words, the best of several references",
        },
    }
    lines = list(quality_table.heading(summary))
    assert max(map(len, lines)) <= 80
    told = " ".join(line.strip() for line in lines[2:])
    assert told == "accuracy of datasets:a-long-name-of-somebody/and-a-set:test: mean F1 of words, the best of " \
        "several references"  # fmt: skip
