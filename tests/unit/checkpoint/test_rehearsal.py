"""What a checkpoint holds and does not hold: every tensor is read rightly, left out and said, or refused by name."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from kvprofile import checkpoint as checkpoints
from kvprofile.budget.profile import Geometry
from kvprofile.checkpoint.rehearsal import rehearse
from kvprofile.checkpoint.weights import read_header
from kvprofile.errors import InputError
from kvprofile.scoring.engine import choose_engine
from tests.helpers.models import _SHAPE, FAMILIES, POCKET, random_model, save_checkpoint
from tests.helpers.quantised import quantise


def describe(folder):
    return checkpoints.describe(checkpoints.locate(str(folder)))


def change_weights(folder, change):
    file = folder / "model.safetensors"
    weights = load_file(file)
    change(weights)
    save_file(weights, file, metadata={"format": "pt"})
    return folder


def modelopt(folder, name="modelopt", algorithm="FP8", side_file=True):
    """A copy in the form of NVIDIA's FP8 releases, and its twin with the same weights multiplied out."""
    float8, twin = (
        shutil.copytree(folder, folder.parent / name),
        shutil.copytree(folder, folder.parent / f"{name}-twin"),
    )
    plain = load_file(folder / "model.safetensors")
    packed = dict(plain)
    for weight in [weight for weight in plain if weight.endswith("proj.weight")]:
        scale = plain[weight].abs().max() / 448
        packed[weight] = (plain[weight] / scale).to(torch.float8_e4m3fn)
        packed[weight.replace(".weight", ".weight_scale")] = scale.reshape(())
        packed[weight.replace(".weight", ".input_scale")] = torch.tensor(0.01)
        plain[weight] = packed[weight].float() * scale
    packed["model.layers.0.self_attn.k_proj.k_scale"] = torch.tensor(0.5)
    save_file(packed, float8 / "model.safetensors", metadata={"format": "pt"})
    save_file(plain, twin / "model.safetensors", metadata={"format": "pt"})
    told = {"quant_algo": algorithm, "kv_cache_quant_algo": "FP8", "exclude_modules": ["lm_head"]}
    if side_file:
        (float8 / "hf_quant_config.json").write_text(json.dumps({"quantization": told}))
    else:
        config = json.loads((float8 / "config.json").read_text())
        config["quantization_config"] = {"quant_method": "modelopt", **told}
        (float8 / "config.json").write_text(json.dumps(config))
    return float8, twin


@pytest.mark.parametrize("side_file", [True, False], ids=["hf_quant_config.json", "config.json"])
def test_modelopt_fp8_equals_its_multiplied_out_twin(checkpoint, side_file):
    float8, twin = modelopt(checkpoint, side_file=side_file)
    descriptions = [describe(folder) for folder in (float8, twin)]
    placements = [checkpoints.place(each, "float32", "cpu", 100) for each in descriptions]
    ours, theirs = (checkpoints.load_model(*each) for each in zip(descriptions, placements, strict=True))
    ids = torch.tensor([[5, 6, 7, 8]])
    assert torch.equal(ours(ids).logits, theirs(ids).logits)
    assert placements[0].weights == "float32, multiplied out from modelopt FP8"
    assert placements[1].weights == "float32"
    assert descriptions[0].notes == (
        "1 tensors are left out: scales of a quantised cache, which scores are not taken with",
    )
    assert choose_engine("auto", descriptions[0], "kvzip")[0] == "hf"
    assert checkpoints.weight_bytes_in(descriptions[0], "bfloat16") == pytest.approx(
        checkpoints.weight_bytes_in(descriptions[1], "bfloat16"), rel=0.01
    )


