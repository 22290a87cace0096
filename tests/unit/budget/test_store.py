"""The budget file itself: its bytes, its schema, and everything that is refused."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvprofile.budget import store
from kvprofile.budget.profile import PRESETS, Profile, retention_key, round_significant
from kvprofile.errors import InputError
from tests.helpers.factories import make_profile
from tests.helpers.models import ROOT


@pytest.fixture
def raw():
    return json.loads(store.to_bytes(make_profile(3, 4)))


def problems_of(raw, tmp_path):
    file = tmp_path / "file.json"
    file.write_text(json.dumps(raw))
    found = store.problems(file)
    return [] if isinstance(found, Profile) else found


@settings(deadline=None, max_examples=25)
@given(layers=st.integers(1, 12), kv_heads=st.integers(1, 9))
def test_what_is_written_is_read_and_written_the_same(tmp_path_factory, layers, kv_heads):
    file = tmp_path_factory.mktemp("round") / "trip.json"
    profile = make_profile(layers, kv_heads)
    store.save(profile, file)
    assert store.load(file) == profile
    assert store.to_bytes(store.load(file)) == file.read_bytes()


def test_one_line_for_each_layer_and_sorted_keys(raw):
    text = store.to_bytes(make_profile(3, 4)).decode()
    assert list(raw) == sorted(raw)
    row = json.dumps(raw["scores"]["max"][1])
    assert sum(line.strip().rstrip(",") == row for line in text.splitlines()) >= 1
    assert text.endswith("}\n")


def test_published_schema_is_the_model():
    published = json.loads((ROOT / "docs" / "budget-file.schema.json").read_text())
    assert published == Profile.model_json_schema(), "run scripts/write_schema.py"


def test_every_shipped_file_is_valid_and_has_the_presets():
    files = sorted((ROOT / "models" / "kv_budget").rglob("*.json"))
    assert len(files) >= 11
    for file in files:
        profile = store.load(file)
        assert {retention_key(r) for r in PRESETS} <= set(profile.budgets)
        assert store.to_bytes(profile) == file.read_bytes()


def test_all_problems_of_a_file_at_once(raw, tmp_path):
    raw["scores"]["max"][0][1] = 1.5
    raw["budgets"]["0.5"]["heads"][2] = [1.0]
    raw["budgets"]["0.4000"] = raw["budgets"]["0.3"]
    (line,) = problems_of(raw, tmp_path)
    assert "scores.max layer 0 has 1.5, outside [0, 1]" in line
    assert "budgets['0.5'].heads is 3 x 1/4, the model is 3 x 4" in line
    assert "budgets['0.4000'] is not a retention" in line


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (("schema_version",), 3, "schema_version is 3, this kvprofile reads 1 and 2"),
        (("schema_version",), True, "schema_version is True"),
        (("schema_version",), None, "schema_version is None"),
        (("surprise",), 1, "Extra inputs are not permitted"),
        (("model", "geometry", "layers"), 4, "layer_types has 3 entries for 4 layers"),
        (("model", "geometry", "kv_heads"), 3, "do not divide into 3 KV heads"),
        (("model", "geometry_sha256"), "0" * 64, "does not match geometry"),
        (("model", "revision"), "main", "should match pattern"),
        (("scoring", "statistic"), "median", "which the file does not hold"),
        (("budgets", "0.5", "retention_realised"), 0.9, "retention_realised is 0.9, its heads say"),
        (("runtime", "recent_tokens"), 0, "greater than or equal to 1"),
        (("scores", "max", 0, 0), None, "layer 0 has a null"),
    ],
)
def test_refused(raw, tmp_path, place, value, message):
    inner = raw
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    assert message in " ".join(problems_of(raw, tmp_path))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not JSON"),
        (b"[]", "not an object"),
        (b"\xff", "not UTF-8 at byte 0"),
        (b'{"schema_version": NaN}', "NaN is not allowed"),
        (b"[" * 200_000, "not JSON"),
    ],
)
def test_not_a_budget_file(tmp_path, content, message):
    file = tmp_path / "file.json"
    file.write_bytes(content)
    with pytest.raises(InputError, match=message) as caught:
        store.load(file)
    assert "\n" not in str(caught.value)


def test_nan_in_scores(raw, tmp_path):
    file = tmp_path / "file.json"
    raw["scores"]["max"][0][0] = float("nan")
    file.write_text(json.dumps(raw))
    assert store.problems(file) == ["not JSON: NaN is not allowed"]


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    from kvprofile import files

    file = tmp_path / "file.json"
    store.save(make_profile(3, 4), file)
    before = file.read_bytes()

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(InputError, match="No space left on device"):
        store.save(make_profile(2, 2), file)
    assert file.read_bytes() == before
    assert [f.name for f in tmp_path.iterdir()] == ["file.json"]


@given(st.floats(0, 1), st.integers(1, 9))
def test_rounding_keeps_significant_digits(value, digits):
    rounded = round_significant(value, digits)
    assert rounded == round_significant(rounded, digits)
    assert abs(rounded - value) <= 0.51 * 10 ** (1 - digits) * max(value, 1e-300)
