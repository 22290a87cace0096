"""What takes a minute or more: training's machinery, kills at random moments, and memory against context length."""

from __future__ import annotations

import json
import random
import re
import signal
import subprocess
import sys
import time

import pytest

from tests.helpers.models import ROOT
from tests.helpers.score_runs import finish, start

pytestmark = pytest.mark.slow


def train(folder, *options):
    command = [sys.executable, "scripts/train_pocket.py", "--smoke", "--save-every", "4", "--output", str(folder)]
    command += options
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_training_runs_stops_and_continues(tmp_path):

    undisturbed = train(tmp_path / "undisturbed")
    assert undisturbed.wait(timeout=300) == 0, undisturbed.stderr.read()
    stopped = train(tmp_path / "model")
    while not (tmp_path / "model" / "training-state.pt").exists():
        assert stopped.poll() is None, stopped.stderr.read()
        time.sleep(0.05)
    stopped.kill()
    stopped.communicate()
    continued = train(tmp_path / "model")
    output, errors = continued.communicate(timeout=300)
    assert continued.returncode == 0, errors
    assert re.search(r"continuing at step \d+ of 20", output)
    first, second = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("undisturbed", "model"))
    assert first == second
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert model.config.num_key_value_heads == 4
    assert tokenizer("[Kuvi=2415]")["input_ids"][-5:-1] == [tokenizer.convert_tokens_to_ids(d) for d in "2415"]


def test_training_goes_on_from_a_finished_checkpoint(tmp_path):
    first = train(tmp_path / "first")
    assert first.wait(timeout=300) == 0, first.stderr.read()
    same_rows = train(tmp_path / "second", "--start", str(tmp_path / "first"))
    assert same_rows.wait(timeout=300) == 1
    assert "was trained on the rows of seed 0; choose another --seed" in same_rows.stderr.read()
    second = train(tmp_path / "second", "--start", str(tmp_path / "first"), "--seed", "1")
    output, errors = second.communicate(timeout=300)
    assert second.returncode == 0, errors
    record, start = (json.loads((tmp_path / name / "training.json").read_text()) for name in ("second", "first"))
    assert record["start"] == start
    losses = [float(found) for found in re.findall(r"loss ([\d.]+)", output)]
    before = [float(found) for found in re.findall(r"loss ([\d.]+)", first.stdout.read())]
    assert losses[0] < 0.9 * before[0]  # it begins where the first ended, not anew


def test_killed_at_random_moments_gives_the_same_bytes(tiny_checkpoint, tmp_path):
    expected = tmp_path / "expected" / "tiny.json"
    finish(tiny_checkpoint, expected)
    output = tmp_path / "tiny.json"
    rng = random.Random(0)
    kills = 0
    while not output.exists() and kills < 12:
        process = start(tiny_checkpoint, output)
        time.sleep(rng.uniform(2.5, 5.5))
        process.send_signal(rng.choice((signal.SIGKILL, signal.SIGINT, signal.SIGTERM)))
        process.communicate()
        kills += 1
    finish(tiny_checkpoint, output)
    assert output.read_bytes() == expected.read_bytes()
    assert sorted(file.name for file in tmp_path.iterdir()) == ["expected", "tiny.json", "tiny.probe.safetensors"]


def test_memory_over_weights_and_cache_does_not_grow():
    command = [sys.executable, "benchmarks/score_memory.py", "--context"]
    extra = [
        json.loads(subprocess.run([*command, n], cwd=ROOT, capture_output=True, text=True, check=True).stdout)[
            "extra_bytes"
        ]
        for n in ("2048", "8192")
    ]
    assert extra[1] < 1.3 * extra[0], extra