def test_weights_that_transformers_unpacks_are_unpacked_when_they_are_loaded(tmp_path):
    """compressed-tensors would wait for a forward pass of the whole model, which scoring does not do."""
    folder = quantise(POCKET, tmp_path / "int8")
    description = describe(folder)
    placement = checkpoints.place(description, "float32", "cpu", 100)
    assert placement.weights == "float32, multiplied out from compressed-tensors"
    model = checkpoints.load_model(description, placement)
    stored = load_file(folder / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj"
    torch.testing.assert_close(
        model.get_parameter(f"{name}.weight").data, stored[f"{name}.weight"].float() * stored[f"{name}.weight_scale"]
    )
    assert model.model(torch.tensor([[5, 6, 7]])).last_hidden_state.isfinite().all()


def test_blocks_of_float8_are_unpacked_on_a_cpu(tmp_path, tokenizer):
    """As Qwen's and DeepSeek's FP8 releases, whose kernels need a GPU."""
    shape = {"hidden_size": 128, "intermediate_size": 128, "num_key_value_heads": 4, "num_hidden_layers": 2}
    folder = save_checkpoint(random_model("llama", **shape), tmp_path / "fp8", tokenizer)

    def pack(weights):
        for name in [name for name in weights if name.endswith("proj.weight")]:
            scale = weights[name].abs().max() / 448
            weights[name] = (weights[name] / scale).to(torch.float8_e4m3fn)
            weights[f"{name}_scale_inv"] = scale.reshape(1, 1)

    change_weights(folder, pack)
    config = json.loads((folder / "config.json").read_text())
    told = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": told}))
    description = describe(folder)
    model = checkpoints.load_model(description, checkpoints.place(description, "float32", "cpu", 100))
    stored = load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    torch.testing.assert_close(
        model.get_parameter(name).data, stored[name].float() * stored[f"{name}_scale_inv"], rtol=1e-2, atol=1e-3
    )


def test_a_float8_weight_with_many_scales_is_refused(checkpoint):
    float8, _ = modelopt(checkpoint)
    name = "model.layers.0.mlp.up_proj.weight_scale"
    change_weights(float8, lambda weights: weights.update({name: torch.ones(96)}))
    description = describe(float8)
    with pytest.raises(InputError, match=r"has 96 scales, not one"):
        checkpoints.load_model(description, checkpoints.place(description, "float32", "cpu", 100))


@pytest.mark.parametrize("algorithm", ["NVFP4", "W4A8_AWQ", "FP8_PER_CHANNEL_PER_TOKEN"])
def test_other_modelopt_formats_are_refused_where_transformers_would_run_them(checkpoint, algorithm):
    float8, _ = modelopt(checkpoint, algorithm=algorithm)
    with pytest.raises(InputError, match=f"quantised by modelopt {algorithm}, which transformers"):
        checkpoints.place(describe(float8), "auto", "cpu", 100)


def test_a_quantiser_that_transformers_would_skip_with_a_warning_is_refused(checkpoint):
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "novel"}}))
    with pytest.raises(InputError, match="quantised by novel, which transformers"):
        checkpoints.place(describe(checkpoint), "auto", "cpu", 100)


@pytest.mark.parametrize("content", ["[", "[]", "{}", '{"quantization": 1}', "[" * 100_000])
def test_a_side_file_that_says_nothing(checkpoint, content):
    (checkpoint / "hf_quant_config.json").write_text(content)
    with pytest.raises(InputError, match="does not say how the weights are quantised"):
        describe(checkpoint)


def test_a_quantised_cache_alone_leaves_weights_as_they_are(checkpoint):
    told = {"quantization": {"quant_algo": None, "kv_cache_quant_algo": "FP8"}}
    (checkpoint / "hf_quant_config.json").write_text(json.dumps(told))
    assert describe(checkpoint).quantisation is None


