"""References to data sets: one grammar for every command, one rule for splits, names without machine paths."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvprofile.corpus import datasets_
from kvprofile.corpus.datasets_ import DataSet
from kvprofile.corpus.sources import load_corpus
from kvprofile.errors import InputError
from kvprofile.questions import user_tasks

datasets = pytest.importorskip("datasets")

NAMES = st.text("ab:@.", min_size=1, max_size=6).filter(lambda name: name.strip(".") and not name.endswith((":", "@")))
WORDS = st.text("abcxyz_-", min_size=1, max_size=5)


def table(*rows):
    return datasets.Dataset.from_list(list(rows))


@pytest.mark.parametrize(
    ("reference", "expected"),
    [
        ("datasets:me/mine", DataSet("me/mine")),
        ("datasets:me/mine:test", DataSet("me/mine", "test")),
        ("datasets:me/mine:test:small", DataSet("me/mine", "test", "small")),
        ("datasets:me/mine::small", DataSet("me/mine", "", "small")),
        ("datasets:me/mine@body", DataSet("me/mine", column="body")),
        ("datasets:me/mine:test:small@body", DataSet("me/mine", "test", "small", "body")),
        (r"datasets:C:\data\mine:test@body", DataSet(r"C:\data\mine", "test", column="body")),
        ("datasets:D:/data/mine", DataSet("D:/data/mine")),
    ],
)
def test_the_grammar(reference, expected):
    assert datasets_.parse(reference) == expected


@pytest.mark.parametrize("rest", ["", ":test", "@body", "a:b:c:d", "a:b@", "a@", "a:b@c@d"])
def test_what_does_not_follow_the_grammar(rest):
    with pytest.raises(InputError, match="use datasets:ID_OR_PATH"):
        datasets_.parse(f"datasets:{rest}")


@given(NAMES, st.just("") | WORDS, st.just("") | WORDS, st.just("") | WORDS)
def test_a_path_that_exists_is_the_path(tmp_path_factory, name, split, config, column):
    """Whatever colons and at signs it holds; and its folders never reach a record."""
    folder = tmp_path_factory.mktemp("some:where@home")
    (folder / name).mkdir()
    parts = f":{split}:{config}" if config else f":{split}" if split else ""
    reference = f"datasets:{folder / name}{parts}{f'@{column}' if column else ''}"
    found = datasets_.parse(reference)
    assert found == DataSet(str(folder / name), split, config, column)
    assert found.name == reference.replace(f"{folder}/", "")


def test_one_split_needs_no_name_and_of_several_one_is_named(tmp_path):
    """The same rule for corpora and questions; a guess would read something else than was meant."""
    rows = table({"text": "one", "context": "c", "multi_turns": [{"input": "A?", "answer": "1"}]})
    single, several = tmp_path / "single", tmp_path / "several"
    datasets.DatasetDict({"validation": rows}).save_to_disk(single)
    datasets.DatasetDict({"train": rows, "test": rows}).save_to_disk(several)
    assert load_corpus(f"datasets:{single}").texts[0].name == "validation/0"
    assert load_corpus(f"datasets:{several}:train").name == "datasets:several:train"
    assert user_tasks.load(f"datasets:{single}", 1, 1).name == "datasets:single"
    for load in (load_corpus, lambda reference: user_tasks.load(reference, 1, 1)):
        with pytest.raises(InputError, match=r"choose one split of train, test: datasets:ID_OR_PATH\[:SPLIT"):
            load(f"datasets:{several}")
        with pytest.raises(InputError, match="choose one split of train, test"):
            load(f"datasets:{several}:dev")


def test_a_column_where_the_configuration_stands_is_told(tmp_path):
    """It was a column once; it must not be read as something else without a word."""
    table({"text": "one", "other": "x"}).to_json(tmp_path / "rows.jsonl")
    table({"text": "one", "other": "x"}).save_to_disk(tmp_path / "saved")
    for name in ("rows.jsonl", "saved"):
        with pytest.raises(InputError, match="has no configurations; for a column of texts write @other"):
            load_corpus(f"datasets:{tmp_path / name}:train:other")
    (tmp_path / "folder").mkdir()
    table({"text": "one", "other": "x"}).to_json(tmp_path / "folder" / "rows.jsonl")
    with pytest.raises(InputError, match="a column of texts is written @other"):
        load_corpus(f"datasets:{tmp_path / 'folder'}:train:other")


def test_columns_of_texts_are_for_corpora(tmp_path):
    table({"title": "one", "other": "x"}).save_to_disk(tmp_path / "saved")
    assert load_corpus(f"datasets:{tmp_path / 'saved'}@other").texts[0].text == "x"
    with pytest.raises(InputError, match="name the column of texts, @COLUMN, one of title, other"):
        load_corpus(f"datasets:{tmp_path / 'saved'}")
    with pytest.raises(InputError, match="@COLUMN is for the texts of 'kvprofile score'"):
        user_tasks.load(f"datasets:{tmp_path / 'saved'}@other", 1, 1)


def test_other_files_are_named(tmp_path):
    (tmp_path / "rows.xlsx").write_bytes(b"PK")
    with pytest.raises(InputError, match=r"datasets reads \.json, \.jsonl, \.csv, \.parquet, \.txt files"):
        datasets_.load("datasets:rows.xlsx", DataSet(str(tmp_path / "rows.xlsx")))
    assert not DataSet("a\0b").is_local
    assert Path(DataSet(str(tmp_path)).name).name == f"datasets:{tmp_path.name}"
