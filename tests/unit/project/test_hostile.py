"""Places where nobody looks: pipes and devices among files, names that climb out of folders, links in circles."""

from __future__ import annotations

import copy
import json
import os
from pathlib import Path

import pytest

from kvprofile.bench import providers
from kvprofile.bench.documents import load as load_documents
from kvprofile.bench.leg_store import LegStore
from kvprofile.budget import runtime_file, store
from kvprofile.cli import run
from kvprofile.corpus.sources import load_corpus
from kvprofile.errors import InputError
from kvprofile.evaluate.item_store import ItemStore
from kvprofile.files import read_json
from kvprofile.records import run_files
from kvprofile.runtime.find import Served, find
from kvprofile.runtime.settings import from_environment
from kvprofile.scoring.chunk_store import ChunkStore
from tests.helpers.bench_plans import make_plan
from tests.helpers.factories import make_geometry, make_profile
from tests.helpers.made_up import make_record
from tests.helpers.models import POCKET

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
def test_what_is_not_a_regular_file_is_refused_unread(trap, read):
    with pytest.raises(InputError, match=r"not a regular file|cannot read|no run record"):
        read(trap)


def test_json_is_read_from_files_alone(trap):
    with pytest.raises(ValueError, match=r"not a regular file|cannot read"):
        read_json(trap, 1000, "test file")


def test_a_server_starts_next_to_a_trap_and_not_from_one(trap):
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


def test_corpora_and_documents_skip_traps(trap):
    (trap.parent / "good.txt").write_text("a text")
    assert [text.name for text in load_corpus(str(trap.parent)).texts] == ["good.txt"]
    os.mkfifo(trap.parent / "trap.md")
    (trap.parent / "good.txt").unlink()
    with pytest.raises(InputError, match=r"no \.md files"):
        load_documents((str(trap.parent),))


@pytest.mark.parametrize("name", CLIMBING)
@pytest.mark.parametrize("command", ["show", "plot", "plan", "evaluate", "score"])
def test_model_names_do_not_lead_out_of_the_folder(command, name, workplace, capsys):
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


def test_a_result_written_through_a_link_replaces_its_target_and_nothing_else(workplace):
    target = workplace / "elsewhere"
    target.mkdir()
    (workplace / "link.json").symlink_to(target / "real.json")
    store.save(make_profile(), workplace / "link.json")
    assert (workplace / "link.json").is_symlink()
    assert [path.name for path in target.iterdir()] == ["real.json"]


def test_a_file_of_any_size_is_refused_unread(tmp_path):
    for read in (store.load, runtime_file.load, run_files.load):
        with open(tmp_path / "huge.json", "wb") as stream:
            stream.truncate(10 * 2**30)  # sparse: takes no space
        with pytest.raises(InputError, match="larger than"):
            read(tmp_path / "huge.json")


def leaves(value, path=()):
    """Places in parsed JSON: of every object each key, of every list the first entry."""
    if isinstance(value, dict | list) and path:
        yield path
    if isinstance(value, dict):
        for key, each in value.items():
            yield from leaves(each, (*path, key))
    elif isinstance(value, list):
        for each in value[:1]:
            yield from leaves(each, (*path, 0))
    else:
        yield path


def replaced(document, path, value):
    copied = copy.deepcopy(document)
    inner = copied
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    return copied


def small(record):
    """The record with two questions and few heads: of a list only the first entry is changed, and pages are small."""
    for leg in record["legs"]:
        leg["documents"], leg["requests"] = leg["documents"][:1], leg["requests"][:2]
        leg["load"]["requests"] = leg["metrics"]["completed"] = 2
        if leg["heads"]:
            leg["heads"]["budgets"] = leg["heads"]["budgets"][:2]
    return record


NUMBERS = [2**63 - 1, 0, -1, 9e99, 5e-324]
WORDS = ["", "x" * 3000, "\x1b]0;x\x07", "../../x", "\u202ex"]
OTHERS = [None, [], {}, [[]], ["x"], {"x": 1}]
SMALL_RECORD = small(json.loads(run_files.to_bytes(make_record(1, legs=("baseline", "0.5"), looks=2))))
CONFIG = json.loads((POCKET / "config.json").read_text())


