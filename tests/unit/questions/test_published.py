"""Published benchmarks are read as their own papers score them, recognised by all of their columns, or refused."""

from __future__ import annotations

import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvprofile.bench import documents
from kvprofile.bench.verifiers.base import Case
from kvprofile.bench.verifiers.expected import Expected
from kvprofile.errors import InputError
from kvprofile.questions import published, user_tasks
from kvprofile.questions.columns import Columns
from kvprofile.questions.judge import is_right, score

TEXT = "The ferry leaves at nine. The harbour master is called Ines Vollan. Rain is expected."
CHOICES = ["Ines Vollan", "Ada Brandt", "Olle Ek", "Mara Quist"]
LONGBENCH = {
    "input": "Who is the harbour master?", "context": TEXT, "answers": ["Ines Vollan", "Vollan"], "length": 9,
    "dataset": "hotpotqa", "language": "en", "all_classes": None, "_id": "x",
}  # fmt: skip
LONGBENCH_V2 = {
    "_id": "x", "domain": "d", "sub_domain": "s", "difficulty": "easy", "length": "short", "question": "Who?",
    **{f"choice_{letter}": name for letter, name in zip("ABCD", CHOICES, strict=True)}, "answer": "A", "context": TEXT,
}  # fmt: skip
RULER_QA = {
    "index": 0, "input": f"Read.\n\n{TEXT}\n\nRead.\n\nQuestion: Who is the harbour master?",
    "outputs": ["Ines Vollan", "Vollan"], "length": 9, "answer_prefix": " Answer:",
}  # fmt: skip
RULER_NIAH = {
    "index": 0, "input": f"{TEXT}\nWhat are all the special magic numbers for a, b mentioned in the provided text?",
    "outputs": ["12", "34"], "length": 9, "answer_prefix": " The special magic numbers are",
}  # fmt: skip
KVPRESS = {
    "context": TEXT, "question": "What is the special magic number?\n", "answer_prefix": "The", "answer": ["12", "34"],
    "task": "niah_single_1", "max_new_tokens": 9,
}  # fmt: skip
SCBENCH = {
    "id": 1, "context": TEXT,
    "multi_turns": [{"input": "Who?", "answer": "Ines"}, {"input": "When?", "answer": "nine"}],
}  # fmt: skip
INFINITE = {"id": 1, "context": TEXT, "input": "Who?", "answer": ["Ines Vollan"], "options": []}
LEVAL = {
    "instructions": ["Who is it?\nA. Ines Vollan\nB. Ada Brandt", "How many eggs?"], "outputs": ["A", "18"],
    "input": f"{TEXT}\nThis last paragraph asks nothing.", "source": "exam", "evaluation": "exam",
}  # fmt: skip
QUALITY = {
    "article_id": "1", "set_unique_id": "1_a", "article": TEXT,
    "questions": [{"question": "Who?", "options": CHOICES, "gold_label": 2, "writer_label": 2, "difficult": 0}],
}  # fmt: skip
SQUAD = {
    "id": "1", "title": "t", "context": TEXT, "question": "Who?",
    "answers": {"text": ["Ines Vollan", "Vollan"], "answer_start": [TEXT.index("Ines"), TEXT.index("Vollan")]},
}  # fmt: skip
HOTPOT = {
    "id": "1", "question": "Who?", "answer": "Ines Vollan",
    "context": {"title": ["Boats", "People"], "sentences": [["They sail. ", "At nine."], ["She is Ines Vollan."]]},
}  # fmt: skip
ROWS = {
    "LongBench": LONGBENCH, "LongBench v2": LONGBENCH_V2, "RULER": RULER_QA, "a benchmark as kvpress has it": KVPRESS,
    "InfiniteBench": INFINITE, "SCBench": SCBENCH, "L-Eval": LEVAL, "QuALITY": QUALITY, "SQuAD": SQUAD,
    "HotpotQA": HOTPOT,
}  # fmt: skip


def bring(tmp_path, *rows, name="rows", columns=None):
    file = tmp_path / f"{name}.jsonl"
    file.write_text("\n".join(json.dumps(row) for row in rows))
    return user_tasks.load(str(file), 9, 9, columns and Columns.parse(columns))


