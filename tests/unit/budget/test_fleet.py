"""What several replicas hold and do at most: by hand, at the borders, and as the command prints it."""

from __future__ import annotations

import json

import pytest

from kvprofile.budget.capacity import GPUS, parse_gpu_memory, plan
from kvprofile.budget.fleet import BANDWIDTHS, fleet
from kvprofile.budget.model_shape import shape_of_config
from kvprofile.cli import run
from kvprofile.errors import InputError

GIB = 2**30
LLAMA_8B = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "torch_dtype": "bfloat16",
}


def saved(folder):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(LLAMA_8B))
    return folder


def planned(tmp_path, gpu="H100", **options):
    shape = shape_of_config(saved(tmp_path / "m") / "config.json", "m")
    return plan(shape, parse_gpu_memory(gpu), 8000, retentions=(0.5,), **options)


def test_numbers_are_those_of_one_replica_times_replicas(tmp_path):
    one = planned(tmp_path, weight_bytes=16 * GIB, tensor_parallel_size=2)
    found = fleet(one, 3)
    assert (found.replicas, found.gpus, found.memory_bytes_per_second) == (3, 6, 3350 * 10**9)
    # two all-reduces in each of 32 layers of 4,096 numbers of 2 bytes; of two ranks each sends all of it once
    assert found.exchanged_bytes_per_token_per_gpu == 2 * 32 * 4096 * 2
    for at, there in zip(one.at, found.at, strict=True):
        step_s = (8 * GIB + at.requests * at.kv_bytes_read_per_step_per_gpu) / 3350e9
        assert there.requests == 3 * at.requests
        assert there.tokens_per_second == pytest.approx(3 * at.requests / step_s)
        assert there.exchanged_bytes_per_second_per_gpu == pytest.approx(at.requests / step_s * 2 * 32 * 4096 * 2)


def test_one_rank_sends_nothing_and_weights_slow_small_batches(tmp_path):
    found = fleet(planned(tmp_path, weight_bytes=16 * GIB), 1)
    assert found.exchanged_bytes_per_token_per_gpu == 0
    assert not any(decision.what == "width of a layer" for decision in found.decisions)
    whole, half = found.at
    assert 1 < half.tokens_per_second / whole.tokens_per_second < half.requests / whole.requests + 0.05


def test_what_is_not_known_is_null(tmp_path):
    nameless = fleet(planned(tmp_path, gpu="80GB", weight_bytes=16 * GIB), 2)
    assert nameless.memory_bytes_per_second is None
    assert nameless.at[0].tokens_per_second is None
    assert nameless.at[0].requests > 0
    assert fleet(planned(tmp_path, gpu="80GB", weight_bytes=16 * GIB), 2, "2TB").at[0].tokens_per_second > 0
    full = fleet(planned(tmp_path, weight_bytes=90 * GIB), 2)
    assert (full.at[0].requests, full.at[0].tokens_per_second) == (0, None)


def test_every_gpu_with_a_name_has_a_speed():
    assert set(BANDWIDTHS) == {f"{name} {sold}GB" for name, sizes in GPUS.items() for sold in sizes}


@pytest.mark.parametrize(("replicas", "speed"), [(0, None), (-1, None), (10**9, None), (2, "fast"), (2, "0KB")])
def test_counts_and_speeds_that_make_no_sense(replicas, speed, tmp_path):
    with pytest.raises(InputError):
        fleet(planned(tmp_path), replicas, speed)


def test_the_command_prints_it(tmp_path, capsys):
    folder = str(saved(tmp_path / "m"))
    asked = ["plan", folder, "--gpu-memory", "H100", "--context", "8000", "--tensor-parallel-size", "2"]
    assert run([*asked, "--replicas", "4", "--retention", "0.3"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "4 replicas, 8 GPUs, every pool full of decoding requests" in out
    assert "each sends 512 KiB inside its replica" in out
    assert run([*asked, "--replicas", "4", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["fleet"]["at"][0]["requests"] == 4 * found["at"][0]["requests"]
    assert run([*asked, "--json"]) == 0
    assert "fleet" not in json.loads(capsys.readouterr().out)
    assert run([*asked, "--memory-bandwidth", "2TB"]) == 2
    assert capsys.readouterr().err == "kvprofile: --memory-bandwidth is for --replicas\n"
