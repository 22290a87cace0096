"""kvprofile validate."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from kvprofile.cli import run
from kvprofile.runtime import attestation
from tests.helpers.attestations import make_attestation
from tests.helpers.commands import CONFIG, refused, save, shown

pytestmark = pytest.mark.usefixtures("workplace")


def test_validate_searches_folders_deeply_and_lists_every_problem(capsys):
    save("budgets/good.json")
    save("budgets/deep/er/good.json")
    Path("budgets/deep/empty.json").write_text("")
    Path("budgets/deep/config.json").write_text(json.dumps(CONFIG))
    assert run(["validate", "budgets"]) == 2
    captured = capsys.readouterr()
    assert captured.err == "kvprofile: problems in 2 of 4 budget files\n"
    lines = captured.out.splitlines()
    assert [line[:4] for line in lines] == ["ok  ", "bad ", "bad ", "ok  "]
    assert "not a budget file: JSON with 'model_type', 'hidden_size', 'intermediate_size'" in lines[1]
    assert "empty.json: not JSON" in lines[2]


def test_validate_accepts_a_clean_folder_and_says_what_is_imported(capsys):
    save("models/kv_budget/a.json", imported=True)
    out = shown(capsys, "validate")
    assert out.startswith("ok   models/kv_budget/a.json  6 layers x 4 KV heads")
    assert "imported, not verified against weights" in out


def test_validate_finds_two_files_for_one_model_in_a_folder_only(capsys):
    save("budgets/a.json")
    save("budgets/other/b.json", seed=1)
    shown(capsys, "validate", "budgets")
    save("budgets/b.json", seed=1)
    assert run(["validate", "budgets"]) == 2
    captured = capsys.readouterr()
    assert "bad  budgets: a.json and b.json are for one model, example/model" in captured.out
    assert captured.err == "kvprofile: problems in 1 folder\n"
    assert run(["validate", "budgets", "--json"]) == 2
    document = json.loads(capsys.readouterr().out)
    assert document["ok"] is False
    assert list(document["folders"]) == ["budgets"]
    assert document["files"]["budgets/a.json"] == []


def test_validate_checks_a_file_once(capsys):
    save("budgets/a.json")
    out = shown(capsys, "validate", "budgets", "./budgets", "budgets/a.json")
    assert out.count("ok   ") == 1


def test_validate_survives_loops_of_links(capsys):
    save("budgets/a.json")
    Path("budgets/again").symlink_to(Path("budgets").resolve(), target_is_directory=True)
    Path("budgets/self.json").symlink_to("self.json")
    assert run(["validate", "budgets"]) == 2
    out = capsys.readouterr().out
    assert out.count("ok   ") == 1
    assert "self.json: cannot read" in out


def test_validate_names_folders_it_cannot_read(capsys, monkeypatch):
    save("budgets/a.json")
    Path("budgets/locked").mkdir()
    real = os.scandir

    def scandir(path: str) -> object:
        if str(path).endswith("locked"):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    assert run(["validate", "budgets"]) == 2
    captured = capsys.readouterr()
    assert "bad  budgets/locked: cannot read the folder: Permission denied" in captured.out
    assert captured.err == "kvprofile: problems in 1 folder\n"


def test_validate_does_not_wait_for_pipes(capsys):
    save("budgets/a.json")
    os.mkfifo("budgets/pipe.json")
    assert run(["validate", "budgets"]) == 2
    assert "pipe.json: not a regular file" in capsys.readouterr().out


def test_validate_prints_odd_names_and_contents_as_escapes(capsys):
    save("budgets/a.json")
    Path(os.fsdecode(b"budgets/\xff\x1b[31m.json")).write_text('{"schema_version": 1, "\\u001b[31m": 1, "\\ud800": 2}')
    assert run(["validate", "budgets"]) == 2
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert "\\xff\\x1b[31m.json" in out


def test_validate_says_where_it_looked(capsys):
    assert "no budget files in models/kv_budget" in refused(capsys, "validate")
    assert "nothing.json: cannot read" in (run(["validate", "nothing.json"]), capsys.readouterr().out)[1]
    Path("empty").mkdir()
    assert "no budget files in empty" in refused(capsys, "validate", "empty")


def test_validate_reads_attestations(capsys):
    path = attestation.path_of(save("budgets/a.json"))
    attestation.save(path, [make_attestation()])
    assert "ok   budgets/a.verified.json  attestations\n" in shown(capsys, "validate", "budgets")
    path.write_text(path.read_text().replace('"a device"', '"another"'))
    assert run(["validate", "budgets"]) == 2
    out = capsys.readouterr().out
    assert "bad  budgets/a.verified.json: attestation 1 was changed after it was written" in out
