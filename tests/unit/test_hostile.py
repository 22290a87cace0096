"""Places where nobody looks: pipes and devices among files, names that climb out of folders, links in circles."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from kvprofile.bench.documents import load as load_documents
from kvprofile.budget import runtime_file, store
from kvprofile.cli import run
from kvprofile.corpus.sources import load_corpus
from kvprofile.errors import InputError
from kvprofile.files import read_json
from kvprofile.report import run_files
from kvprofile.runtime.find import Served, find
from kvprofile.runtime.settings import from_environment
from tests.unit.factories import make_profile

SERVED = Served(("made-up/model",), 6, 8, 4, 64, 1)
CLIMBING = [
    "../../outside",
    "/outside",
    "a/../../outside",
    "~/outside",
    "C:\\outside",
    "x\0y",
    "-rf",
    "x\n[y]",
    "‮gnp.x",
]


@pytest.fixture(params=["pipe", "device", "circle"])
def trap(request, tmp_path: Path) -> Path:
    """A path ending in .json that must not be read: it would wait or go on for ever."""
    path = tmp_path / "traps" / "trap.json"
    path.parent.mkdir()
    if request.param == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to("/dev/zero" if request.param == "device" else path.name)
    return path


@pytest.mark.parametrize("read", [store.load, runtime_file.load, run_files.load], ids=["budget", "runtime", "record"])
def test_what_is_no_file_is_refused_unread(trap, read):
    with pytest.raises(InputError, match=r"not a regular file|cannot read|no run record"):
        read(trap)


def test_json_is_read_from_files_alone(trap):
    with pytest.raises(ValueError, match=r"not a regular file|cannot read"):
        read_json(trap, 1000, "test file")


def test_a_server_starts_beside_a_trap_and_not_with_one(trap):
    with pytest.raises(InputError, match=r"not a regular file|cannot read"):
        find(from_environment({"LLM_KVZIP_BUDGET": str(trap), "LLM_KVZIP_RETENTION": "0.5"}), SERVED)
    profile = make_profile()
    store.save(profile, trap.parent / "good.json")
    served = Served((profile.model.name,), 6, 8, 4, 64, 1)
    budget, origin = find(
        from_environment({"LLM_KVZIP_BUDGET_DIR": str(trap.parent), "LLM_KVZIP_RETENTION": "0.5"}), served
    )
    assert budget.heads == 24
    assert "good.json" in origin


@pytest.mark.parametrize("command", ["show", "validate", "report"])
def test_commands_do_not_wait_for_traps(trap, command, capsys, tmp_path):
    output = ["--output", str(tmp_path / "page.html")] if command == "report" else []
    assert run([command, str(trap), *output]) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1


def test_corpora_and_documents_pass_traps_over(trap):
    (trap.parent / "good.txt").write_text("a text")
    assert [text.name for text in load_corpus(str(trap.parent)).texts] == ["good.txt"]
    os.mkfifo(trap.parent / "trap.md")
    (trap.parent / "good.txt").unlink()
    with pytest.raises(InputError, match=r"no \.md files"):
        load_documents((str(trap.parent),))


@pytest.mark.parametrize("name", CLIMBING)
@pytest.mark.parametrize("command", ["show", "plot", "plan", "evaluate", "score"])
def test_model_names_lead_nowhere_else(command, name, workplace, capsys):
    outside = workplace.parent / "outside.json"
    outside.write_text("{}")
    more = {"plot": ["--output", "x.svg"], "plan": ["--gpu-memory", "24GiB", "--context", "100"]}
    code = run([command, *more.get(command, []), "--", name])
    error = capsys.readouterr().err
    assert code == 2
    assert len(error.strip().splitlines()) == 1
    assert error.rstrip("\n").isprintable()
    assert outside.read_text() == "{}"
    assert [path for path in workplace.rglob("*") if path.is_file()] == []


def test_an_imported_model_stays_in_the_folder_whatever_it_is_called(workplace):
    store.save(make_profile(name="../../../outside"), workplace / "made.json")
    assert run(["export", "made.json", "--format", "vllm", "--retention", "0.5", "--output", "out.json"]) == 0
    assert run(["import", "out.json", "--format", "vllm"]) == 0
    inside = (workplace / store.BUDGET_DIR).resolve()
    assert [path.parent for path in inside.rglob("*.json")] == [inside]
    assert not list(workplace.parent.glob("outside*"))


def test_a_result_through_a_link_replaces_what_the_link_names_and_nothing_beside_it(workplace):
    target = workplace / "elsewhere"
    target.mkdir()
    (workplace / "link.json").symlink_to(target / "real.json")
    store.save(make_profile(), workplace / "link.json")
    assert (workplace / "link.json").is_symlink()
    assert [path.name for path in target.iterdir()] == ["real.json"]