def question(tmp_path, row, **more):
    return bring(tmp_path, row, **more).exercises[0].questions[0]


# what is recognised


@pytest.mark.parametrize("name", ROWS)
def test_each_format_is_recognised_and_told(tmp_path, name):
    row = ROWS[name]
    found = bring(tmp_path, row, name="longbook_qa_eng")
    assert found.told[0].startswith(f"longbook_qa_eng.jsonl is read as {name} ({', '.join(row)}): ")


@given(st.sampled_from(sorted(ROWS)), st.data())
def test_a_row_that_lacks_a_column_is_never_read_as_that_format(name, data):
    row = ROWS[name]
    needed = next(each for each in published.FORMATS if each.name == name).columns
    lost = data.draw(st.sampled_from(sorted(needed)))
    rest = {key: value for key, value in row.items() if key != lost}
    found = published.recognise(tuple(rest), rest)
    assert found is None or found.name != name


@given(st.sets(st.sampled_from(["context", "question", "answers", "answer", "input", "outputs", "text"]), max_size=5))
def test_common_names_alone_are_no_format(tmp_path_factory, columns):
    """Rows of which it cannot be known whether all answers are expected ask for a mapping, in one line."""
    row = dict.fromkeys(columns, "a text\nwith two lines") | {"other": 1}
    with pytest.raises(InputError, match=r"are of no known format; 'kvprofile evaluate' takes --columns context=NAME"):
        bring(tmp_path_factory.mktemp("rows"), row)


# as their papers score them


@pytest.mark.parametrize(
    ("row", "answer", "expected"),
    [
        (LONGBENCH, "Vollan", 1.0),
        (LONGBENCH, "Ines", 2 / 3),
        (RULER_QA, "It is Vollan.", 1.0),
        (RULER_QA, "It is Ada.", 0.0),
        (RULER_NIAH, "12 and 34", 1.0),
        (RULER_NIAH, "only 12", 0.5),
        (KVPRESS, "only 12", 0.5),
        (KVPRESS | {"task": "qa_1"}, "only 12", 1.0),
        (LONGBENCH_V2, "The correct answer is (A).", 1.0),
        (LONGBENCH_V2, "It is a river.", 0.0),
        (LONGBENCH_V2, "The correct answer is (B).", 0.0),
        (LEVAL, "A", 1.0),
        (LEVAL, "It is a river.", 0.0),
        (QUALITY, "B. Ada Brandt", 1.0),
        (QUALITY, "A", 0.0),
        (SQUAD, "Vollan", 1.0),
        (SQUAD, "Mrs Vollan", 2 / 3),
        (HOTPOT, "Ines Vollan.", 1.0),
        (SCBENCH, "it is ines", 1.0),
    ],
)
def test_answers_and_their_scores(tmp_path, row, answer, expected):
    asked = question(tmp_path, row)
    assert score(asked, answer) == pytest.approx(expected)
    assert score(asked, asked.answer) == 1.0, "the reference is right"


@pytest.mark.parametrize(
    ("dataset", "more", "answer", "expected"),
    [
        ("trec", {"answers": ["Food"], "all_classes": ["Food", "Country"]}, "Food", 1.0),
        ("trec_e", {"answers": ["Food"], "all_classes": ["Food", "Country"]}, "Food or Country", 0.5),
        ("passage_count", {"answers": ["12"], "input": ""}, "12", 1.0),
        ("passage_retrieval_en", {"answers": ["Paragraph 15"]}, "Paragraph 15", 1.0),
        ("lcc", {"answers": ["return 1"], "input": ""}, "return 1\nelse", 1.0),
        ("gov_report", {"answers": ["A ferry leaves."], "input": ""}, "A ferry leaves.", 1.0),
    ],
)
def test_other_kinds_of_longbench(tmp_path, dataset, more, answer, expected):
    asked = question(tmp_path, LONGBENCH | {"dataset": dataset} | more)
    assert score(asked, answer) == pytest.approx(expected)
    assert asked.text.strip()


