"""A share of what scripts/faults.py does: commands interrupted at random moments and at single steps."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.helpers.models import ROOT

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    ("command", "kills"),
    [
        ("score", 8),
        ("score --shard", 7),
        ("score --save-token-scores", 7),
        ("evaluate", 7),
        ("export", 8),
        ("export of a folder", 8),
    ],
)
def test_interrupted_commands_lose_nothing_and_leave_nothing(command, kills):
    arguments = ["scripts/faults.py", "--kills", str(kills), "--only", command]
    run = subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "nothing lost, nothing half-written, nothing lies about" in run.stdout
