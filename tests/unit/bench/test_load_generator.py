"""Which prompts a load sends, and how a full pool is found."""

from __future__ import annotations

import math

from hypothesis import given
from hypothesis import strategies as st

from kvprofile.bench import documents, load_generator


def test_prompts_go_around_documents_and_questions():
    found = load_generator.prompts(documents.pocket(0), 30, 7, unique=True)
    assert [p.document.name for p in found[:4]] == ["persona", "needle", "lookup", "persona"]
    assert len({p.text for p in found}) == 30
    assert len({p.seed for p in found}) == 30
    assert {(p.document.name, p.question.text) for p in found[:18]} == {
        (d.name, q.text) for d in documents.pocket(0) for q in d.questions
    }
    assert found == load_generator.prompts(documents.pocket(0), 30, 7, unique=True)
    plain = load_generator.prompts(documents.pocket(0), 1, 7, unique=False)[0]
    assert plain.text == f"{plain.document.text}\n\n{plain.question.text}"


@given(st.integers(0, 200), st.integers(1, 128))
def test_fill_finds_the_largest_that_passes(capacity, most):
    tried = []

    def trial(count):
        tried.append(count)
        return count <= capacity

    assert load_generator.fill(trial, most) == min(capacity, most)
    assert len(tried) == len(set(tried))
    assert len(tried) <= 2 * math.log2(most + 1) + 2
    assert max(tried) <= most