@pytest.mark.parametrize(
    ("task", "answers", "answer", "expected"),
    [
        ("passkey", ["71432"], "The key is 71432.", 1.0),
        ("kv_retrieval", "ab-cd", "ab-cd", 1.0),
        ("kv_retrieval", "ab-cd", "ab-cde", 0.0),
        ("longdialogue_qa_eng", ["ACE", "ACE ROTHSTEIN"], "Ace Rothstein", 1.0),
        ("longbook_qa_eng", ["Ines Vollan"], "Ines", 2 / 3),
        ("longbook_qa_chn", ["红门"], "红门。", 1.0),
        ("longbook_sum_eng", ["the ferry leaves at nine"], "the ferry leaves", 0.75),
        ("math_find", [7], "7", 1.0),
        ("code_run", [-3], "It returns -3", 1.0),
    ],
)
def test_tasks_of_infinitebench_by_their_file(tmp_path, task, answers, answer, expected):
    asked = question(tmp_path, INFINITE | {"answer": answers, "input": ""} | {"input": "What?"}, name=task)
    assert score(asked, answer) == pytest.approx(expected)


@pytest.mark.parametrize("right", ["Olle Ek", ["Olle Ek"], ["Olle Ek", "C"], "C"])
def test_options_are_shown_and_judged_by_the_letter(tmp_path, right):
    asked = question(tmp_path, INFINITE | {"options": CHOICES, "answer": right, "input": ""})
    assert "C. Olle Ek\nD. Mara Quist" in asked.text
    assert asked.answer == "C"
    assert is_right(asked, "Olle Ek")
    assert not is_right(asked, "Ada Brandt (B)")


def test_tasks_of_scbench_by_their_file_turn_or_configuration(tmp_path):
    turns = [{"input": "Which?", "answer": ["12", "34"]}]
    assert score(question(tmp_path, SCBENCH | {"multi_turns": turns}, name="scbench_vt"), "12") == 0.5
    assert score(question(tmp_path, SCBENCH | {"multi_turns": turns}, name="scbench_qa_eng"), "12") == 1.0
    with pytest.raises(InputError, match="which task of SCBench this is, its file or configuration must name"):
        bring(tmp_path, SCBENCH | {"multi_turns": turns})
    mixed = [{"input": "Sum?", "answer": "a b c d", "task": "scbench_summary"}, turns[0] | {"task": "scbench_vt"}]
    found = bring(tmp_path, SCBENCH | {"multi_turns": mixed}, name="scbench_summary_with_needles").exercises[0]
    assert [(each.measure, each.any_of) for each in found.questions] == [("rouge-l", True), ("text", False)]
    assert found.conversation
    choice = [{"input": "Who?", "answer": "B", "options": CHOICES}]
    assert question(tmp_path, SCBENCH | {"multi_turns": choice}).measure == "letter"
    with pytest.raises(InputError, match="scbench_repoqa is judged by likeness to functions"):
        bring(tmp_path, SCBENCH, name="scbench_repoqa")


def test_older_lists_of_turns():
    older = {"context": "c", "multi_turns": {"input": ["A?", "B?"], "answer": [1, 2]}}
    found = published._scbench(older, user_tasks.Source("row"))
    assert [each.answer for each in found.questions] == ["1", "2"]


def test_kinds_of_leval(tmp_path):
    rows = [
        LEVAL | {"instructions": ["Sum?"], "outputs": ["a b"], "evaluation": "rouge"},
        LEVAL | {"instructions": ["Sum?"], "outputs": ["a b"], "evaluation": "LLM"},
        LEVAL | {"instructions": ["True or not?"], "outputs": ["True [fact: False]"]},
        LEVAL | {"instructions": ["Which?\n\n (A) Red. \n (B) Blue. \n (C) None. "], "outputs": ["(B) Blue."]},
        LEVAL | {"instructions": ["Which?\nA. Red\nB. Blue\nC. None"], "outputs": ["AC"]},
        LEVAL,
    ]
    found = bring(tmp_path, *rows)
    questions = found.exercises[0].questions
    assert [(each.measure, each.answer) for each in questions] == [
        ("rouge-l", "a b"), ("words", "True"), ("letter", "B"), ("letter", "AC"), ("letter", "A"),
        ("last-number", "18"),
    ]  # fmt: skip
    assert "asks nothing" in found.exercises[0].context
    assert any("evaluation 'LLM' needs a judge" in line for line in found.told)


