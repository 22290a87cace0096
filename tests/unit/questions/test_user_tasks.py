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
    name, found = user_tasks.load(str(file), 2, 2)
    assert name == "mine.jsonl"
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
        ("[]", 'has no "questions"'),
        ('{"context": "a", "questions": []}', 'has no "questions"'),
        ('{"context": "a", "questions": [1]}', "a question is no object"),
        ('{"questions": [{"text": "b", "answer": "c"}]}', "has no context"),
        ('{"context": "a", "questions": [{"text": "b"}]}', "has no answer"),
        ('{"context": "a", "questions": [{"answer": "b"}]}', "has no text"),
        ('{"context": "a", "questions": [{"text": "b", "answer": " "}]}', "has no answer"),
        ('{"context": "a", "questions": [{"text": "b", "answer": "\\ud800"}]}', "half a surrogate pair"),
        ('{"context": "a", "questions": [{"text": "b", "answer": "c", "expected": []}]}', '"expected" is no list'),
        ('{"context": "a", "questions": [{"text": "b", "answer": "c", "evidence": [[0, 9]]}]}', "within the context"),
        ('{"context": "a", "questions": [{"text": "b", "answer": "c", "evidence": 1}]}', "within the context"),
    ],
)
def test_files_that_are_none(tmp_path, content, message):
    (tmp_path / "bad.jsonl").write_text(content)
    with pytest.raises(InputError, match=message):
        user_tasks.load(str(tmp_path / "bad.jsonl"), 5, 5)


def test_references_that_lead_nowhere(tmp_path):
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


def saved(tmp_path, rows, split=None):
    import datasets

    table = datasets.Dataset.from_list(rows)
    folder = tmp_path / "data"
    (table if split is None else datasets.DatasetDict(dict.fromkeys(split, table))).save_to_disk(folder)
    return f"datasets:{folder}"


def test_columns_of_longbench(tmp_path):
    rows = [
        {"context": "a b c", "input": "First?", "answers": ["one", "uno"]},
        {"context": "a b c", "input": "Second?", "answers": ["two"]},
        {"context": "d e f", "input": "Third?", "answers": ["three"]},
    ]
    name, found = user_tasks.load(saved(tmp_path, rows), 5, 5)
    assert name == "datasets:data"
    assert [[q.text for q in each.questions] for each in found] == [["First?", "Second?"], ["Third?"]]
    assert found[0].questions[0] == Question("First?", "one", ("one", "uno"), (), any_of=True)


def test_columns_of_ruler(tmp_path):
    rows = [{"index": 0, "input": "Memorize.\nlong text\nWhat are the numbers?\n", "outputs": ["12", "34"]}]
    _, found = user_tasks.load(saved(tmp_path, rows, ("validation", "test")) + ":test", 5, 5)
    assert found[0].context == "Memorize.\nlong text"
    assert found[0].questions == (Question("What are the numbers?", "12, 34", ("12", "34"), ()),)
    with pytest.raises(InputError, match="choose one split of validation, test"):
        user_tasks.load(f"datasets:{tmp_path / 'data'}:train", 5, 5)


def test_columns_of_scbench(tmp_path):
    turns = [{"input": "A?", "answer": "1"}, {"input": "B?", "answer": "2"}]
    _, found = user_tasks.load(saved(tmp_path, [{"context": "c", "multi_turns": turns}] * 2, ("test",)), 5, 5)
    assert [(each.conversation, [q.answer for q in each.questions]) for each in found] == [(True, ["1", "2"])] * 2
    older = {"context": "c", "multi_turns": {"input": ["A?", "B?"], "answer": [1, 2]}}
    assert [q.answer for q in user_tasks._conversation(older, "row").questions] == ["1", "2"]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "a"}, "columns text are not those of LongBench"),
        ({"context": "a", "input": "", "answers": ["b"]}, "row 0 has no question"),
        ({"context": "a", "input": "b", "answers": [""]}, "row 0 has no answer"),
        ({"input": "one line only", "outputs": ["b"]}, "row 0 has no context"),
    ],
)
def test_data_sets_of_other_kinds(tmp_path, row, message):
    with pytest.raises(InputError, match=message):
        user_tasks.load(saved(tmp_path, [row]), 5, 5)


def test_a_json_file_of_a_data_set(tmp_path):
    file = tmp_path / "ruler.jsonl"
    file.write_text(json.dumps({"input": "text\nWho?", "outputs": ["me"]}) + "\n")
    name, found = user_tasks.load(f"datasets:{file}", 5, 5)
    assert (name, found[0].questions[0].answer) == ("datasets:ruler.jsonl", "me")
