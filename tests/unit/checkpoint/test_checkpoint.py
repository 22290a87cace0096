"""Choosing device, dtype and device map, fingerprints, and names."""

from __future__ import annotations

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from kvprofile import checkpoint
from kvprofile.errors import InputError
from tests.helpers.models import POCKET, random_model, save_checkpoint

GIB = 2**30


def choose(**changes):
    sizes = {
        "dtype": "auto",
        "device": "auto",
        "own_dtype": "bfloat16",
        "parameters": 14 * 10**9,
        "cache_values": 10**9,
        "free_cuda_bytes": (),
        "free_host_bytes": 200 * GIB,
    }
    return checkpoint.choose_placement(**{**sizes, **changes})


def test_cpu_takes_float32_where_it_fits():
    assert choose().dtype == "float32"
    assert choose(free_host_bytes=40 * GIB).dtype == "bfloat16"
    assert "would not fit" in " ".join(choose(free_host_bytes=40 * GIB).reasons)


def test_gpu_takes_the_checkpoints_dtype_and_a_map_where_it_must():
    one = choose(free_cuda_bytes=(80 * GIB,))
    assert (one.device, one.dtype, one.device_map) == ("cuda", "bfloat16", False)
    two = choose(free_cuda_bytes=(20 * GIB, 20 * GIB))
    assert two.device_map
    assert "device map over GPUs" in two.reasons[-1]
    small = choose(free_cuda_bytes=(12 * GIB,))
    assert small.device_map
    assert "GPU and CPU memory" in small.reasons[-1]


def test_what_is_asked_for_is_obeyed():
    placement = choose(dtype="float16", device="cuda:1", free_cuda_bytes=(80 * GIB, 80 * GIB))
    assert (placement.device, placement.dtype, placement.device_map) == ("cuda:1", "float16", False)
    assert placement.reasons == ("device cuda:1: asked for", "dtype float16: asked for")
    with pytest.raises(InputError, match="unknown dtype"):
        choose(dtype="float8")


def test_a_device_map_loads_the_same_weights(tiny_checkpoint):
    description = checkpoint.describe(checkpoint.locate(str(tiny_checkpoint)))
    mapped = checkpoint.load_model(description, checkpoint.Placement("cpu", "float32", True, ()))
    plain = checkpoint.load_model(description, checkpoint.Placement("cpu", "float32", False, ()))
    ids = torch.tensor([[5, 6, 7]])
    torch.testing.assert_close(mapped(ids).logits, plain(ids).logits)
    assert not any(parameter.requires_grad for parameter in plain.parameters())


def test_fingerprint_tells_fine_tunes_apart_but_not_shards(tiny_checkpoint, tmp_path):
    first = checkpoint.describe(checkpoint.locate(str(tiny_checkpoint)))
    sharded = tmp_path / "sharded"
    random_model("llama").save_pretrained(sharded, max_shard_size="100KB")
    assert len(list(sharded.glob("*.safetensors"))) > 1
    assert checkpoint.describe(checkpoint.locate(str(sharded))).weights_sha256 == first.weights_sha256

    tuned = shutil.copytree(tiny_checkpoint, tmp_path / "tuned")
    weights = load_file(tuned / "model.safetensors")
    weights["model.norm.weight"][-1] += 1
    save_file(weights, tuned / "model.safetensors", metadata={"format": "pt"})
    second = checkpoint.describe(checkpoint.locate(str(tuned)))
    assert second.weights_sha256 != first.weights_sha256
    assert second.geometry.sha256() == first.geometry.sha256()


def test_names_and_commits_come_from_the_hub_layout(tiny_checkpoint, tmp_path):
    commit = "a" * 40
    folder = tmp_path / "models--some-org--tiny" / "snapshots" / commit
    shutil.copytree(tiny_checkpoint, folder)
    source = checkpoint.locate(str(folder))
    assert (source.name, source.revision) == ("some-org/tiny", commit)
    plain = checkpoint.locate(str(tiny_checkpoint))
    assert (plain.name, plain.revision) == ("tiny", None)


def test_tokenizer_hash_depends_on_the_vocabulary_alone(tiny_checkpoint, tmp_path, tokenizer):
    copy = save_checkpoint(random_model("llama"), tmp_path / "copy", tokenizer)
    (copy / "tokenizer.json").write_text((copy / "tokenizer.json").read_text().replace("  ", " "))
    ours, theirs = (
        checkpoint.tokenizer_sha256(checkpoint.load_tokenizer(checkpoint.locate(str(folder))))
        for folder in (tiny_checkpoint, copy)
    )
    assert ours == theirs
    tokenizer.add_tokens(["something-new"])
    try:
        assert checkpoint.tokenizer_sha256(tokenizer) != ours
    finally:
        tokenizer.__dict__.update(checkpoint.load_tokenizer(checkpoint.locate(str(tiny_checkpoint))).__dict__)


@pytest.mark.parametrize("name", ["../../etc/passwd", "a/b", "..", "x\0y", "Ünï cöde", "-rf"])
def test_file_names_never_leave_the_folder(name):
    from kvprofile.budget.store import file_name

    try:
        made = file_name(name)
    except InputError:
        return
    assert "/" not in made
    assert not made.startswith((".", "-"))
    assert made.endswith(".json")


@pytest.mark.parametrize("name", ["pocket", "models/pocket"])
def test_the_bundled_checkpoint_is_there_wherever_one_is(name, workplace):
    """Else its name in the docs would be a hub id of somebody else."""
    found = checkpoint.locate(name)
    assert (found.name, found.from_hub) == ("pocket", False)
    assert found.folder.resolve() == POCKET.resolve()
    own = workplace / name
    own.mkdir(parents=True)
    assert checkpoint.locate(name).folder.resolve() == own.resolve()
    (workplace / "models").mkdir(exist_ok=True)
    with pytest.raises(InputError, match="no checkpoint folder models/other"):
        checkpoint.locate("models/other")
