"""The whole command on a real engine: killed in the middle, run again, and its records turned into the page."""

from __future__ import annotations

import signal
import time

import pytest

from kvprofile.records import run_files
from tests.helpers.models import ROOT
from tests.vllm.bench_command import OPTIONS, command, servers_for

pytest.importorskip("vllm")
pytestmark = pytest.mark.vllm


@pytest.mark.slow
def test_killed_and_run_again(tmp_path):
    folder = tmp_path / "run"
    legs = ["--no-baseline", "--retention", "0.5", "--provider", "loopback"]
    first = command("bench", *OPTIONS, *legs, "--no-attention", "--output", str(folder))
    deadline = time.monotonic() + 1500
    while not (folder / "record.json").is_file():  # one leg is done; the other one starts
        assert first.poll() is None, first.communicate()[1][-3000:]
        assert time.monotonic() < deadline
        time.sleep(0.5)
    time.sleep(3)
    first.send_signal(signal.SIGKILL)
    first.communicate()
    kept = run_files.load(folder / "record.json")
    assert [(leg.name, leg.status) for leg in kept.legs] == [("graded 0.5", "ok")]  # the file has a probe
    gone = time.monotonic() + 90
    while servers_for(folder) and time.monotonic() < gone:
        time.sleep(1)
    assert servers_for(folder) == []  # the server went with the benchmark that started it

    second = command("bench", *OPTIONS, *legs, "--output", str(folder), "--json")
    out, err = second.communicate(timeout=1500)
    assert second.returncode == 0, err[-3000:]
    printed = tmp_path / "printed.json"
    printed.write_text(out)
    record = run_files.load(printed)
    assert "[1/2] graded 0.5: done before" in err
    assert [(leg.name, leg.kind, leg.status) for leg in record.legs] == [
        ("graded 0.5", "local", "ok"),
        ("remote", "remote", "ok"),
    ]
    assert record.legs[0] == kept.legs[0]


def test_budgets_next_to_the_baseline(tmp_path):
    """Two local legs with an attention pass, and the page made of them."""
    folder = tmp_path / "run"
    run = command("bench", *OPTIONS, "--retention", "0.5", "--kind", "whole", "--output", str(folder))
    out, err = run.communicate(timeout=3000)
    assert run.returncode == 0, err[-3000:]
    record = run_files.load(folder / "record.json")
    baseline, half = record.legs
    assert (baseline.name, half.name) == ("baseline", "0.5")
    assert baseline.pool_bytes == pytest.approx(half.pool_bytes, rel=0.01)
    assert baseline.block_tokens == half.block_tokens == 32
    assert (baseline.dtype, half.dtype) == ("float32", "float32")
    assert baseline.eviction_ratio == 0
    assert 0.4 < half.eviction_ratio < 0.5
    assert half.retention_realised == 0.5
    assert half.heads.sink_tokens == 16
    assert 1.5 < half.bound.speedup < 2
    assert half.bound.fraction == pytest.approx(half.bound.reached / half.bound.speedup)
    for leg in record.legs:
        assert leg.metrics.completed == 6
        assert 0 < leg.memory.pool_bytes_peak <= leg.pool_bytes  # of samples: which leg's is higher is chance
        assert leg.attention.steps == 96
        assert leg.attention.mean_ms > 0
        assert any(sample.running for sample in leg.samples)
        passed = [v.passed for request in leg.requests for v in request.verdicts if v.name == "expected"]
        assert sum(passed) >= 5
    assert all(request.blocks_after_trim < request.blocks_after_prefill for request in half.requests)
    assert [d.sha256 for d in baseline.documents] == [d.sha256 for d in half.documents]
    text = (folder / "record.json").read_text()
    assert str(ROOT) not in text
    assert str(tmp_path) not in text
    assert "tokens/s" in out
    page = command("report", str(folder), "--output", str(tmp_path / "page.html"))
    _, err = page.communicate(timeout=300)
    assert page.returncode == 0, err
    assert "0.5" in (tmp_path / "page.html").read_text()


@pytest.mark.slow
def test_graded_heads_next_to_whole_ones(tmp_path):
    """Legs of both kinds at one retention: each is served with its own, and the page says which."""
    folder = tmp_path / "run"
    legs = ["--no-baseline", "--retention", "0.3", "--kind", "whole", "--kind", "graded"]
    run = command("bench", *OPTIONS, *legs, "--no-attention", "--output", str(folder))
    _, err = run.communicate(timeout=3000)
    assert run.returncode == 0, err[-3000:]
    whole, graded = run_files.load(folder / "record.json").legs
    assert [(leg.name, leg.status) for leg in (whole, graded)] == [("0.3", "ok"), ("graded 0.3", "ok")]
    assert {value for row in whole.heads.budgets for value in row} == {0.0, 1.0}
    assert len({value for row in graded.heads.budgets for value in row} - {0.0, 1.0}) > 1
    assert graded.retention_realised == pytest.approx(0.3)
    assert whole.eviction_ratio == pytest.approx(graded.eviction_ratio, abs=0.1)
    assert all(request.blocks_after_trim < request.blocks_after_prefill for request in graded.requests)
    page = command("report", str(folder), "--output", str(tmp_path / "page.html"))
    _, err = page.communicate(timeout=300)
    assert page.returncode == 0, err
    assert "graded: " in (tmp_path / "page.html").read_text()