K_PROJ = "model.layers.1.self_attn.k_proj"
WRONG = {
    "scale of a weight": ({f"{K_PROJ}.weight_scale": torch.ones(())}, "weight_scale"),
    "inverse scale of blocks": ({f"{K_PROJ}.weight_scale_inv": torch.ones(1, 1)}, "weight_scale_inv"),
    "scale of inputs": ({f"{K_PROJ}.input_scale": torch.ones(())}, "input_scale"),
    "float8": ({f"{K_PROJ}.weight": torch.ones(32, 64).to(torch.float8_e4m3fn)}, "is stored as F8_E4M3"),
    "packed in bytes": ({f"{K_PROJ}.weight": torch.ones(32, 64, dtype=torch.uint8)}, "is stored as U8"),
    "int8": ({f"{K_PROJ}.weight": torch.ones(32, 64, dtype=torch.int8)}, "is stored as I8"),
    "a bias": ({f"{K_PROJ}.bias": torch.ones(32)}, f"hold {K_PROJ}.bias"),
    "a layer more": ({"model.layers.3.input_layernorm.weight": torch.ones(64)}, "layers.3.input_layernorm"),
    "an adapter": ({f"{K_PROJ}.lora_A.weight": torch.ones(2, 64)}, "lora_A"),
    "shape": ({f"{K_PROJ}.weight": torch.ones(16, 64)}, r"k_proj.weight has shape \[16, 64\]"),
}


@pytest.mark.parametrize(("added", "told"), WRONG.values(), ids=WRONG)
def test_tensors_that_the_model_does_not_have_are_refused(checkpoint, added, told):
    change_weights(checkpoint, lambda weights: weights.update(added))
    with pytest.raises(InputError, match=told):
        describe(checkpoint)


HARMLESS = {
    "rotary buffers": ("model.layers.0.self_attn.rotary_emb.inv_freq", None),
    "next-token layers": ("mtp.layers.0.mlp.up_proj.weight", "layers for speculative decoding"),
    "an image encoder": ("vision_tower.encoder.layers.0.mlp.fc1.weight", "an encoder of images or sound"),
    "scales of a cache": ("model.layers.0.self_attn.k_scale", "scales of a quantised cache"),
}


@pytest.mark.parametrize(("name", "told"), HARMLESS.values(), ids=HARMLESS)
def test_tensors_that_change_nothing_are_left_out_and_named(checkpoint, name, told):
    change_weights(checkpoint, lambda weights: weights.update({name: torch.ones(8)}))
    notes = describe(checkpoint).notes
    assert notes == () if told is None else (len(notes) == 1 and told in notes[0])


def test_an_expert_that_is_missing(tmp_path, tokenizer):
    folder = save_checkpoint(random_model("qwen3_moe"), tmp_path / "moe", tokenizer)
    change_weights(folder, lambda weights: weights.pop("model.layers.1.mlp.experts.2.down_proj.weight"))
    with pytest.raises(InputError, match=r"one layer's experts, are missing|down_proj has shape"):
        describe(folder)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_passes_as_it_is_saved(family, tmp_path, tokenizer):
    found = describe(save_checkpoint(random_model(family), tmp_path / family, tokenizer))
    assert found.notes == ()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("change", [{"kv_heads": 4}, {"head_size": 8}], ids=str)
def test_layers_of_other_heads_are_found_before_weights_are_read(family, change, tmp_path, tokenizer):
    """Read on the meta device, whatever a config and its reader say."""
    folder = save_checkpoint(random_model(family), tmp_path / family, tokenizer)
    found = describe(folder)
    stated = Geometry(**{**found.geometry.model_dump(), **change})
    with pytest.raises(InputError, match=r"layer 0 has 4 query heads and 2 KV heads .* the config says"):
        rehearse(folder, found.config, stated, read_header(folder / "model.safetensors"))


def test_mixtures_of_attention_heads_are_refused(checkpoint):
    transformers.JetMoeConfig(**_SHAPE).save_pretrained(checkpoint)
    with pytest.raises(InputError, match="cannot be profiled: each token chooses query heads of its own"):
        describe(checkpoint)


def test_layers_of_different_heads_are_refused(checkpoint):
    transformers.Gemma4TextConfig(**_SHAPE, hidden_size_per_layer_input=0).save_pretrained(checkpoint)
    with pytest.raises(InputError, match=r"cannot be profiled: its layers (differ|share)"):
        describe(checkpoint)
