"""`kvprofile score --engine vllm` over several ranks of vLLM's multiprocess executor, one of which may die."""

from __future__ import annotations

import signal
import time

import psutil
import pytest
from safetensors.torch import load_file

from kvprofile.cli import run as run_here
from tests.helpers.models import POCKET
from tests.vllm.capture import TOLERANCE
from tests.vllm.score_command import SMALL, finish, start

pytest.importorskip("vllm")
pytestmark = [pytest.mark.slow, pytest.mark.vllm]

RANKS = {"tensor": ("--tensor-parallel-size", "2"), "pipeline": ("--pipeline-parallel-size", "2")}
SHARED = "several ranks share each KV head"


@pytest.fixture(autouse=True)
def unbound(monkeypatch):
    """Ranks that share two cores with others; vLLM would give each some cores alone."""
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Token scores of transformers in this process."""
    place = tmp_path_factory.mktemp("alone")
    tokens = place / "hf.safetensors"
    arguments = [*SMALL, str(POCKET), "--engine", "hf", "--device", "cpu", "--output", str(place / "hf.json")]
    assert run_here([*arguments, "--save-token-scores", str(tokens)]) == 0
    return load_file(tokens)


@pytest.mark.parametrize("kind", RANKS)
def test_two_ranks_score_as_one_process_does(kind, alone, tmp_path, capsys):
    tokens = tmp_path / "tokens.safetensors"
    options = ("--engine", "vllm", *RANKS[kind], "--save-token-scores", str(tokens))
    _, errors = finish(start(POCKET, tmp_path / "out.json", *options))
    assert f"{kind} parallel over 2" in errors
    assert SHARED not in errors
    found = load_file(tokens)
    assert found.keys() == alone.keys()
    worst = max((found[name] - alone[name]).abs().max().item() for name in alone)
    with capsys.disabled():
        print(f" worst difference {worst:.1e}", end="")
    assert worst < TOLERANCE


@pytest.mark.parametrize("core_process", ["0", "1"])
def test_a_rank_that_dies_is_one_line_and_work_that_continues(core_process, tmp_path):
    output, options = tmp_path / "out.json", ("--engine", "vllm", *RANKS["tensor"])
    process = start(POCKET, output, *options, VLLM_ENABLE_V1_MULTIPROCESSING=core_process)
    partial = output.with_name("out.json.partial")
    deadline = time.monotonic() + 600
    while len(list(partial.glob("document-*.safetensors"))) < 3:
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.005)
    worker_of(process).send_signal(signal.SIGKILL)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 2, errors[-3000:]
    # vLLM logs its own errors before, and Python what the dead worker left in shared memory after
    (told,) = [line for line in errors.splitlines() if line.startswith("kvprofile: ")]
    assert told.startswith("kvprofile: a worker of vLLM ended while scoring")
    assert "run the same command again to continue" in told
    assert not output.exists()
    _, errors = finish(start(POCKET, output, *options))
    assert "chunks are finished already" in errors
    undisturbed = tmp_path / "undisturbed.json"
    if core_process == "0":
        finish(start(POCKET, undisturbed, *options))
        assert output.read_bytes() == undisturbed.read_bytes()


def worker_of(process):
    """One of the two processes that compute."""
    family = psutil.Process(process.pid).children(recursive=True)
    names = {child: " ".join(child.cmdline()) for child in family}
    workers = [child for child, name in names.items() if "Worker" in name]
    assert len(workers) == 2, names
    return workers[1]
