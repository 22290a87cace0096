"""What may happen to a server at night: its budget file changes under it, it is killed in the middle of a benchmark."""

from __future__ import annotations

import json
import time

import psutil
import pytest

from kvprofile.bench.engines.vllm_server import reason_in
from kvprofile.evaluate.simulate import simulating
from kvprofile.records import run_files
from tests.vllm.bench_command import OPTIONS, command, servers_for
from tests.vllm.engine import NEAR_TIE, environment, make_subject, write_budget
from tests.vllm.served import HEADS, RULE, draw, fetch, serving

pytest.importorskip("vllm")
pytestmark = [pytest.mark.vllm, pytest.mark.slow]

EVERY = [[1.0] * 4] * 4


def answer(address, subject, prompt):
    """Greedy tokens, and the blocks that the server gave back for them."""
    body = {"model": str(subject.folder), "prompt": prompt, "max_tokens": 24, "temperature": 0, "ignore_eos": True}
    before = metrics(address)
    found = json.loads(fetch(f"{address}/v1/completions", body | {"return_token_ids": True}))
    after = metrics(address)
    name = "kvprofile_kv_blocks_reclaimed_total"
    return found["choices"][0]["token_ids"], float(after[name]) - float(before[name]), after["kvprofile_full_heads"]


def metrics(address):
    lines = fetch(f"{address}/metrics").splitlines()
    return dict(line.split(maxsplit=1) for line in lines if line.startswith("kvprofile_"))


def test_a_running_server_keeps_the_budgets_it_started_with(tmp_path, tokenizer):
    import random

    subject = make_subject(tmp_path / "tiny")
    tokenizer.save_pretrained(subject.folder)
    path = write_budget(tmp_path / "b.json", subject, HEADS, RULE)
    whole = path.read_bytes()
    other = write_budget(tmp_path / "other.json", subject, EVERY, RULE).read_bytes()
    env = environment(path)
    del env["VLLM_ENABLE_V1_MULTIPROCESSING"]
    rng, options = random.Random("swap"), ["--max-model-len", "1024", "--no-enable-prefix-caching"]
    faults = {
        "as started": lambda: None,
        "swapped": lambda: path.write_bytes(other),
        "half-written": lambda: path.write_bytes(whole[: len(whole) // 2]),
        "deleted": path.unlink,
    }
    with serving(subject.folder, tmp_path / "log", env, *options) as address:
        for name, happens in faults.items():
            happens()
            prompt = draw(rng, 400)
            tokens, reclaimed, full = answer(address, subject, prompt)
            assert (name, full) == (name, "8.0")
            assert reclaimed > 0, name
            with simulating(subject.model, subject.geometry, HEADS, RULE) as simulation:
                logits = [simulation.prefill(prompt)]
                logits += simulation.start().read([tokens[:-1]])[0]
            for row, token in zip(logits, tokens, strict=True):
                assert float(row.max() - row[token]) < NEAR_TIE, name

    for content, said in (
        (None, f"InputError: {path}: cannot read: No such file or directory"),
        (whole[: len(whole) // 2], f"InputError: {path}: not JSON: "),
    ):
        if content is not None:
            path.write_bytes(content)
        with (
            pytest.raises(AssertionError),
            serving(subject.folder, tmp_path / "again.log", env, *options),
        ):
            pass
        assert reason_in(tmp_path / "again.log").startswith(said)


def test_a_server_that_is_killed_fails_its_leg_and_no_other(tmp_path):
    """The engine is killed, as by a kernel that is out of memory, while requests run; then the server itself."""
    folder = tmp_path / "run"
    more = ["--no-baseline", "--retention", "0.9", "--retention", "0.7", "--retention", "0.5", "--no-attention"]
    more += ["--requests", "60", "--output", str(folder)]
    bench = command("bench", *OPTIONS, *more)
    for leg, victim in (("0.9", "VLLM::EngineCore"), ("0.7", "api_server")):
        rows = folder / "parts" / f"0-{leg}.rows"
        while not rows.exists() or rows.read_bytes().count(b"\n") < 5:
            assert bench.poll() is None, bench.communicate()[1][-3000:]
            time.sleep(0.02)
        (found,) = [p for p in psutil.Process(bench.pid).children(recursive=True) if victim in " ".join(p.cmdline())]
        found.kill()
        while rows.exists():
            assert bench.poll() is None, bench.communicate()[1][-3000:]
            time.sleep(0.1)
    out, err = bench.communicate(timeout=1500)
    assert bench.returncode == 1, err[-3000:]
    assert "Traceback" not in err
    record = run_files.load(folder / "record.json")
    first, second, third = record.legs
    assert (first.status, second.status, third.status) == ("failed", "failed", "ok")
    assert first.reason.startswith("vLLM ended with exit code ")
    assert "EngineDeadError" in first.reason
    assert second.reason.startswith("vLLM was killed by SIGKILL in the middle of the leg: ")
    for leg in (first, second):
        done = [row for row in leg.requests if row.error is None]
        assert 5 <= len(done) < 60
        assert f"{leg.name}: {leg.reason}" in out.replace("\n", " ") or leg.reason in err
    assert third.metrics.completed == 60
    assert servers_for(folder) == []
    again = command("bench", *OPTIONS, *more)
    err = again.communicate(timeout=1500)[1]
    assert again.returncode == 0, err[-3000:]
    legs = run_files.load(folder / "record.json").legs
    assert [leg.status for leg in legs] == ["ok"] * 3
    assert legs[2].requests == third.requests
