"""What every task keeps to, whatever its seed: evidence holds the answer, nothing else does, purposes share no fact."""

from __future__ import annotations

import itertools
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvprofile.corpus.sources import bundled_names, documents_folder, load_corpus
from kvprofile.questions.tasks import CONTINUED_CHARACTERS, DEFAULT_TASKS, TASKS, exercise

FACT_TASKS = sorted(set(TASKS) - {"repeat", "strings", "continuation"})
VERBATIM = ("repeat", "strings")
LONGEST_BLOCK = 300
"""Characters; a function of four lines, or a fact that is told five times."""

SEEDS = st.integers(0, 2**40)
LENGTHS = st.integers(400, 3000)


def facts(task, purpose, seed, length=1500):
    """What an exercise tells that has a name of its own; a persona's two wishes are one of a hundred."""
    made = exercise(task, purpose, seed, length, 1000)
    return {(q.text, q.answer) for q in made.questions if q.text != "What did the guide ask for?"}


def without(text, spans):
    for start, stop in sorted(spans, reverse=True):
        text = f"{text[:start]}\0{text[stop:]}"
    return text


def test_default_tasks_are_tasks():
    assert set(DEFAULT_TASKS) <= set(TASKS)
    with pytest.raises(KeyError):
        exercise("nothing", "evaluate", 0, 100, 1)


@given(st.sampled_from(FACT_TASKS), SEEDS, LENGTHS)
def test_evidence_holds_what_is_expected(task, seed, length):
    made = exercise(task, "evaluate", seed, length, 8)
    assert made.task == task
    assert made.answered
    assert 1 <= len(made.questions) <= 8
    assert made.conversation == (task == "multi_turn")
    for question in made.questions:
        spans = question.evidence
        assert all(0 <= start < stop <= len(made.context) for start, stop in spans)
        assert all(first[1] <= second[0] for first, second in itertools.pairwise(spans)), "in order, apart"
        told = "\n".join(made.context[start:stop] for start, stop in spans)
        if task == "counting":
            assert question.answer == str(len(spans))
        else:
            assert all(each in told for each in question.expected)
        assert all(each in question.answer for each in question.expected)
        assert question.answer.strip() == question.answer
        assert question.text.strip() == question.text


@given(st.sampled_from(VERBATIM), SEEDS, LENGTHS)
def test_the_context_is_asked_back(task, seed, length):
    made = exercise(task, "evaluate", seed, length, 8)
    (question,) = made.questions
    assert made.verbatim
    assert not made.answered
    assert question.answer == made.context
    assert question.expected == (made.context,)
    assert question.evidence == ((0, len(made.context)),)


@given(SEEDS, st.integers(400, 60_000))
@settings(max_examples=60)
def test_a_continuation_is_what_a_bundled_document_says_next(seed, length):
    texts = [path.read_text() for path in documents_folder().glob("0*.md")]
    made = exercise("continuation", "evaluate", seed, length, 8)
    (question,) = made.questions
    assert made.continued
    assert not made.answered
    assert not question.evidence
    assert len(question.answer) == CONTINUED_CHARACTERS
    assert question.answer[0].isspace()
    (text,) = (text for text in texts if question.answer in text)
    before = text[: text.index(question.answer)]
    assert made.context.endswith(before) or before.endswith(made.context)
    assert question.answer not in made.context


def test_profiling_corpora_are_never_continued():
    scored = {text.text for name in bundled_names() for text in load_corpus(name).texts}
    assert not scored & {path.read_text() for path in documents_folder().glob("*.md")}


@given(st.sampled_from(FACT_TASKS), SEEDS, LENGTHS)
def test_nothing_but_the_evidence_tells_the_answer(task, seed, length):
    made = exercise(task, "evaluate", seed, length, 1000)
    for question in made.questions:
        rest = without(made.context, question.evidence)
        if task != "counting":
            assert question.answer not in rest
        if task != "persona":
            word = re.findall(r"[A-Z][a-z]+", question.text)[-1]
            assert not re.search(rf"\b{word}\b", rest), f"{word} is spoken of elsewhere"


def test_numbers_rarely_occur_twice():
    """Fillers and other facts hold numbers of their own, so a value may occur again by chance, without its name."""
    found = again = 0
    for task in set(FACT_TASKS) - {"persona", "counting"}:
        for seed in range(25):
            made = exercise(task, "evaluate", seed, 1500, 8)
            for question in made.questions:
                rest = without(made.context, question.evidence)
                found += 1
                again += any(each in rest for each in question.expected)
    assert again / found < 0.02


@given(st.sampled_from(sorted(TASKS)), SEEDS, LENGTHS, st.integers(1, 9))
@settings(max_examples=60)
def test_the_same_seed_gives_the_same_bytes(task, seed, length, questions):
    first, second = (exercise(task, "evaluate", seed, length, questions) for _ in range(2))
    assert first == second
    assert exercise(task, "evaluate", seed + 1, length, questions).context != first.context
    every = exercise(task, "evaluate", seed, length, 1000)
    assert every.context == first.context, "how many are asked changes no context"
    assert {question.text for question in first.questions} <= {question.text for question in every.questions}


@given(st.sampled_from(FACT_TASKS), SEEDS)
@settings(max_examples=60)
def test_purposes_do_not_share_facts(task, seed):
    train, evaluate = facts(task, "train", seed), facts(task, "evaluate", seed)
    if task == "counting":  # "How many times does Kuvi ring?" has one of five answers
        train, evaluate = ({text for text, _ in found} for found in (train, evaluate))
        assert len(train & evaluate) <= 0.1 * len(train)
    else:
        assert not train & evaluate


@given(st.sampled_from(VERBATIM), SEEDS)
@settings(max_examples=30)
def test_purposes_do_not_share_texts(task, seed):
    assert exercise(task, "train", seed, 600, 1).context != exercise(task, "evaluate", seed, 600, 1).context


@given(st.sampled_from(sorted(TASKS)), SEEDS, st.integers(600, 4000))
def test_contexts_are_as_long_as_asked(task, seed, length):
    made = exercise(task, "evaluate", seed, length, 8)
    assert length - 2 <= len(made.context) <= length + LONGEST_BLOCK


@given(st.sampled_from(sorted(TASKS)), SEEDS)
@settings(max_examples=40)
def test_another_measure_is_obeyed(task, seed):
    made = exercise(task, "evaluate", seed, 200, 8, lambda text: len(text.split()))
    assert 150 <= len(made.context.split()) <= 260


def test_facts_lie_everywhere():
    """The first and the last tenth of contexts hold evidence, and so does the middle."""
    places = []
    for seed in range(60):
        made = exercise("needle", "evaluate", seed, 3000, 100)
        places += [span[0] / len(made.context) for question in made.questions for span in question.evidence]
    tenths = [sum(int(place * 10) == tenth for place in places) / len(places) for tenth in range(10)]
    assert min(tenths) > 0.05
    assert max(tenths) < 0.16
