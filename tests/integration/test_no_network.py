"""Commands about what is on this machine ask for no network; one about a model of the hub does."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import typer

from kvprofile.cli import app
from tests.helpers.models import POCKET, ROOT

SCORE = ["--corpus", "prose", "--documents", "1", "--context-tokens", "200", "--chunk-tokens", "200"]
BUDGET = ROOT / "models" / "kv_budget" / "pocket.json"
COMMANDS = [
    ["score", POCKET, *SCORE, "--dry-run"],
    ["score", POCKET, *SCORE, "--output", "made.json"],
    ["score", POCKET, *SCORE, "--output", "shared.json", "--shard", "1/1"],
    ["merge", "shared.json.shard-1-of-1.safetensors"],
    ["evaluate", POCKET, "--profile", BUDGET, "--tasks", "needle", "--contexts", "1", "--context-tokens", "300"],
    ["show", "made.json"],
    ["validate", "made.json"],
    ["diff", "made.json", BUDGET],
    ["plot", "made.json", "--output", "made.svg"],
    ["plan", POCKET, "--gpu-memory", "24GiB", "--context", "1000"],
    ["plan", "models/pocket", "--gpu-memory", "1GiB", "--context", "500"],  # no such folder here: the bundled one
    ["plan", BUDGET, "--gpu-memory", "H100", "--context", "1000"],
    ["plan", BUDGET, "--gpu-memory", "H100", "--context", "1000", "--weights-gib", "1", "--replicas", "8"],
    ["export", BUDGET, "--format", "vllm", "--retention", "0.5", "--output", "made.vllm"],
    ["export", BUDGET, "--format", "csv", "--retention", "0.5", "--output", "made.csv"],
    ["export", BUDGET, "--format", "kvzip", "--output", "made.pt"],
    ["export", BUDGET, "--format", "duo-attention", "--retention", "0.5", "--output", "made.duo"],
    ["import", "made.vllm", "--format", "vllm", "--output", "back.json"],
    ["report", ROOT / "tests" / "data" / "run-record-v1.json", "--output", "made.html"],
    ["bench", "--model", POCKET, "--profile", BUDGET, "--preset", "seed", "--dry-run"],
    ["verify", POCKET, "--profile", BUDGET, "--output", "made.verified.json", "--dry-run"],
    ["doctor"],
]
RUN = """
import json, os, sys
from kvprofile.cli import run
for words in json.load(sys.stdin):
    code = run(words)
    print("RAN", code, os.path.exists(os.environ["TESTS_SOCKETS_DENIED"]), *words, flush=True)
"""


@pytest.mark.usefixtures("workplace")
def test_commands_about_local_files_do_not_ask_for_the_network():
    """All in one process, online as far as it knows: imports take longer than work."""
    words = [[str(word) for word in command] for command in COMMANDS]
    done = in_a_process(["-c", RUN], json.dumps(words))
    ran = [line.split()[1:] for line in done.stdout.splitlines() if line.startswith("RAN ")]
    assert {line[2] for line in ran} == set(typer.main.get_command(app).commands)
    assert [line for line in ran if line[1] != "False"] == []
    assert [line for line in ran if line[0] != "0" and line[2] != "doctor"] == [], done.stderr
    assert len(ran) == len(COMMANDS)


@pytest.mark.usefixtures("workplace")
def test_a_hub_id_does_ask_so_the_guard_sees_what_commands_do(sockets_denied):
    done = in_a_process(["-m", "kvprofile", "score", "some-org/some-model", *SCORE])
    assert done.returncode == 2
    assert "the hub cannot be reached" in done.stderr
    assert "huggingface.co" in sockets_denied.read_text()
    sockets_denied.unlink()


def in_a_process(words, given=None):
    env = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    return subprocess.run([sys.executable, *words], env=env, input=given, capture_output=True, text=True, check=False)