def changed(document, values):
    """(place, the document with a value of ``values`` there) for each place that holds a value of that kind."""
    kind = int | float if values is NUMBERS else str if values is WORDS else dict | list
    for path in leaves(document):
        inner = document
        for key in path:
            inner = inner[key]
        if isinstance(inner, kind):
            yield from ((path, replaced(document, path, value)) for value in values)


@pytest.mark.parametrize("values", [NUMBERS, WORDS, OTHERS], ids=["numbers", "words", "others"])
@pytest.mark.parametrize(
    ("good", "name", "command"),
    [
        (SMALL_RECORD, "x.json", ["report", "x.json", "--output", "x.html"]),
        (CONFIG, "config.json", ["plan", ".", "--gpu-memory", "24GiB", "--context", "1000"]),
    ],
    ids=["report", "plan"],
)
@pytest.mark.usefixtures("workplace")
def test_whatever_stands_in_the_place_of_a_value_is_shown_or_refused_in_a_line(good, name, command, values, capsys):
    for path, document in changed(good, values):
        Path(name).write_text(json.dumps(document))
        code = run(command)
        said = capsys.readouterr()
        assert code in (0, 2), f"{path}: {said.err}"
        assert (said.out + said.err).replace("\n", "").isprintable(), path
        assert code == 0 or len(said.err.strip().splitlines()) == 1, path


@pytest.mark.parametrize("linked", ["folder", "file"])
@pytest.mark.parametrize("kind", ["bench", "evaluate", "score"])
def test_links_in_a_folder_of_results_do_not_lead_out_of_it(kind, linked, tmp_path):
    """A folder from somebody else is no way to write over what is ours."""
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "precious").write_text("mine")
    folder = tmp_path / ("out.json.partial" if kind == "score" else "out")
    inner = folder / "parts" if kind == "bench" and linked == "file" else folder
    inner.mkdir(parents=True)
    names = {"bench": "0-baseline.log", "evaluate": "items.jsonl", "score": "run.json"}
    if linked == "file":
        (inner / names[kind]).symlink_to(outside / "precious")
    else:
        (inner / "parts").symlink_to(outside)
    stores = {
        "bench": lambda: LegStore(folder, make_plan()).open(force=True),
        "evaluate": lambda: ItemStore(folder, "key").open({}, [], force=True),
        "score": lambda: ChunkStore(tmp_path / "out.json", "key", make_geometry()).open(),
    }
    with pytest.raises(InputError, match="is a link out of a folder of results"):
        stores[kind]()
    assert [path.read_text() for path in outside.iterdir()] == ["mine"]


def test_endless_nesting_in_a_folder_of_results_is_not_continued(tmp_path):
    (tmp_path / "run").mkdir()
    for name in ("run.json", "items.jsonl"):
        (tmp_path / "run" / name).write_text("[" * 100_000 + "\n")
    with pytest.raises(InputError, match="holds an evaluation with other settings"):
        ItemStore(tmp_path / "run", "key").open({}, [])
    assert ItemStore(tmp_path / "run", "key").open({}, [("a", 1)], force=True) == 0
    (tmp_path / "out.json.partial").mkdir()
    (tmp_path / "out.json.partial" / "run.json").write_text("[" * 100_000)
    assert ChunkStore(tmp_path / "out.json", "key", make_geometry()).open() == 0


HUGE = 10 * 2**40


def huge(path: Path) -> Path:
    """A file of ten TiB that takes no space."""
    with open(path, "wb") as stream:
        stream.truncate(HUGE)
    return path


def test_texts_of_any_size_are_refused_unread(tmp_path):
    with pytest.raises(InputError, match="larger than 1024 MiB"):
        load_corpus(str(huge(tmp_path / "huge.txt")))
    (tmp_path / "good.md").write_text("a text")
    for name in ("good.json", "good.md"):
        huge(tmp_path / name)
        with pytest.raises(InputError, match=f"{name}: larger than 64 MiB"):
            load_documents((str(tmp_path / "good.md"),))
        (tmp_path / name).write_text("{}")
    with pytest.raises(InputError, match="larger than 64 MiB"):
        providers.load(huge(tmp_path / "providers.toml"))


def test_providers_are_read_from_files_alone(trap):
    with pytest.raises(InputError, match=r"not a regular file|cannot read"):
        providers.load(trap)