def test_evidence_where_the_format_tells_it(tmp_path):
    (start, stop), = question(tmp_path, SQUAD).evidence  # fmt: skip
    assert TEXT[start:stop] == "Ines Vollan"


def test_questions_without_an_answer_are_left_out_and_counted(tmp_path):
    found = bring(tmp_path, SQUAD | {"answers": {"text": [], "answer_start": []}}, SQUAD)
    assert len(found.exercises[0].questions) == 1
    assert any("a question that its text does not answer was left out" in line for line in found.told)


def test_paragraphs_become_the_context(tmp_path):
    expected = "Boats\nThey sail. At nine.\n\nPeople\nShe is Ines Vollan."
    pairs = [["Boats", ["They sail. ", "At nine."]], ["People", ["She is Ines Vollan."]]]
    for context in (HOTPOT["context"], pairs):
        assert bring(tmp_path, HOTPOT | {"context": context}).exercises[0].context == expected


# chat templates

OTHER_QUESTION = RULER_QA | {"input": f"{TEXT}\nWho is it?", "outputs": ["Ines"]}

TEMPLATES = [
    ("<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n",
     "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"),
    ("<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n"),
    ("<start_of_turn>user\n", "<end_of_turn>\n<start_of_turn>model\n"),
    ("[INST] ", " [/INST]"),
    ("<|user|>\n", "<|end|>\n<|assistant|>\n"),
    ("<s>", "</s>"),
    ("<BOS_TOKEN><|START_OF_TURN_TOKEN|><|USER_TOKEN|>",
     "<|END_OF_TURN_TOKEN|><|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>"),
    ("<SPECIAL_10>System\n\n<SPECIAL_11>User\n", "\n<SPECIAL_11>Assistant\n"),
    ("", " ASSISTANT:"),
]  # fmt: skip


@pytest.mark.parametrize(("head", "tail"), TEMPLATES)
@pytest.mark.parametrize(
    "row", [RULER_QA, RULER_NIAH, RULER_QA | {"input": f"{TEXT}\nWho is it?", "outputs": ["Ines"]}]
)
def test_another_models_template_is_taken_off_and_told(tmp_path, row, head, tail):
    bare = bring(tmp_path, row).exercises[0]
    found = bring(tmp_path, row | {"input": f"{head}{row['input']}{tail}"})
    assert [(each.context, each.questions) for each in found.exercises] == [(bare.context, bare.questions)]
    assert any("another model's chat template, which was taken off" in line for line in found.told)


def test_ruler_without_line_breaks(tmp_path):
    """--remove_newline_tab of its prepare.py."""
    row = RULER_QA | {"input": " ".join(RULER_QA["input"].split())}
    found = bring(tmp_path, row).exercises[0]
    assert found.questions[0].text == "Question: Who is the harbour master?"
    with pytest.raises(InputError, match="has no context: 'input' is one line"):
        bring(tmp_path, RULER_QA | {"input": "one line only"})


# what is refused, in one line


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (LONGBENCH | {"dataset": "dureader"}, "words that jieba cuts"),
        (LONGBENCH | {"dataset": "new"}, "LongBench has no data set 'new'"),
        (LONGBENCH | {"dataset": "trec"}, "all_classes is not a list"),
        (LONGBENCH | {"input": ""}, "line 1 has no question"),
        (LONGBENCH | {"answers": [""]}, "line 1 has no answer"),
        (LONGBENCH | {"answers": []}, "line 1 has no answer"),
        (LONGBENCH_V2 | {"choice_B": None}, "line 1 has no choice"),
        (LONGBENCH_V2 | {"answer": "E"}, "'E' is neither a letter nor the words of a choice"),
        (RULER_QA | {"input": f"{TEXT}\nWho?", "answer_prefix": "It is"}, "which task of RULER this is does not show"),
        (KVPRESS | {"task": "shortdep_qa"}, "task 'shortdep_qa' is not judged"),
        (INFINITE, "which task of InfiniteBench this is, its file or split must name"),
        (SCBENCH | {"multi_turns": []}, "multi_turns is not a list of turns"),
        (LEVAL | {"outputs": ["A"]}, "are not lists of the same length"),
        (LEVAL | {"evaluation": "human"}, "holds no exercises; evaluation 'human' needs a judge"),
        (
            QUALITY | {"article": "<html><p>a</p></html>"},
            "the article is HTML; take QuALITY's files named htmlstripped",
        ),
        (QUALITY | {"questions": [{"question": "Who?", "options": CHOICES}]}, "has no gold_label"),
    ],
)
def test_rows_that_are_not_read(tmp_path, row, message):
    with pytest.raises(InputError, match=re.escape(message)):
        bring(tmp_path, row)


