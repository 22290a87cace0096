"""Files that are written at once or not at all, and the lock that keeps two processes off one output."""

from __future__ import annotations

import signal
import subprocess
import sys
from contextlib import suppress

import pytest

from kvprofile.bench import runner
from kvprofile.bench.leg_store import LegStore
from kvprofile.bench.scenario import LegPlan
from kvprofile.errors import InputError
from kvprofile.evaluate.item_store import ItemStore
from kvprofile.files import alone, write_atomically
from kvprofile.records.record import Leg
from kvprofile.scoring.chunk_store import ChunkStore
from tests.helpers.bench_plans import make_plan
from tests.helpers.factories import make_geometry
from tests.helpers.models import ROOT

HALF_WAY = """
import sys, time
from pathlib import Path
from kvprofile.files import _temporary, alone
path = Path(sys.argv[1])
with alone(Path(sys.argv[1] + ".lock"), path):
    _, partial = _temporary(path.parent, f".{path.name}.")
    partial.write_bytes(b"half")
    print("half way", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def half_way(tmp_path):
    """A process in the middle of writing a file, and that file."""
    path = tmp_path / "deep" / "out.json"
    process = subprocess.Popen([sys.executable, "-c", HALF_WAY, str(path)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "half way\n"
    yield process, path
    process.kill()
    process.communicate()


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_what_a_killed_writer_left_goes_with_the_next_write(half_way):
    process, path = half_way
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert len(names(path.parent)) == 2  # its lock and half a file
    write_atomically(path.with_name("other.json"), b"whole")
    assert len(names(path.parent)) == 3, "half a file of another name is not ours to remove"
    with alone(path.with_name("out.json.lock"), path):
        write_atomically(path, b"whole")
    assert names(path.parent) == ["other.json", "out.json"]


def test_what_another_writer_has_under_way_is_left_alone(half_way):
    _, path = half_way
    write_atomically(path, b"mine")
    (partial,) = path.parent.glob(".*.partial")
    assert partial.read_bytes() == b"half"
    assert path.read_bytes() == b"mine"


def test_a_second_process_is_refused_and_a_lock_ends_with_its_process(half_way):
    process, path = half_way
    lock = path.with_name("out.json.lock")
    with pytest.raises(InputError, match=r"another kvprofile process is writing .*out.json; wait for it or choose"):
        alone(lock, path).__enter__()
    assert lock.exists()
    process.kill()
    process.wait()
    with alone(lock, path):
        assert lock.exists()
    assert not lock.exists()


def test_folders_made_for_a_lock_go_with_it_unless_they_are_used(tmp_path):
    with alone(tmp_path / "a" / "b" / ".lock", tmp_path / "a"):
        pass
    assert names(tmp_path) == []
    with alone(tmp_path / "a" / "b" / ".lock", tmp_path / "a"):
        (tmp_path / "a" / "kept").write_text("")
    assert names(tmp_path / "a") == ["kept"]


def test_an_error_leaves_neither_file_nor_lock(tmp_path):
    with suppress(KeyError), alone(tmp_path / ".lock", tmp_path):
        raise KeyError
    (tmp_path / "out").mkdir()
    with pytest.raises(InputError, match="cannot write"):
        write_atomically(tmp_path / "out", b"half")
    (tmp_path / "out").rmdir()
    assert names(tmp_path) == []


@pytest.mark.parametrize("left", [[], [".lock"], [".run.json.abc.partial", ".plan.abc.partial", ".lock"]])
def test_a_folder_in_which_a_run_was_killed_at_its_very_beginning_is_not_foreign(tmp_path, left):
    folders = {"score": tmp_path / "out.json.partial", "evaluate": tmp_path / "run", "bench": tmp_path / "bench/parts"}
    for folder in folders.values():
        folder.mkdir(parents=True)
        for name in left:
            (folder / name).write_text("")
    assert ChunkStore(tmp_path / "out.json", "key", make_geometry()).open() == 0
    assert ItemStore(folders["evaluate"], "key").open({}, []) == 0
    with LegStore(tmp_path / "bench", make_plan()).opened(force=False):
        assert (folders["bench"] / "plan").is_file()
    for folder in folders.values():
        (folder / "thesis.txt").write_text("mine")
        for name in ("run.json", "plan"):
            (folder / name).unlink(missing_ok=True)
    with pytest.raises(InputError, match="not a run's folder"):
        ChunkStore(tmp_path / "out.json", "key", make_geometry()).open()
    with pytest.raises(InputError, match="not an evaluation's folder"):
        ItemStore(folders["evaluate"], "key").open({}, [])
    with (
        pytest.raises(InputError, match="not a benchmark's folder"),
        LegStore(tmp_path / "bench", make_plan()).opened(True),
    ):
        pass


def test_a_benchmark_serves_the_budgets_that_it_was_planned_with(tmp_path):
    import hashlib

    profile = tmp_path / "b.json"
    profile.write_bytes(b"planned")
    plan = make_plan(profile=str(profile), profile_sha256=hashlib.sha256(b"planned").hexdigest())
    parts = LegStore(tmp_path / "run", plan)
    parts.open(force=False)
    profile.write_bytes(b"edited")
    assert parts.profile.read_bytes() == b"planned"
    with pytest.raises(InputError, match="was changed while the benchmark started"):
        parts.open(force=False)
    profile.unlink()
    with pytest.raises(InputError, match="cannot read"):
        parts.open(force=False)


def test_rows_of_a_leg_that_was_kept_and_then_killed_go_with_the_next_run(tmp_path):
    plan = make_plan(legs=(LegPlan("0.9", 0.9),))
    parts = LegStore(tmp_path / "run", plan)
    parts.open(force=False)
    parts.save(plan.legs[0], 0, Leg(name="0.9", kind="local", status="ok", model="pocket", load={"mode": "closed"}))
    parts.rows(plan.legs[0], 0).close()
    said = []
    runner.run(plan, tmp_path / "run", said.append)
    assert said == ["[1/1] 0.9: done before"]
    assert names(tmp_path / "run" / "parts") == ["0-0.9.leg", "plan", "profile"]
