"""Disks that are full or read-only: one line, exit code 2, what was there before is untouched, nothing half-written."""

from __future__ import annotations

import shutil

import pytest

from kvprofile.cli import run
from tests.helpers.disks import fill
from tests.helpers.models import POCKET, ROOT

PROFILE = ROOT / "models" / "kv_budget" / "pocket.json"
RECORD = ROOT / "tests" / "data" / "run-record-v1.json"
FAST = ["--context-tokens", "160", "--chunk-tokens", "40", "--corpus", "generate:prose:1:6000", "--device", "cpu"]
EVALUATE = ["--profile", PROFILE, "--tasks", "needle", "--context-tokens", "400", "--contexts", "1", "--questions", "1"]
EVALUATE += ["--retention", "0.5", "--random-seeds", "1", "--sink-tokens", "16", "--recent-tokens", "64"]
REMOTE = ["--model", POCKET, "--remote-only", "--provider", "loopback", "--documents", "pocket"]

COMMANDS = {
    "score": ["score", POCKET, *FAST, "--output", "DISK/out.json"],
    "token scores": ["score", POCKET, *FAST, "--output", "HERE/out.json", "--save-token-scores", "DISK/t.safetensors"],
    "export": ["export", PROFILE, "--format", "vllm", "--retention", "0.5", "--force", "--output", "DISK/out.json"],
    "export of a folder": ["export", PROFILE, "--format", "duo-attention", "--output", "DISK/duo"],
    "import": ["import", "HERE/heads.csv", "--format", "csv", "--model", POCKET, "--output", "DISK/out.json"],
    "plot": ["plot", PROFILE, "--output", "DISK/out.png"],
    "evaluate": ["evaluate", POCKET, *EVALUATE, "--output", "DISK/run"],
    "evaluate's plot": ["evaluate", POCKET, *EVALUATE, "--output", "HERE/run", "--plot", "DISK/out.png"],
    "bench": ["bench", *REMOTE, "--output", "DISK/run"],
    "report": ["report", RECORD, "--output", "DISK/out.html"],
}


def tree(folder):
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def refused(capsys, name, place, here):
    """Run a command on a disk that takes nothing. Gives its last line."""
    assert run(["export", str(PROFILE), "--format", "csv", "--output", str(here / "heads.csv")]) == 0
    capsys.readouterr()
    words = [str(word).replace("DISK", str(place)).replace("HERE", str(here)) for word in COMMANDS[name]]
    before = tree(place)
    code = run(words)
    told = capsys.readouterr().err.strip().splitlines()
    assert code == 2, told
    assert tree(place) == before
    assert told[-1].startswith(f"kvprofile: cannot write {place}"), told
    return told


def put_older_files(place):
    """Results of earlier runs, which must stay."""
    for name in ("out.json", "out.png", "out.html"):
        shutil.copy(PROFILE, place / name)


@pytest.mark.parametrize("name", COMMANDS)
def test_full(name, disk, tmp_path, capsys):
    place, _ = disk
    put_older_files(place)
    fill(place)
    told = refused(capsys, name, place, tmp_path)
    assert "No space left on device" in told[-1]


@pytest.mark.parametrize("name", COMMANDS)
def test_read_only(name, disk, tmp_path, capsys):
    place, mount = disk
    put_older_files(place)
    mount("-o", "remount,ro")
    told = refused(capsys, name, place, tmp_path)
    assert "Read-only file system" in told[-1]


@pytest.mark.parametrize("left_kib", [12, 24, 48])
@pytest.mark.parametrize("name", ["score", "token scores", "evaluate", "plot", "report"])
def test_filling_up(name, left_kib, disk, tmp_path, capsys):
    """Room for the first files and not for all: finished work stays, and with room again the same command ends well."""
    place, _ = disk
    put_older_files(place)
    before = tree(place)
    fill(place, left_kib * 1024)
    words = [str(word).replace("DISK", str(place)).replace("HERE", str(tmp_path)) for word in COMMANDS[name]]
    code = run(words)
    told = capsys.readouterr().err.strip().splitlines()
    if code:
        assert code == 2, told
        assert told[-1].startswith("kvprofile: cannot write"), told
        assert "No space left on device" in told[-1]
        assert before.items() <= tree(place).items()
    (place / "ballast").unlink()
    assert run(words) == 0, capsys.readouterr().err
    assert not list(place.rglob(".*"))
