"""The run record: its bytes, its schema, and what is refused."""

from __future__ import annotations

import json
import platform
import socket
import subprocess
from pathlib import Path

import pytest
from pydantic import ValidationError

from kvprofile.errors import InputError
from kvprofile.records import provenance, run_files
from kvprofile.records.record import Request, RunRecord
from tests.helpers.made_up import make_heads, make_leg, make_record
from tests.helpers.models import ROOT


def written(tmp_path, change):
    """A file with the JSON of a small record, changed in place."""
    raw = json.loads(run_files.to_bytes(make_record(1, looks=2)))
    change(raw)
    path = tmp_path / "run.json"
    path.write_text(json.dumps(raw))
    return path


def test_what_is_written_is_read_and_written_the_same(tmp_path):
    record, path = make_record(), tmp_path / "deep" / "run.json"
    run_files.save(record, path)
    assert run_files.load(path) == record
    assert run_files.to_bytes(run_files.load(path)) == path.read_bytes()
    assert list(path.parent.iterdir()) == [path]


def test_hostile_text_survives_and_lone_surrogates_do_not(tmp_path):
    text = "</script>\x00\x1b[31m\u202eevil\u2066" + "x" * 100_000
    leg = make_leg("0.5", requests=[Request(output=text, expected="a\ud800b")])
    record = make_record(1).model_copy(update={"legs": [leg]})
    run_files.save(record, tmp_path / "run.json")
    (request,) = run_files.load(tmp_path / "run.json").legs[0].requests
    assert request.output == text
    assert request.expected == "a?b"


def test_published_schema_is_the_model():
    published = json.loads((ROOT / "docs" / "run-record.schema.json").read_text())
    assert published == RunRecord.model_json_schema(), "run scripts/write_schema.py"


@pytest.mark.parametrize("version", [0, 2, "1", True, None])
def test_other_versions_are_refused_by_name_in_one_line(tmp_path, version):
    path = written(tmp_path, lambda raw: raw.update(schema_version=version))
    with pytest.raises(InputError, match="this kvprofile reads 1") as refused:
        run_files.load(path)
    assert f"{path}: schema_version of this run record is {version!r}" in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (("surprise",), 1, "surprise: Extra inputs are not permitted"),
        (("legs",), [], "legs: List should have at least 1 item"),
        (("legs", 0, "status"), "failed", "a failed leg has a reason, and only a failed one"),
        (("legs", 0, "reason"), "it broke", "a failed leg has a reason, and only a failed one"),
        (("legs", 4, "retention_asked"), 0.5, "a remote leg has no retention"),
        (("legs", 0, "name"), "a\nb", "holds characters that a terminal cannot print"),
        (("legs", 0, "metrics", "duration"), -1, "greater than or equal to 0"),
        (("legs", 0, "requests", 0, "document"), "nowhere", "about 'nowhere', which is not one of the documents"),
        (("legs", 0, "samples", 1, "t_s"), -5, "samples are not in the order of their times"),
        (("legs", 0, "documents", 1, "name"), "field-manual", "two documents have one name"),
        (("legs", 1, "bound", "fraction"), 0.1, "fraction is not reached / speedup"),
        (("legs", 1, "heads", "budgets", 0, 0), 1.5, "a value outside [0, 1]"),
        (("legs", 1, "heads", "budgets", 0), [1.0], "budgets is not a matrix"),
        (("provenance", "started"), "yesterday", "provenance.started"),
        (("provenance", "git_commit"), "main", "provenance.git_commit"),
    ],
)
def test_what_contradicts_itself_is_refused(tmp_path, place, value, message):
    def change(raw):
        *way, last = place
        for key in way:
            raw = raw[key]
        raw[last] = value

    path = written(tmp_path, change)
    with pytest.raises(InputError) as refused:
        run_files.load(path)
    assert message in str(refused.value)
    assert str(refused.value).startswith(f"{path}: ")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not JSON"),
        (b"\xff", "not UTF-8"),
        (b"[1]", "not a run record"),
        (b'{"schema_version": 1}', "not a run record"),
        (b'{"format": "kvprofile-run", "schema_version": NaN}', "NaN is not allowed"),
        (b"[" * 100_000, "nested too deep"),
    ],
)
def test_files_of_another_kind_are_refused_in_one_line(tmp_path, content, message):
    path = tmp_path / "run.json"
    path.write_bytes(content)
    with pytest.raises(InputError, match=message):
        run_files.load(path)
    with pytest.raises(InputError, match="cannot read"):
        run_files.load(tmp_path / "absent.json")


