from __future__ import annotations

import json
import struct
from dataclasses import replace
from pathlib import Path

import pytest

from kvprofile.budget import model_shape, store
from kvprofile.budget.capacity import GPUS, kv_bytes_per_token, parse_gpu_memory, plan
from kvprofile.budget.model_shape import ModelShape, find_shape, shape_of_config
from kvprofile.budget.profile import HeadBudgets
from kvprofile.errors import InputError
from tests.helpers.factories import make_geometry, make_profile

LLAMA_8B = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
GEMMA_LIKE = {
    "model_type": "gemma3_text",
    "hidden_size": 2560,
    "intermediate_size": 10240,
    "num_hidden_layers": 34,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "vocab_size": 262208,
    "sliding_window": 1024,
    "layer_types": ["full_attention" if layer % 6 == 5 else "sliding_attention" for layer in range(34)],
}
GIB_24 = parse_gpu_memory("24GiB")


@pytest.fixture(autouse=True)
def no_hub_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(model_shape, "_cached_config", lambda _: None)


def write_config(folder: Path, config: dict) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def shape(tmp_path: Path, config: dict = LLAMA_8B, **changes: object) -> ModelShape:
    return shape_of_config(write_config(tmp_path / "m", {**config, **changes}) / "config.json", "m")


def test_llama_8b_numbers_by_hand(tmp_path):
    found = plan(shape(tmp_path), GIB_24, 9000, weight_bytes=15 * 2**30)
    # 2 (K, V) x 32 layers x 8 KV heads x 128 x 2 bytes
    assert found.kv_bytes_per_token == 131_072
    # 0.9 x 24 GiB - 15 GiB = 23,192,823,398 - 16,106,127,360
    assert found.cache_bytes_per_gpu == 7_086_696_038
    rows = {at.retention: at for at in found.at}
    assert list(rows) == [1.0, 0.9, 0.7, 0.5, 0.3]
    # a head holds 512 bytes a token; 256 heads x 9000 tokens, or 128 x 9000 + 128 x (128 + 256)
    assert rows[1.0].kv_bytes_read_per_step_per_gpu == 1_179_648_000
    assert rows[0.5].kv_bytes_read_per_step_per_gpu == 614_989_824
    assert rows[0.5].full_heads == 128
    assert rows[0.5].effective_retention == pytest.approx(0.5 + 0.5 * 384 / 9000)
    assert rows[0.5].speed_bound == pytest.approx(1.9182, abs=1e-4)
    # 7,086,696,038 / 1,179,648,000 = 6.007; / 614,989,824 = 11.52
    assert (rows[1.0].requests, rows[0.5].requests) == (6, 11)
    # one prefills with 1,179,648,000; the rest holds 9.6 more
    assert (rows[1.0].requests_beside_prefill, rows[0.5].requests_beside_prefill) == (6, 10)
    # 1,000 of the tokens are output, which trimmed heads keep: 128 x 9000 + 128 x (128 + 256 + 1000)
    found = plan(shape(tmp_path), GIB_24, 9000, output_tokens=1000, retentions=(0.5,), weight_bytes=15 * 2**30)
    assert found.at[1].kv_bytes_read_per_step_per_gpu == 512 * (128 * 9000 + 128 * 1384)


def test_weights_estimate_of_llama_8b(tmp_path):
    found = shape(tmp_path)
    # 8.03 billion parameters: 32 x (80 x 128 x 4096 + 3 x 4096 x 14336) + 2 x 128256 x 4096
    assert found.weight_bytes == 2 * 8_029_995_008
    assert "estimate" in found.weight_reason
    assert "2 of bfloat16" in found.weight_reason
    assert shape(tmp_path, tie_word_embeddings=True).weight_bytes == 2 * (8_029_995_008 - 128_256 * 4096)


def test_tensor_parallel_splits_heads_and_weights(tmp_path):
    found = plan(shape(tmp_path), GIB_24, 9000, retentions=[0.3], tensor_parallel_size=2, weight_bytes=15 * 2**30)
    assert found.weight_bytes_per_gpu == 8_053_063_680
    assert found.kv_bytes_per_token == 131_072
    assert found.kv_bytes_per_token_per_gpu == 65_536
    at = found.at[1]
    # 0.3 x 256 = 76.8; both ranks hold equally many, so an even number: 76
    assert at.full_heads == 76
    # (76 x 9000 + 180 x 384) x 512 / 2
    assert at.kv_bytes_read_per_step_per_gpu == 192_798_720
    assert at.requests == 15_139_759_718 // 192_798_720 == 78


