"""The results of an evaluation on disk: only whole exercises count, and nobody else's folder is touched."""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import replace

import pytest

from kvprofile.errors import InputError
from kvprofile.evaluate.item_store import AnswerSpan, ItemStore, read_items
from tests.helpers.evaluations import ITEM


def lines(exercises):
    return [replace(ITEM, exercise=name, question=number) for name, count in exercises for number in range(count)]


def test_spans_survive_the_file_and_older_items_have_none(tmp_path):
    spans = (AnswerSpan(1, 64, 60, 0.5, 0.9, 0.123456789), AnswerSpan(65, 70, 6, 0.25, 1.0, 0.0))
    item = replace(ITEM, spans=spans)
    older = {name: value for name, value in json.loads(ITEM.to_line()).items() if name != "spans"}
    path = tmp_path / "items.jsonl"
    path.write_text(item.to_line() + json.dumps(older) + "\n")
    found = read_items(path)
    assert found[0].spans == (replace(spans[0], kl=0.123457), spans[1])
    assert found[0].spans[0].right_share == 60 / 64
    assert found[1] == replace(ITEM, nll=0.123457)
    for broken in ({**older, "spans": 3}, {**older, "spans": [{"first": 1}]}, {**older, "more": 1}):
        path.write_text(json.dumps(broken) + "\n")
        with pytest.raises(InputError, match="line 1 is not an item"):
            read_items(path)


def test_items_survive_the_file(tmp_path):
    odd = replace(ITEM, generated='line\nbreak "ü" \u2028', right=None, depth=None, length=None)
    store = ItemStore(tmp_path / "run", "key")
    assert store.open({}, [("needle/300/0", 2)]) == 0
    store.append([ITEM, odd])
    assert store.items() == [replace(ITEM, nll=0.123457), replace(odd, nll=0.123457)]
    assert ITEM.length_inflation == 1.0
    (tmp_path / "bad.jsonl").write_text(ITEM.to_line() + "{}\n")
    with pytest.raises(InputError, match="line 2 is not an item"):
        read_items(tmp_path / "bad.jsonl")


PLAN = [("a", 2), ("b", 3), ("c", 2)]


@pytest.mark.parametrize(
    ("kept", "finished"), [(0, 0), (1, 0), (2, 1), (4, 1), (4.5, 1), (5, 2), (6.5, 2), (7, 3)], ids=str
)
def test_only_whole_exercises_count(tmp_path, kept, finished):
    store = ItemStore(tmp_path / "run", "key")
    store.open({}, PLAN)
    written = [item.to_line() for item in lines(PLAN)]
    whole = int(kept)
    cut = written[whole][:40] if kept > whole else ""
    store.path.write_text("".join(written[:whole]) + cut)
    again = ItemStore(tmp_path / "run", "key")
    assert again.open({}, PLAN) == finished
    assert store.path.read_text() == "".join(written[: sum(count for _, count in PLAN[:finished])])


def test_other_settings_and_other_folders_are_left_alone(tmp_path):
    folder = tmp_path / "run"
    store = ItemStore(folder, "key")
    store.open({"note": 1}, PLAN)
    store.append(lines(PLAN[:1]))
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    with pytest.raises(InputError, match="other settings; pass --force"):
        ItemStore(folder, "another").open({}, PLAN)
    store.path.write_bytes(b"")  # begun, without an item: who is refused takes nothing away
    with pytest.raises(InputError, match="other settings"), ItemStore(folder, "another").opened({}, PLAN):
        pass
    assert {file.name for file in folder.iterdir()} == before.keys()
    store.append(lines(PLAN[:1]))
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
    assert ItemStore(folder, "another").open({}, PLAN, force=True) == 0
    assert store.path.read_bytes() == b""
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "items.jsonl").write_text("mine")
    for force in (False, True):
        with pytest.raises(InputError, match="is not an evaluation's folder"):
            ItemStore(precious, "key").open({}, PLAN, force)
    assert (precious / "items.jsonl").read_text() == "mine"


def test_an_empty_record_leaves_nothing_behind(tmp_path):
    store = ItemStore(tmp_path / "deep" / "run", "key")
    with suppress(KeyError), store.opened({}, PLAN):
        assert store.path.is_file()
        raise KeyError
    assert list(tmp_path.iterdir()) == []
    with suppress(KeyError), store.opened({}, PLAN):
        store.append(lines(PLAN[:1]))
        raise KeyError
    assert len(store.items()) == 2
