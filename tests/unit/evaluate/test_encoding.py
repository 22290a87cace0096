"""Questions as token ids: what follows the context, where turns end, and which evidence trimmed heads cannot see."""

from __future__ import annotations

import copy
import json
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvprofile.budget.trim import TrimRule
from kvprofile.evaluate import encoding
from kvprofile.questions.tasks import exercise

RULE = TrimRule(16, 64)


@pytest.fixture(scope="module")
def words(tokenizer, tmp_path_factory):
    return encoding.wording(tokenizer, SimpleNamespace(eos_token_id=3), tmp_path_factory.mktemp("none"))


def asked_exercise(task, tokenizer, words, rule=RULE, length=300, seed=0, questions=6):
    made = exercise(task, "test", seed, length, questions, lambda text: len(encoding.encode(tokenizer, text)))
    return encoding.ask(f"{task}/{seed}", made, length, tokenizer, words, rule)


def test_questions_follow_the_context(tokenizer, words):
    asked = asked_exercise("needle", tokenizer, words)
    assert tokenizer.decode(asked.context_ids) == f"<|user|>\n{asked.exercise.context}"
    assert len(asked.rows) == len(asked.exercise.questions)
    for number, question in enumerate(asked.exercise.questions):
        (row,) = [row for row in asked.rows if row.references[0].question == number]
        assert tokenizer.decode(row.ids) == f"\n\n{question.text}\n<|assistant|>\n{question.answer}"
        reference = row.references[0]
        assert tokenizer.decode(reference.answer_ids) == f"{question.answer}<|end|>"
        assert row.ids[reference.start :] == reference.answer_ids[:-1]
        assert asked.prompt(number) == row.ids[: reference.start]


def test_a_text_goes_on_in_the_same_turn(tokenizer, words):
    asked = asked_exercise("continuation", tokenizer, words)
    (row,) = asked.rows
    (reference,) = row.references
    assert len(reference.answer_ids) == encoding.CONTINUED_TOKENS
    assert (reference.question, reference.start) == (0, 1)
    assert row.ids[1:] == reference.answer_ids[:-1]
    told = tokenizer.decode((*asked.context_ids, row.ids[0], *reference.answer_ids))
    assert f"<|user|>\n{asked.exercise.context}{asked.exercise.questions[0].answer}".startswith(told)
    assert (asked.depths, asked.outside) == ((None,), (None,))
    assert asked.positions == len(asked.context_ids) + encoding.CONTINUED_TOKENS
    fewer = encoding.ask("t", asked.exercise, None, tokenizer, words, TrimRule(4, 32), continued_tokens=20)
    assert fewer.rows[0].references[0].answer_ids == reference.answer_ids[:20]


def test_a_conversation_is_what_the_template_renders(tokenizer, words):
    asked = asked_exercise("multi_turn", tokenizer, words, questions=3)
    (row,) = asked.rows
    first, second, third = asked.exercise.questions
    messages = [
        {"role": "user", "content": f"{asked.exercise.context}\n\n{first.text}"},
        {"role": "assistant", "content": first.answer},
        {"role": "user", "content": second.text},
        {"role": "assistant", "content": second.answer},
        {"role": "user", "content": third.text},
    ]
    rendered = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert tokenizer.decode((*asked.context_ids, *row.ids)) == rendered + third.answer
    assert asked.prompt(2) == row.ids[: row.references[2].start]
    for reference in row.references[:2]:  # what a read predicts at these places is the answer and its end
        assert row.ids[reference.start : reference.start + len(reference.answer_ids)] == reference.answer_ids


CHATML = (
    "{% for m in messages %}<|user|>{{ m['role'] }}\n{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


ONE_TURN = "{% if messages|length > 1 %}{{ raise_exception('one turn') }}{% endif %}<|user|>{{ messages[0].content }}"


@pytest.mark.parametrize(
    ("template", "eos", "end", "between"),
    [
        (CHATML, 3, "<|end|>", "<|end|>\n<|user|>user\n"),
        (CHATML, 0, "<|end|>", "<|end|>\n<|user|>user\n"),  # the tokenizer's end is another token than a turn's
        (ONE_TURN, 3, "<|end|>", "\n\n"),
        (None, 3, "<|end|>", "\n\n"),
        (None, None, "", "\n\n"),
    ],
)
def test_the_end_of_a_turn_comes_from_the_template(tokenizer, tmp_path, template, eos, end, between):
    other = copy.deepcopy(tokenizer)
    other.chat_template = template
    other.eos_token = None if eos is None else other.convert_ids_to_tokens(eos)
    if eos == 0:
        (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, 3]}))
    words = encoding.wording(other, SimpleNamespace(eos_token_id=None), tmp_path)
    assert other.decode(words.end_ids) == end
    assert other.decode(words.next_ids) == between
    assert set(words.end_ids) <= words.stop_ids
    assert words.stop_ids == ({0, 3} if eos == 0 else {eos} if eos is not None else set())
    asked = asked_exercise("multi_turn", other, words, questions=2)
    (row,) = asked.rows
    first = row.references[0]
    assert (
        row.ids[first.start : first.start + len(first.answer_ids) - len(words.end_ids)]
        == (first.answer_ids[: len(first.answer_ids) - len(words.end_ids)])
    )
    last = row.references[-1]  # logits at every place but the last predict an answer token
    assert len(row.ids) == last.start + len(last.answer_ids) - 1


@given(st.integers(0, 1000), st.sampled_from(("needle", "variables", "functions", "persona", "multi_value")))
def test_outside_means_that_no_trimmed_head_sees_the_evidence(tokenizer, words, seed, task):
    rule = TrimRule(20, 50, 8)
    asked = asked_exercise(task, tokenizer, words, rule, seed=seed)
    ids, prefix = asked.context_ids, len(words.frame.prefix_ids)
    ends = [len(tokenizer.decode(ids[prefix:stop])) for stop in range(prefix, len(ids) + 1)]
    for question, outside, depth in zip(asked.exercise.questions, asked.outside, asked.depths, strict=True):
        seen = {
            rule.sees(len(ids), prefix + token, len(ids))
            for start, stop in question.evidence
            for token in range(len(ids) - prefix)
            if ends[token] < stop and ends[token + 1] > start
        }
        assert outside == (seen == {False})
        assert 0 <= depth <= 1


def test_places_without_offsets_are_a_little_wider(tokenizer, words):
    class Slow:
        """The same tokenizer, which gives no offsets."""

        is_fast = False

        def __call__(self, *arguments, **options):
            return tokenizer(*arguments, **options)

    fast, slow = (asked_exercise("needle", each, words, TrimRule(16, 64, 8)) for each in (tokenizer, Slow()))
    assert fast.context_ids == slow.context_ids
    assert slow.depths == pytest.approx(fast.depths, abs=0.01)
    assert all(not ours or theirs for ours, theirs in zip(slow.outside, fast.outside, strict=True))


def test_what_is_asked_back_has_no_place(tokenizer, words):
    asked = asked_exercise("repeat", tokenizer, words)
    assert (asked.outside, asked.depths) == ((None,), (None,))
    assert asked.positions == len(asked.context_ids) + len(asked.rows[0].ids)