def test_more_ranks_than_kv_heads_replicate_heads(tmp_path):
    found = plan(shape(tmp_path), GIB_24, 9000, retentions=[0.4], tensor_parallel_size=16)
    assert found.kv_bytes_per_token_per_gpu == 16_384
    assert found.kv_bytes_per_token == 16 * 16_384
    # whole layers only: 0.4 x 32 = 12.8 layers, so 13 x 8 heads
    assert found.at[1].full_heads == 104
    assert any(decision.value == "replicated x2" for decision in found.decisions)


@pytest.mark.parametrize("size", [3, 5, 64])
def test_ranks_that_heads_cannot_be_dealt_to_are_refused(tmp_path, size):
    with pytest.raises(InputError, match="give one of 1, 2, 4, 8, 16, 32"):
        plan(shape(tmp_path), GIB_24, 9000, tensor_parallel_size=size)


def test_sliding_layers_hold_their_window_at_every_retention(tmp_path):
    found = plan(shape(tmp_path, GEMMA_LIKE), GIB_24, 32_000, retentions=[0.5], dtype="bf16")
    full, half = found.at
    # (5 layers x 4 heads x 32000 + 29 layers x 4 heads x 1024) x 1024 bytes of a head and token
    assert full.kv_bytes_read_per_step_per_gpu == 776_994_816
    # (10 x 32000 + 10 x 384 + 29 x 4 x 1024) x 1024
    assert half.kv_bytes_read_per_step_per_gpu == 453_246_976
    assert half.speed_bound == pytest.approx(1.7143, abs=1e-4)
    assert found.kv_bytes_per_token == 2 * 34 * 4 * 256 * 2


def test_short_contexts_gain_nothing(tmp_path):
    found = plan(shape(tmp_path), GIB_24, 300)
    assert {at.speed_bound for at in found.at} == {1.0}
    assert {at.effective_retention for at in found.at} == {1.0}


def test_a_prompt_that_does_not_fit_whole_cannot_prefill(tmp_path):
    found = plan(shape(tmp_path), parse_gpu_memory("16GiB"), 9000, retentions=[0.5], weight_bytes=int(13.6 * 2**30))
    # 0.8 GiB left: half of the cache (0.57 GiB) fits, the whole one of a prefill (1.1 GiB) does not
    assert (found.at[1].requests, found.at[1].requests_beside_prefill) == (1, 0)


def test_weights_larger_than_the_gpu_leave_no_request(tmp_path):
    found = plan(shape(tmp_path), parse_gpu_memory("T4"), 9000)
    assert found.cache_bytes_per_gpu < 0
    assert {at.requests for at in found.at} == {0}
    assert {at.requests_beside_prefill for at in found.at} == {0}


def test_unknown_weights_make_unknown_requests(tmp_path):
    for extra in (
        {"quantization_config": {"bits": 4}},
        {"num_local_experts": 8},
        {"model_type": "unknown", "vocab_size": None},
    ):
        found = plan(shape(tmp_path, **extra), GIB_24, 9000)
        assert found.weight_bytes is None
        assert found.at[0].requests is None
        assert any("--weights-gib" in decision.reason for decision in found.decisions)
    assert plan(shape(tmp_path, num_local_experts=8), GIB_24, 9000, weight_bytes=2**30).at[0].requests == 18


