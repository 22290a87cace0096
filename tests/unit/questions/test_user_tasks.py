"""Exercises that people bring: files of their own and data sets of known columns."""

from __future__ import annotations

import json

import pytest

from kvprofile.errors import InputError
from kvprofile.questions import user_tasks
from kvprofile.questions.tasks import Question


def test_a_file_of_exercises(tmp_path):
    file = tmp_path / "mine.jsonl"
    entries = [
        {
            "context": "Kuvi lives in room 12.",
            "questions": [
                {"text": "Where?", "answer": "Room 12", "expected": ["12"], "evidence": [[0, 22]]},
                {"text": "Who?", "answer": "Kuvi"},
                {"text": "Left out?", "answer": "yes"},
            ],
        },
        {"context": "B", "conversation": True, "questions": [{"text": "C?", "answer": "D", "any_of": True}]},
        {"context": "E", "questions": [{"text": "F?", "answer": "G"}]},
    ]
    file.write_text("\n\n".join(json.dumps(entry) for entry in entries))
    brought = user_tasks.load(str(file), 2, 2)
    found = brought.exercises
    assert brought.name == "mine.jsonl"
    assert [(each.task, each.conversation, len(each.questions)) for each in found] == [
        ("mine.jsonl", False, 2),
        ("mine.jsonl", True, 1),
    ]
    assert found[0].questions[0] == Question("Where?", "Room 12", ("12",), ((0, 22),))
    assert found[0].questions[1].expected == ("Kuvi",)
    assert found[1].questions[0].any_of


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "holds no exercises"),
        ("nothing", "line 1 is not JSON"),
        ("[" * 100_000, "line 1 is not JSON"),
        ("[]", "line 1 is not an object"),
        ('{"context": "a", "questions": []}', 'has no "questions"'),
        ('{"context": "a", "questions": [1]}', "a question is not an object"),
        ('{"questions": [{"text": "b", "answer": "c"}]}', "has no context"),
        ('{"context": "a", "questions": [{"text": "b"}]}', "has no answer"),
        ('{"context": "a", "questions": [{"answer": "b"}]}', "has no question"),
        ('{"context": "a", "questions": [{"text": "b", "answer": " "}]}', "has no answer"),
        ('{"context": "a", "questions": [{"text": "b", "answer": "\\ud800"}]}', "half a surrogate pair"),
        ('{"context": "a", "questions": [{"text": "b", "answer": "c", "expected": []}]}', '"expected" is not a list'),
        ('{"context": "a", "questions": [{"text": "b", "answer": "c", "evidence": [[0, 9]]}]}', "within the context"),
        ('{"context": "a", "questions": [{"text": "b", "answer": "c", "evidence": 1}]}', "within the context"),
    ],
)
def test_files_that_are_not_exercises(tmp_path, content, message):
    (tmp_path / "bad.jsonl").write_text(content)
    with pytest.raises(InputError, match=message):
        user_tasks.load(str(tmp_path / "bad.jsonl"), 5, 5)


def test_references_that_lead_nowhere_are_refused(tmp_path):
    (tmp_path / "latin.jsonl").write_bytes(b'{"context": "\xe4"}')
    for reference, message in [
        ("nothing", r"no task 'nothing'; give a \.jsonl file"),
        (str(tmp_path), "no task"),
        ("x" * 5000, "no task|cannot look for tasks"),
        (str(tmp_path / "latin.jsonl"), "is not UTF-8"),
        ("datasets:", "use datasets:ID_OR_PATH"),
        ("datasets:a:b:c:d", "use datasets:ID_OR_PATH"),
        ("datasets:no/such-data", "cannot load the data set"),
    ]:
        with pytest.raises(InputError, match=message):
            user_tasks.load(reference, 5, 5)