def test_folders_are_searched_and_other_files_named(tmp_path):
    run_files.save(make_record(1), tmp_path / "b" / "run.json")
    run_files.save(make_record(2), tmp_path / "a" / "run.json")
    (tmp_path / "state.json").write_text('{"finished": 3}')
    found = run_files.collect([tmp_path])
    assert [path.parent.name for path in found.records] == ["a", "b"]
    assert found.others == [tmp_path / "state.json"]
    assert found.notes == []
    with pytest.raises(InputError, match="not a run record"):
        run_files.collect([tmp_path / "state.json"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="run 'kvprofile bench'"):
        run_files.collect([tmp_path / "empty"])


def test_a_broken_record_in_a_folder_is_not_passed_over(tmp_path):
    path = written(tmp_path, lambda raw: raw.update(schema_version=7))
    with pytest.raises(InputError, match="is 7"):
        run_files.collect([tmp_path])
    assert path.exists()


def test_provenance_does_not_name_folders(monkeypatch):
    monkeypatch.setattr(socket, "gethostname", lambda: "host-of-mine")
    monkeypatch.setattr(platform, "node", lambda: "host-of-mine")
    monkeypatch.setattr(platform, "release", lambda: "6.1.0-host-of-mine")
    for name in provenance.VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("LLM_KVZIP_ENABLED", "1")
    monkeypatch.setenv("MOONSHOT_API_KEY", "sk-secret")
    found = provenance.collect(provenance.now())
    text = found.model_dump_json()
    assert found.environment == {"LLM_KVZIP_ENABLED": "1"}
    assert found.versions["torch"]
    assert found.machine.memory_bytes > 2**30
    for private in ("sk-secret", "host-of-mine", str(ROOT), str(Path.home()) + "/"):
        assert private not in text


def test_the_commit_is_the_packages_own_or_unknown(tmp_path):
    assert provenance.source_commit(tmp_path) == ("unknown", None)
    git = ["git", "-C", str(tmp_path), "-c", "user.name=t", "-c", "user.email=t@example.org"]
    subprocess.run([*git, "init", "-q"], check=True)
    (tmp_path / "file").write_text("a")
    subprocess.run([*git, "add", "."], check=True)
    subprocess.run([*git, "commit", "-qm", "one"], check=True)
    commit, dirty = provenance.source_commit(tmp_path.resolve())
    assert (len(commit), dirty) == (40, False)
    (tmp_path / "file").write_text("b")
    assert provenance.source_commit(tmp_path.resolve()) == (commit, True)
    (tmp_path / "site-packages").mkdir()
    assert provenance.source_commit(tmp_path.resolve() / "site-packages") == ("unknown", None)


def test_git_missing_is_unknown(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert provenance.source_commit(ROOT) == ("unknown", None)


def test_head_matrices_fit_the_model():
    with pytest.raises(ValidationError):
        make_heads(0.5).model_validate({"budgets": []})


def test_records_of_version_1_stay_readable():
    path = ROOT / "tests" / "data" / "run-record-v1.json"
    record = run_files.load(path)
    assert run_files.to_bytes(record) == path.read_bytes(), "a field without a new schema version"
    assert [leg.name for leg in record.legs] == ["baseline", "0.5", "remote"]