def test_weights_next_to_the_config_are_counted(tmp_path):
    folder = write_config(tmp_path / "m", LLAMA_8B)
    header = b'{"__metadata__":{}}'
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(5000))
    assert find_shape(str(folder)).weight_bytes == 5000
    index = {"metadata": {"total_size": 16_060_522_496}, "weight_map": {}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    found = find_shape(str(folder))
    assert found.weight_bytes == 16_060_522_496
    assert "index" in found.weight_reason


def test_head_size_falls_back_to_hidden_size_and_window_to_the_config(tmp_path):
    assert shape(tmp_path).geometry.head_size == 128
    assert shape(tmp_path, head_dim=64).geometry.head_size == 64
    qwen = shape(tmp_path, sliding_window=4096, use_sliding_window=False)
    assert qwen.window_tokens is None
    assert len(qwen.geometry.profiled_layers) == 32
    gemma = shape(tmp_path, GEMMA_LIKE)
    assert gemma.geometry.profiled_layers == (5, 11, 17, 23, 29)
    assert gemma.window_tokens == 1024


def test_text_config_of_multimodal_models_is_read(tmp_path):
    nested = {"model_type": "gemma3", "torch_dtype": "float16", "text_config": GEMMA_LIKE, "vision_config": {}}
    found = shape(tmp_path, nested)
    assert found.geometry.layers == 34
    assert found.dtype == "float16"
    assert "text_config" in found.decisions[0].reason


def test_a_window_that_covers_all_positions_is_full_attention(tmp_path):
    types = ["sliding_attention"] * 32
    found = shape(tmp_path, sliding_window=262_144, layer_types=types)
    assert len(found.geometry.profiled_layers) == 32
    assert "covers all 131072 positions" in found.decisions[-1].reason


def test_a_config_that_needs_its_class_is_completed(tmp_path):
    pytest.importorskip("transformers")
    bare = {key: value for key, value in GEMMA_LIKE.items() if key not in ("layer_types", "num_attention_heads")}
    found = shape(tmp_path, bare)
    assert found.geometry == shape(tmp_path, GEMMA_LIKE).geometry
    assert "left out of config.json" in found.decisions[1].reason


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({**LLAMA_8B, "kv_lora_rank": 512}, "multi-head latent attention"),
        ({**LLAMA_8B, "layer_types": ["linear_attention"] * 32}, "no layer keeps a key-value cache"),
        ({**LLAMA_8B, "full_attention_interval": 4}, "says full_attention_interval, which transformers"),
        ({**LLAMA_8B, "layer_types": ["chunked_attention"] * 32}, "attend within chunks"),
        ({**LLAMA_8B, "attention_chunk_size": 8192}, "chunks"),
        ({**LLAMA_8B, "is_encoder_decoder": True}, "encoder-decoder"),
        ({**LLAMA_8B, "layer_types": ["sliding_attention"] * 32, "sliding_window": 64}, "every layer slides"),
        ({**LLAMA_8B, "num_key_value_heads": 7}, "32 query heads do not divide into 7 KV heads"),
        ({**LLAMA_8B, "layer_types": 5}, "not a llama config"),
        ({**LLAMA_8B, "layer_types": "full_attention"}, "not a llama config"),
        ({**LLAMA_8B, "model_type": "unknown", "layer_types": 5}, "layer_types in config.json is not a list"),
        ({**LLAMA_8B, "num_hidden_layers": 10**15}, "num_hidden_layers is larger than any model's"),
        ({**LLAMA_8B, "vocab_size": 10**400}, "vocab_size is larger than any model's"),
        ({"model_type": "nothing-known"}, "states no number of layers"),
        ([], "not a config"),
    ],
)
def test_what_cannot_be_planned_is_refused_by_name(tmp_path, config, named):
    with pytest.raises(InputError, match=named) as caught:
        find_shape(str(write_config(tmp_path / "m", config)))
    assert "\n" not in str(caught.value)


def test_a_budget_file_gives_geometry_sinks_and_window(tmp_path):
    profile = make_profile(4, 4, head_size=64, sink_tokens=16, recent_tokens=64)
    path = tmp_path / store.BUDGET_DIR / store.file_name(profile.model.name)
    store.save(profile, path)
    for reference in (str(path), profile.model.name):
        found = plan(find_shape(reference), GIB_24, 1000, weight_bytes=0)
        assert (found.sink_tokens, found.recent_tokens) == (16, 64)
        assert found.kv_bytes_per_token == 2 * 4 * 4 * 64 * 2
        # 0.5: (8 x 1000 + 8 x 80) x 2 x 64 x 2
        assert found.at[3].kv_bytes_read_per_step_per_gpu == 2_211_840
    assert plan(find_shape(str(path)), GIB_24, 1000).at[0].requests is None


def test_a_budget_file_takes_dtype_and_window_from_a_cached_config(tmp_path, monkeypatch):
    profile = make_profile(34, 4, head_size=256, sliding=[layer for layer in range(34) if layer % 6 != 5])
    path = tmp_path / "budget.json"
    store.save(profile, path)
    assert find_shape(str(path)).window_tokens is None
    config = write_config(tmp_path / "cache", {**GEMMA_LIKE, "torch_dtype": "float16"}) / "config.json"
    monkeypatch.setattr(model_shape, "_cached_config", lambda _: config)
    found = find_shape(str(path))
    assert (found.window_tokens, found.dtype) == (1024, "float16")


