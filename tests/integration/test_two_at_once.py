"""Two processes on one output: one is refused in a line or both end well, and never is anything mixed up."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time

import pytest

from tests.helpers.models import POCKET, ROOT
from tests.helpers.score_runs import command as score
from tests.helpers.score_runs import finish, wait_for_chunks

BUDGETS = ["--profile", "models/kv_budget/pocket.json", "--sink-tokens", "16", "--recent-tokens", "64"]
EVALUATE = [sys.executable, "-m", "kvprofile", "evaluate", str(POCKET), *BUDGETS, "--tasks", "needle", "--contexts"]
EVALUATE += ["4", "--context-tokens", "400", "--questions", "2", "--retention", "0.5", "--random-seeds", "1"]


def start(command):
    return subprocess.Popen(
        command, cwd=ROOT, env={**os.environ, "KEY": "k"}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def refused(process, output):
    errors = process.communicate(timeout=120)[1]
    assert process.returncode == 2, errors
    said = f"kvprofile: another kvprofile process is writing {output}; wait for it or choose another --output"
    assert errors.splitlines()[-1] == said
    assert "Traceback" not in errors


@pytest.fixture(scope="module")
def undisturbed(tiny_checkpoint, tmp_path_factory):
    output = tmp_path_factory.mktemp("undisturbed") / "tiny.json"
    finish(tiny_checkpoint, output)
    return output.read_bytes()


@pytest.mark.parametrize("options", [[], ["--chunk-tokens", "40"]], ids=["the same", "other settings"])
def test_score(tiny_checkpoint, undisturbed, tmp_path, options):
    output = tmp_path / "tiny.json"
    first = start(score(tiny_checkpoint, output))
    wait_for_chunks(output, 1, first)
    first.send_signal(signal.SIGSTOP)  # it must still be at work when the second comes
    refused(start(score(tiny_checkpoint, output, *options)), output)
    first.send_signal(signal.SIGCONT)
    errors = first.communicate(timeout=120)[1]
    assert first.returncode == 0, errors
    assert output.read_bytes() == undisturbed
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tiny.json", "tiny.probe.safetensors"]


@pytest.mark.slow
def test_score_started_twice_in_one_moment(tiny_checkpoint, undisturbed, tmp_path):
    output = tmp_path / "tiny.json"
    both = [start(score(tiny_checkpoint, output)) for _ in range(2)]
    errors = [process.communicate(timeout=300)[1] for process in both]
    assert sorted(process.returncode for process in both) in ([0, 0], [0, 2]), errors
    assert output.read_bytes() == undisturbed
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tiny.json", "tiny.probe.safetensors"]


@pytest.mark.slow
def test_evaluate_started_twice_in_one_moment(tmp_path):
    folder, alone = tmp_path / "run", tmp_path / "alone"
    both = [start([*EVALUATE, "--output", str(folder)]) for _ in range(2)]
    errors = [process.communicate(timeout=300)[1] for process in both]
    assert sorted(process.returncode for process in both) in ([0, 0], [0, 2]), errors
    assert start([*EVALUATE, "--output", str(alone)]).wait(300) == 0
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == {
        path.name: path.read_bytes() for path in alone.iterdir()
    }


def test_evaluate(tmp_path):
    folder = tmp_path / "run"
    first = start([*EVALUATE, "--output", str(folder)])
    while not (folder / "run.json").exists():
        assert first.poll() is None, first.communicate()[1]
        time.sleep(0.005)
    first.send_signal(signal.SIGSTOP)
    refused(start([*EVALUATE, "--output", str(folder), "--force"]), folder)
    first.send_signal(signal.SIGKILL)
    first.communicate()
    again = start([*EVALUATE, "--output", str(folder)])  # a lock ends with its process, however that ended
    assert again.wait(300) == 0, again.communicate()[1]


@pytest.mark.loopback
def test_bench(tmp_path):
    """The first one waits at a server that never answers."""
    folder = tmp_path / "run"
    with socket.create_server(("127.0.0.1", 0)) as silent:
        table = tmp_path / "providers.toml"
        address = f"http://127.0.0.1:{silent.getsockname()[1]}/v1"
        table.write_text(f'[silent]\nbase_url = "{address}"\nkey_env = "KEY"\nmodel = "pocket"\n')
        command = [sys.executable, "-m", "kvprofile", "bench", "--model", str(POCKET), "--remote-only", "--documents"]
        command += ["pocket", "--providers", str(table), "--provider", "silent", "--output", str(folder)]
        first = start(command)
        while not (folder / "parts" / "plan").exists():
            assert first.poll() is None, first.communicate()[1]
            time.sleep(0.005)
        silent.accept()
        refused(start(command), folder)
        refused(start([*command, "--seed", "1", "--force"]), folder)
        first.terminate()
        errors = first.communicate(timeout=60)[1]
    assert first.returncode == 130, errors
    assert errors.splitlines()[-1].startswith("kvprofile: interrupted; finished work is kept")
    assert "Traceback" not in errors
    assert sorted(path.name for path in folder.iterdir()) == ["parts", "record.json"]
    assert not list(folder.rglob(".*"))
