"""GGUF files: the same scores as the weights that they hold, and everything they state is in the model or refused."""

from __future__ import annotations

import importlib.util
import json

import gguf
import numpy as np
import pytest
import torch

from kvprofile import checkpoint as checkpoints
from kvprofile.cli import run
from kvprofile.errors import InputError
from tests.helpers.gguf_file import write_gguf
from tests.helpers.models import random_model

FAST = ["--corpus", "generate:prose:1:3000", "--context-tokens", "64", "--chunk-tokens", "32"]


def describe(path):
    return checkpoints.describe(checkpoints.locate(str(path)))


def load(path):
    description = describe(path)
    return checkpoints.load_model(description, checkpoints.place(description, "float32", "cpu", 100))


def twin_of(model, held):
    missing, unexpected = model.load_state_dict(
        {name: torch.tensor(values) for name, values in held.items()}, strict=False
    )
    assert not unexpected
    assert set(missing) <= {"lm_head.weight"}
    return model


@pytest.mark.parametrize("quantisation", ["F32", "F16", "Q8_0", "Q4_1"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_the_model_is_that_of_the_weights_in_the_file(family, quantisation, tmp_path):
    model = random_model(family, num_hidden_layers=2)
    path = tmp_path / "tiny.gguf"
    twin = twin_of(model, write_gguf(path, model, quantisation=quantisation))
    ids = torch.tensor([[5, 60, 7, 800, 9]])
    torch.testing.assert_close(load(path)(ids).logits, twin(ids).logits, atol=1e-5, rtol=1e-5)
    assert describe(path).quantisation.method == f"GGUF {quantisation}"


def test_tied_embeddings(tmp_path):
    model = random_model("llama", tie_word_embeddings=True)
    twin = twin_of(model, write_gguf(tmp_path / "tied.gguf", model))
    ids = torch.tensor([[5, 60, 7]])
    torch.testing.assert_close(load(tmp_path / "tied.gguf")(ids).logits, twin(ids).logits, atol=1e-5, rtol=1e-5)


def test_factors_of_rotary_frequencies_are_llama_3s(tmp_path):
    """llama.cpp writes Llama 3's scaling as one factor for each frequency."""
    rope = {
        "rope_type": "llama3",
        "rope_theta": 1e4,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    model = random_model("llama", rope_parameters=rope)
    plain = 1e4 ** (-torch.arange(0, 16, 2).float() / 16)
    factors = plain / model.model.rotary_emb.inv_freq
    assert factors.max() > 7
    path = tmp_path / "scaled.gguf"
    twin = twin_of(model, write_gguf(path, model, tensors=[("rope_freqs.weight", factors.numpy())]))
    ids = torch.arange(4, 300)[None]
    torch.testing.assert_close(load(path)(ids).logits, twin(ids).logits, atol=1e-4, rtol=1e-4)
    assert describe(path).max_positions == 4096


def test_score_evaluate_and_plan_read_a_file(tmp_path, workplace, capsys):
    path = tmp_path / "tiny-q8.gguf"
    write_gguf(path, random_model("llama"), quantisation="Q8_0")
    (tmp_path / "tokenizer.json").write_text("not this one")
    assert run(["score", str(path), *FAST]) == 0, capsys.readouterr().err
    told = capsys.readouterr().err
    assert "it/s" not in told
    assert "weights multiplied out from GGUF Q8_0" in told
    budget_file = workplace / "models/kv_budget/tiny-q8.gguf.json"
    written = json.loads(budget_file.read_text())
    assert written["model"]["name"] == "tiny-q8.gguf"
    assert written["scoring"]["dtype"] == "float32, multiplied out from GGUF Q8_0"
    assert written["model"]["weights_sha256"]
    first = budget_file.read_bytes()
    assert run(["score", str(path), *FAST]) == 0
    assert budget_file.read_bytes() == first
    capsys.readouterr()
    assert run(["plan", str(path), "--gpu-memory", "24GiB", "--context", "1000", "--json"]) == 0
    planned = json.loads(capsys.readouterr().out)
    assert planned["geometry"] == written["model"]["geometry"]
    assert planned["sink_tokens"] == written["runtime"]["sink_tokens"]  # counted with the file that was just written
    assert planned["kind"] == ("whole" if written.get("probe") is None else "graded")
    assert "models/kv_budget/tiny-q8.gguf.json" in [each["value"] for each in planned["decisions"]]
    assert planned["weight_bytes_per_gpu"] == describe(path).weight_bytes < path.stat().st_size
    asked = ["--tasks", "needle", "--context-tokens", "200", "--contexts", "1", "--questions", "1", "--exact-only"]
    assert run(["evaluate", str(path), *asked, "--retention", "0.5", "--no-controls", "--json"]) == 0


def test_the_tokenizer_is_the_files_own(tmp_path, tokenizer):
    write_gguf(tmp_path / "tiny.gguf", random_model("llama"))
    found = checkpoints.load_tokenizer(checkpoints.locate(str(tmp_path / "tiny.gguf")))
    text = "It rained on 12 hills, and then (at last) it did not.\n\n1. Again,\n   2 days later"
    assert found(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert found.chat_template == tokenizer.chat_template
    assert (found.bos_token, found.eos_token) == (tokenizer.bos_token, tokenizer.eos_token) == (None, "<|end|>")
    # transformers adds <|endoftext|> behind a byte-level vocabulary that has none
    assert set(tokenizer.get_vocab().items()) == set(found.get_vocab().items()) - {("<|endoftext|>", 1024)}


def test_a_split_of_text_that_nobody_knows_is_refused(tmp_path):
    """transformers would split as GPT-2 does, and other ids would come of the same text."""
    write_gguf(tmp_path / "odd.gguf", random_model("llama"), split="no-such-split")
    with pytest.raises(InputError, match="splits text as no-such-split does, which transformers does not know"):
        checkpoints.load_tokenizer(checkpoints.locate(str(tmp_path / "odd.gguf")))


def test_the_fingerprint_tells_fine_tunes_apart(tmp_path):
    for seed, name in ((0, "a"), (0, "b"), (1, "c")):
        write_gguf(tmp_path / f"{name}.gguf", random_model("llama", seed=seed))
    first, again, other = (describe(tmp_path / f"{name}.gguf").weights_sha256 for name in "abc")
    assert first == again != other


REFUSED = {
    "scaled positions": ({"facts": [("rope.scaling.type", "yarn")]}, "rope.scaling.type = yarn"),
    "scale of positions": ({"facts": [("rope.scaling.factor", 4.0)]}, "rope.scaling.factor = 4"),
    "capped logits": ({"facts": [("attn_logit_softcapping", 50.0)]}, "attn_logit_softcapping = 50"),
    "other heads": (
        {"facts": [("attention.value_length", 24.0)]},
        "value_length = 24.0, which transformers reads as 16",
    ),
    "experts": ({"facts": [("expert_count", 8.0)]}, "expert_count = 8"),
    "a tensor more": ({"tensors": [("blk.0.attn_sinks.weight", np.ones(4))]}, "values in"),
    "too few factors": ({"tensors": [("rope_freqs.weight", np.ones(3))]}, "has 3 factors for heads of size 16"),
    "no factors": ({"tensors": [("rope_freqs.weight", np.zeros(8))]}, "rope_freqs.weight has 8 factors"),
}


@pytest.mark.parametrize(("changes", "told"), REFUSED.values(), ids=REFUSED)
def test_what_a_file_states_and_the_model_lacks_is_refused(changes, told, tmp_path):
    write_gguf(tmp_path / "odd.gguf", random_model("llama"), **changes)
    with pytest.raises(InputError, match=told.replace("(", r"\(")):
        describe(tmp_path / "odd.gguf")


def test_other_architectures_are_refused(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "other.gguf", "gemma3")
    writer.add_tensor("token_embd.weight", np.zeros((4, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(InputError, match="reads GGUF files of llama, qwen2, qwen3, qwen3moe, not of gemma3"):
        describe(tmp_path / "other.gguf")


@pytest.mark.parametrize("left", [0, 3, 100, 5000, -1])
def test_a_truncated_file(left, tmp_path, workplace, capsys):
    write_gguf(tmp_path / "whole.gguf", random_model("llama"))
    (tmp_path / "part.gguf").write_bytes((tmp_path / "whole.gguf").read_bytes()[:left])
    assert run(["score", str(tmp_path / "part.gguf"), *FAST]) == 2
    [line] = capsys.readouterr().err.strip().splitlines()
    assert "part.gguf is truncated" in line
    assert not list(workplace.iterdir())


def test_without_the_package(tmp_path, monkeypatch, capsys):
    write_gguf(tmp_path / "tiny.gguf", random_model("llama"))
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name == "gguf" else find(name, *more))
    assert run(["score", str(tmp_path / "tiny.gguf"), *FAST]) == 2
    assert "needs the gguf package; pip install 'kvprofile[gguf]'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--engine", "vllm"], "--engine vllm does not run tiny.gguf"),
        (["--revision", "main"], "is a file and has no revisions"),
    ],
)
def test_flags_that_do_not_go_with_a_file(tmp_path, capsys, flags, told):
    write_gguf(tmp_path / "tiny.gguf", random_model("llama"))
    assert run(["score", str(tmp_path / "tiny.gguf"), *FAST, *flags]) == 2
    assert told in capsys.readouterr().err


def test_a_folder_of_gguf_files_names_them(checkpoint):
    (checkpoint / "model.safetensors").unlink()
    write_gguf(checkpoint / "tiny.gguf", random_model("llama"))
    with pytest.raises(InputError, match=r"give the file itself: .*tiny.gguf"):
        describe(checkpoint)
