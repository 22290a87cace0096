"""Hub ids, on a hub of this machine: what is fetched, and what is not."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import pytest

from tests.helpers.hub import COMMIT, served
from tests.helpers.models import ROOT, random_model

pytestmark = pytest.mark.loopback
FAST = ["--corpus", "generate:prose:1:3000", "--context-tokens", "64", "--chunk-tokens", "32"]


def score(model, address, place):
    """Run `kvprofile score` in a process of its own, because the hub's client reads its address when imported."""
    environment = {**os.environ, "HF_ENDPOINT": address, "HF_HUB_OFFLINE": "0", "HF_HOME": str(place / "hub")}
    environment |= {"HF_HUB_CACHE": str(place / "hub"), "PYTHONPATH": str(ROOT), "HF_HUB_DISABLE_XET": "1"}
    arguments = [sys.executable, "-m", "kvprofile", "score", model, *FAST]
    return subprocess.run(arguments, capture_output=True, text=True, check=False, cwd=place, env=environment)


@pytest.mark.parametrize("shards", [True, False], ids=["shards", "one file"])
def test_only_the_weights_that_the_index_names_are_fetched(tiny_checkpoint, tmp_path, shards):
    folder = shutil.copytree(tiny_checkpoint, tmp_path / "tiny")
    if shards:
        (folder / "model.safetensors").unlink()
        random_model("llama").save_pretrained(folder, max_shard_size="100KB")
    named = {file.name for file in folder.glob("*.safetensors")}
    (folder / "original").mkdir()
    for again in ("consolidated.safetensors", "original/model.safetensors", "original/model--00001-of-2.safetensors"):
        shutil.copy(folder / sorted(named)[0], folder / again)
    (folder / "pytorch_model.bin").write_bytes(b"pickled")
    place = tmp_path / "place"
    place.mkdir()
    with served("some-org/tiny", folder) as (address, read):
        ran = score("some-org/tiny", address, place)
    assert ran.returncode == 0, ran.stderr
    assert len(named) > 1 if shards else named == {"model.safetensors"}
    assert {name for name in read if name.endswith((".safetensors", ".bin"))} == named
    written = json.loads((place / "models/kv_budget/some-org--tiny.json").read_text())
    assert (written["model"]["name"], written["model"]["revision"]) == ("some-org/tiny", COMMIT)


def test_a_refused_model_is_refused_before_its_weights_are_fetched(tiny_checkpoint, tmp_path):
    folder = shutil.copytree(tiny_checkpoint, tmp_path / "tiny")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "kv_lora_rank": 8}))
    with served("some-org/tiny", folder) as (address, read):
        ran = score("some-org/tiny", address, tmp_path)
    assert ran.returncode == 2, ran.stderr
    assert "multi-head latent attention" in ran.stderr.splitlines()[-1]
    assert not [name for name in read if name.endswith(".safetensors")]
