"""Documents of a benchmark: bundled, made up from a seed, and from files."""

from __future__ import annotations

import json

import pytest

from kvprofile.bench import documents, prepare
from kvprofile.bench.documents import load as load_documents
from kvprofile.bench.verifiers import BUILT_IN
from kvprofile.bench.verifiers.base import Case
from kvprofile.corpus.sources import load_corpus
from kvprofile.errors import InputError


def test_pocket_documents_are_their_own():
    """Seeded, different for every seed, and no exercise of the evaluation."""
    from kvprofile.questions.tasks import exercise

    first, same, other = documents.pocket(0), documents.pocket(0), documents.pocket(1)
    assert first == same
    assert not {d.sha256 for d in first} & {d.sha256 for d in other}
    evaluated = exercise("needle", "evaluate", 0, documents.POCKET_TASKS["needle"], 6)
    assert evaluated.context not in {d.text for d in first}
    for document in first:
        assert 3 <= len(document.questions) <= 6
        for question in document.questions:
            assert all(text in document.text for text in question.expected)


def test_bundled_documents_hold_their_answers():
    """Every reference answer passes its own question's verifiers, and what is expected stands in the document."""
    from kvprofile.corpus.sources import bundled_names

    profiled = {text.text for name in bundled_names() for text in load_corpus(name).texts}
    found = documents.load(("bundled",))
    assert len(found) == 3
    for document in found:
        assert document.text not in profiled
        plain = document.text.replace("*", "")
        assert len(document.voice_samples) == 8
        assert all(sample in plain for sample in document.voice_samples)
        assert sum(question.in_voice for question in document.questions) == 4
        for question in document.questions:
            there = [text in document.text for text in question.expected]
            assert not there or (any(there) if question.any_of else all(there)), question.text
            if question.in_voice:
                continue
            asked = Case(document, question, question.answer, "reference", 0)
            verdicts = [BUILT_IN[name]().judge(asked) for name in ("expected", "pattern", "json-schema")]
            assert any(verdict is not None for verdict in verdicts), question.text
            assert all(verdict.passed for verdict in verdicts if verdict is not None), question.text


def test_bundled_documents_are_about_9000_tokens_long():
    """In characters and words, so that no tokenizer is needed: 8,900 to 9,300 tokens were counted at these sizes."""
    for document in documents.load(("bundled",)):
        assert 32_300 < len(document.text) < 35_600, document.name
        assert 6_200 < len(document.text.split()) < 7_200, document.name
        assert len(document.text) / prepare.CHARACTERS_PER_TOKEN == pytest.approx(9000, rel=0.06), document.name


def test_documents_from_files(tmp_path):
    (tmp_path / "a.md").write_text("# A\nThe code is 17.")
    (tmp_path / "a.json").write_text(json.dumps({"questions": [{"text": "Which code?", "expected": ["17"]}]}))
    (document,) = documents.load((str(tmp_path),))
    assert document.name == "a"
    assert document.questions[0].expected == ("17",)
    assert documents.load((str(tmp_path / "a.md"),)) == [document]
    with pytest.raises(InputError, match="two documents are called a"):
        documents.load((str(tmp_path), str(tmp_path / "a.md")))
    (tmp_path / "a.json").write_text(json.dumps({"questions": [{"texts": "?"}]}))
    with pytest.raises(InputError, match=r"a\.json: questions\.0"):
        documents.load((str(tmp_path),))
    (tmp_path / "b.md").write_text("x")
    (tmp_path / "a.json").write_text(json.dumps({"questions": [{"text": "?"}]}))
    with pytest.raises(InputError, match=r"b\.json: cannot read: No such file"):
        documents.load((str(tmp_path),))
    with pytest.raises(InputError, match="no documents 'nothing'"):
        documents.load(("nothing",))


def test_openings_are_unlike_each_other():
    found = [documents.unique_opening(seed, number) for seed in range(3) for number in range(-5, 500)]
    assert len(set(found)) == len(found)
    firsts = [text.split(".")[0] for text in found]
    assert len(set(firsts)) > 0.95 * len(firsts)


def test_documents_are_not_read_through_links_out_of_their_folder(tmp_path):
    """What is read here is sent to providers."""
    folder = tmp_path / "documents"
    folder.mkdir()
    (tmp_path / "secret").write_text("mine")
    (folder / "notes.json").write_text('{"questions": [{"text": "?"}]}')
    (folder / "notes.md").symlink_to(tmp_path / "secret")
    with pytest.raises(InputError, match="is a link out of its folder"):
        load_documents((str(folder),))
