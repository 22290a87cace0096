"""`make bench-real` in small: every leg serves, a record comes out, and a second run measures nothing."""

from __future__ import annotations

import subprocess
import sys

import pytest

from kvprofile.records import run_files

pytestmark = [pytest.mark.real, pytest.mark.vllm]


def bench(output, folder):
    command = [sys.executable, "benchmarks/real_model.py", "batch", "--smoke", "--turns", "1"]
    return subprocess.run(
        [*command, "--output", str(output), "--model", str(folder)], capture_output=True, text=True, check=True
    )


def test_a_record_of_every_leg_that_is_made_once(folder, tmp_path):
    assert "turn 1 of 1" in bench(tmp_path, folder).stderr
    found = run_files.load(tmp_path / "batch.json")
    assert [leg.name for leg in found.legs] == ["baseline", "0.7", "0.5", "0.3", "graded 0.5", "graded 0.3"]
    assert {leg.metrics.max_concurrent_requests for leg in found.legs} == {20}
    held = {leg.name: leg.memory.pool_bytes_peak for leg in found.legs}
    assert held["baseline"] > held["0.7"] > held["0.5"] > held["0.3"]
    assert held["baseline"] > held["graded 0.5"] > held["graded 0.3"]
    assert all(leg.requests[0].output for leg in found.legs)
    assert found.legs[-1].bound.speedup > 1
    assert not bench(tmp_path, folder).stderr.count("in flight")