# a mapping

MINE = {"body": TEXT, "ask": "Who?", "right": ["Ines Vollan", "Vollan"], "more": {"one": "Ines"}, "options": CHOICES}


def test_a_mapping_reads_any_rows(tmp_path):
    asked = question(tmp_path, MINE, columns="context=body, question=ask, answer=right, answers=any")
    assert (asked.expected, asked.any_of, asked.answer) == (("Ines Vollan", "Vollan"), True, "Ines Vollan")
    assert question(tmp_path, MINE, columns="context=body,question=ask,answer=more.one,measure=f1").measure == "f1"
    choice = MINE | {"right": "Olle Ek"}
    assert question(tmp_path, choice, columns="context=body,question=ask,answer=right,choices=options").answer == "C"
    found = bring(tmp_path, MINE, columns="context=body,question=ask,answer=more.one")
    assert found.told[0].startswith("rows.jsonl is read as mapped by --columns (body, ask, right, more, options): ")


@pytest.mark.parametrize("answers", ["any", "all"])
def test_the_user_says_any_or_all_of_a_known_format(tmp_path, answers):
    for row in (LONGBENCH, RULER_QA):
        asked = question(tmp_path, row, columns=f"answers={answers}")
        assert asked.any_of == (answers == "any")
        assert score(asked, "Vollan") == 1.0 if answers == "any" else score(asked, "Vollan") < 1.0
        assert is_right(asked, asked.answer)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ("context=body", "question, answer is missing"),
        ("body", "'body' is not understood"),
        ("context=", "is not understood"),
        ("context=a,context=b", "is not understood"),
        ("answers=some", "answers is any or all"),
        ("measure=nothing", "measure is one of words, text"),
        ("measure=letter", "measure is one of words, text"),
        ("context=body,question=ask,answer=right", "has 2 answers in 'right'; add answers=any"),
        (
            "context=nowhere,question=ask,answer=right",
            "has no column 'nowhere'; it has body, ask, right, more, options",
        ),
        ("context=more,question=ask,answer=ask", "has no context, or one that is not text"),
    ],
)
def test_mappings_that_do_not_work(tmp_path, columns, message):
    with pytest.raises(InputError, match=re.escape(message)):
        bring(tmp_path, MINE, columns=columns)


# our own format, and the benchmark's judge


def test_our_own_format_takes_choices_and_measures(tmp_path):
    entries = [
        {"text": "Who?", "choices": CHOICES, "answer": "Ada Brandt"},
        {"text": "Who?", "answer": "a b", "measure": "f1"},
    ]
    asked = bring(tmp_path, {"context": TEXT, "questions": entries}).exercises[0].questions
    assert [(each.measure, each.answer) for each in asked] == [("letter", "B"), ("f1", "a b")]
    with pytest.raises(InputError, match='"measure" is not one of words'):
        bring(tmp_path, {"context": TEXT, "questions": [{"text": "Who?", "answer": "a", "measure": "letter"}]})


@pytest.mark.parametrize("row", [LONGBENCH_V2, RULER_QA, RULER_NIAH, SQUAD, LEVAL])
@pytest.mark.parametrize("output", ["A", "It is a river.", "Vollan", "only 12", "12 and 34", "Ines Vollan"])
def test_bench_judges_as_evaluate_does(tmp_path, row, output):
    asked = question(tmp_path, row)
    document = documents.load((str(tmp_path / "rows.jsonl"),))[0]
    verdict = Expected().judge(Case(document, document.questions[0], output, "0.5", 0))
    assert verdict.passed == is_right(asked, output)