def test_a_stored_budget_that_realises_another_retention_is_used():
    base = ModelShape("m", make_geometry(4, 4), None, "float16", None, 0, "none")
    profile = make_profile(4, 4)
    quarter = HeadBudgets(heads=[[1.0] * 4, *[[0.0] * 4] * 3], retention_realised=0.25)
    constrained = replace(base, profile=profile.model_copy(update={"budgets": {"0.5": quarter}}))
    assert plan(base, GIB_24, 1000, retentions=[0.5]).at[1].full_heads == 8
    assert plan(constrained, GIB_24, 1000, retentions=[0.5]).at[1].full_heads == 4
    # fractions: 4 heads are full, 12 keep a third of the context; bytes are those of 8 heads
    thirds = HeadBudgets(heads=[[1.0] * 4, *[[1 / 3] * 4] * 3], retention_realised=0.5)
    fractional = replace(base, profile=profile.model_copy(update={"budgets": {"0.5": thirds}}))
    found = plan(fractional, GIB_24, 1000, retentions=[0.5]).at[1]
    assert (found.full_heads, found.retention_realised) == (4, 0.5)
    assert found.kv_bytes_read_per_step_per_gpu == plan(base, GIB_24, 1000).at[3].kv_bytes_read_per_step_per_gpu


def test_bytes_of_a_token():
    # Qwen2.5-7B: 28 layers, 4 KV heads of 128; 56 KiB in 16 bits
    qwen = ModelShape("m", make_geometry(28, 4, query_groups=7, head_size=128), None, None, None, None, "none")
    assert kv_bytes_per_token(qwen.layers, 2) == 57_344
    assert qwen.geometry.values_per_token == 57_344 // 2


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("24GiB", 24 * 2**30),
        ("80GB", 80_000_000_000),
        ("0.5 TiB", 2**39),
        ("24576 MiB", 24 * 2**30),
        ("H100", 81_559 * 2**20),
        ("h100-80gb", 81_559 * 2**20),
        ("NVIDIA H100 80GB HBM3", 81_559 * 2**20),
        ("NVIDIA A100-SXM4-40GB", 40 * 2**30),
        ("A100-80", 80 * 2**30),
        ("Tesla T4", 15 * 2**30),
        ("NVIDIA GeForce RTX 4090", 24_564 * 2**20),
        ("rtx3090", 24 * 2**30),
        ("MI300X", 206_141_652_992),
    ],
)
def test_gpu_memory_is_read(text, size):
    assert parse_gpu_memory(text).memory_bytes == size


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("A100", "give A100 40GB or A100 80GB"),
        ("V100", "give V100 16GB or V100 32GB"),
        ("H100 40GB", "give H100 80GB"),
        ("24", "unit"),
        ("24G", "unit"),
        ("0GiB", "unit"),
        ("-1GiB", "unit"),
        ("GTX 9999", "known GPU"),
        ("", "unit"),
    ],
)
def test_gpu_memory_that_is_not_clear_is_refused(text, message):
    with pytest.raises(InputError, match=message):
        parse_gpu_memory(text)


def test_every_gpu_of_the_table_can_be_named():
    for name, sizes in GPUS.items():
        for sold, mebibytes in sizes.items():
            found = parse_gpu_memory(f"{name} {sold}GB")
            assert found.memory_bytes == mebibytes * 2**20
            # the driver reports what is sold within the 10 % that GB, GiB and ECC make
            assert 0.93 < found.memory_bytes / (sold * 10**9) < 1.08


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"context_tokens": 0}, "context of 0 tokens"),
        ({"memory_utilization": 0.0}, "outside"),
        ({"memory_utilization": float("nan")}, "outside"),
        ({"retentions": [0.0]}, "outside"),
        ({"retentions": [float("nan")]}, "outside"),
        ({"dtype": "int3"}, "unknown cache dtype 'int3'"),
    ],
)
def test_senseless_plans_are_refused(tmp_path, change, message):
    arguments = {"context_tokens": 1000, **change}
    with pytest.raises(InputError, match=message):
        plan(shape(tmp_path), GIB_24, arguments.pop("context_tokens"), **arguments)


def test_doubts_are_said(tmp_path):
    found = plan(shape(tmp_path), GIB_24, 200_000, dtype="fp8")
    said = {decision.what: decision.reason for decision in found.decisions}
    assert "131072 positions" in said["context"]
    assert "fp8 cache" not in said
    refused = plan(shape(tmp_path), GIB_24, 1000, dtype="nvfp4").decisions
    assert any(each.what == "nvfp4 cache" and "8-, 16- and 32-bit" in each.reason for each in refused)
    assert plan(shape(tmp_path, torch_dtype="float8_e4m3fn"), GIB_24, 100).dtype == "bfloat16"
