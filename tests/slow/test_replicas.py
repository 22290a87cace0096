"""`kvprofile bench` over a vLLM server of two replicas, under open load: what the record and the page say of it."""

from __future__ import annotations

import json

import pytest

from kvprofile.cli import run as run_here
from kvprofile.records import run_files
from tests.vllm.bench_command import OPTIONS, command

pytest.importorskip("vllm")
pytestmark = [pytest.mark.slow, pytest.mark.vllm]


def test_a_leg_of_two_replicas_under_open_load(tmp_path, monkeypatch):
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    folder = tmp_path / "run"
    load = ["--load", "open", "--request-rate", "2", "--data-parallel-size", "2"]
    bench = command(
        "bench", *OPTIONS, *load, "--no-baseline", "--no-attention", "--retention", "0.5", "--output", str(folder)
    )
    _, errors = bench.communicate(timeout=1500)
    assert bench.returncode == 0, errors[-3000:]
    (leg,) = run_files.load(folder / "record.json").legs
    assert leg.engine.endswith(", 2 replicas")
    assert (leg.status, leg.load.mode, leg.metrics.completed) == ("ok", "open", 6)
    assert leg.eviction_ratio > 0
    assert leg.pool_bytes == pytest.approx(2 * 64 * 2**20, rel=0.01)
    stats = next(folder.glob("**/*.stats")).read_text().splitlines()
    assert {line["engine"] for line in map(json.loads, stats) if "request_id" in line} == {0, 1}
    page = tmp_path / "page.html"
    assert run_here(["report", str(folder), "--output", str(page)]) == 0
    assert leg.engine in page.read_text()
