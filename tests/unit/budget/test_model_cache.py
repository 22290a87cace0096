"""What a config says of its cache: kinds of layers, heads, windows and cache dtypes, and what is refused.

Numbers are those of the published config.json of the model that is named next to them.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kvprofile.budget.capacity import Capacity, kv_bytes_per_token, parse_gpu_memory, plan
from kvprofile.budget.config_file import read_config
from kvprofile.budget.model_cache import cache_of
from kvprofile.budget.model_shape import shape_of_config
from kvprofile.budget.profile import FULL_ATTENTION, NO_CACHE, SLIDING_ATTENTION
from kvprofile.checkpoint import describe, locate
from kvprofile.cli import run
from kvprofile.errors import InputError
from tests.helpers.models import random_model, save_checkpoint

FULL, SLIDING = "full_attention", "sliding_attention"

STEP_3_5 = {  # stepfun-ai/Step-3.5-Flash
    "model_type": "step3p5", "hidden_size": 4096, "intermediate_size": 11264, "num_hidden_layers": 45,
    "num_attention_heads": 64, "num_attention_groups": 8, "head_dim": 128, "sliding_window": 512,
    "layer_types": [FULL if layer % 4 == 0 else SLIDING for layer in range(45)],
    "attention_other_setting": {
        "attention_type": SLIDING, "num_attention_heads": 96, "num_attention_groups": 8, "head_dim": 128
    },
    "moe_num_experts": 288, "max_position_embeddings": 262144, "vocab_size": 128896, "torch_dtype": "bfloat16",
}  # fmt: skip
STEP_3 = {  # stepfun-ai/step3
    "model_type": "step3_vl", "torch_dtype": "bfloat16",
    "text_config": {
        "model_type": "step3_text", "hidden_size": 7168, "num_attention_heads": 64, "num_attention_groups": 1,
        "num_hidden_layers": 61, "head_dim": 256, "share_q_dim": 2048, "max_position_embedding": 65536,
        "max_seq_len": 65536,
    },
}  # fmt: skip
RING = {  # inclusionAI/Ring-mini-linear-2.0
    "model_type": "bailing_moe_linear", "hidden_size": 2048, "num_hidden_layers": 20, "num_attention_heads": 16,
    "num_key_value_heads": 4, "head_dim": 128, "layer_group_size": 5, "num_experts": 256,
    "max_position_embeddings": 131072, "torch_dtype": "bfloat16",
}  # fmt: skip
LLAMA_VISION = {  # meta-llama/Llama-3.2-11B-Vision-Instruct
    "model_type": "mllama", "torch_dtype": "bfloat16", "vision_config": {"model_type": "mllama_vision_model"},
    "text_config": {
        "model_type": "mllama_text_model", "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336,
        "num_hidden_layers": 40, "num_attention_heads": 32, "num_key_value_heads": 8,
        "cross_attention_layers": [3, 8, 13, 18, 23, 28, 33, 38], "max_position_embeddings": 131072,
    },
}  # fmt: skip
GEMMA_4 = {  # google/gemma-4-31b-it, its text part
    "model_type": "gemma4_text", "num_hidden_layers": 60, "hidden_size": 5376, "intermediate_size": 21504,
    "num_attention_heads": 32, "num_key_value_heads": 16, "head_dim": 256, "sliding_window": 1024,
    "layer_types": [FULL if layer % 6 == 5 else SLIDING for layer in range(60)], "max_position_embeddings": 262144,
    "vocab_size": 262144, "vocab_size_per_layer_input": 262144, "hidden_size_per_layer_input": 0,
    "attention_k_eq_v": True, "num_kv_shared_layers": 0, "dtype": "bfloat16", "tie_word_embeddings": True,
}  # fmt: skip
GEMMA_4_HUB = {**GEMMA_4, "global_head_dim": 512, "num_global_key_value_heads": 4}
GEMMA_4_RESAVED = {
    **GEMMA_4,
    "per_layer_config": {f"{layer:02d}": {"head_dim": 512, "num_key_value_heads": 4} for layer in range(5, 60, 6)},
}
MINIMAX_M2 = {  # MiniMaxAI/MiniMax-M2.7
    "model_type": "minimax_m2", "num_hidden_layers": 62, "hidden_size": 3072, "num_attention_heads": 48,
    "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 200064, "attn_type_list": [1] * 62,
    "num_local_experts": 256, "max_position_embeddings": 204800, "dtype": "bfloat16",
}  # fmt: skip
MIMO = {  # XiaomiMiMo/MiMo-V2-Flash
    "model_type": "mimo_v2_flash", "num_hidden_layers": 48, "hidden_size": 4096, "num_attention_heads": 64,
    "num_key_value_heads": 4, "head_dim": 192, "v_head_dim": 128, "sliding_window": 128, "attention_chunk_size": 128,
    "swa_num_attention_heads": 64, "swa_num_key_value_heads": 8, "swa_head_dim": 192, "swa_v_head_dim": 128,
    "hybrid_layer_pattern": [0 if layer == 0 or layer % 6 == 5 else 1 for layer in range(48)],
    "n_routed_experts": 256, "max_position_embeddings": 262144, "torch_dtype": "bfloat16",
}  # fmt: skip
QWEN_OMNI = {  # Qwen/Qwen2.5-Omni-7B
    "model_type": "qwen2_5_omni", "torch_dtype": "bfloat16", "talker_config": {"num_hidden_layers": 24},
    "thinker_config": {
        "model_type": "qwen2_5_omni_thinker",
        "text_config": {
            "model_type": "qwen2_5_omni_text", "hidden_size": 3584, "intermediate_size": 18944,
            "num_attention_heads": 28, "num_hidden_layers": 28, "num_key_value_heads": 4, "vocab_size": 152064,
            "max_position_embeddings": 32768,
        },
    },
}  # fmt: skip
NEMOTRON_H = {  # nvidia/NVIDIA-Nemotron-3, its largest: 12 of 108 layers are attention
    "model_type": "nemotron_h", "hidden_size": 8192, "num_attention_heads": 64, "num_key_value_heads": 2,
    "head_dim": 128, "layers_block_type": [*["mamba", "moe"] * 8, "attention", "mlp"] * 6,
    "time_step_limit": [0.0, 1e308], "vocab_size": 131072, "max_position_embeddings": 262144,
}  # fmt: skip
QWEN3 = {  # Qwen/Qwen3-32B
    "model_type": "qwen3", "head_dim": 128, "hidden_size": 5120, "intermediate_size": 25600,
    "max_position_embeddings": 40960, "num_attention_heads": 64, "num_hidden_layers": 64, "num_key_value_heads": 8,
    "sliding_window": None, "use_sliding_window": False, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
    "vocab_size": 151936,
}  # fmt: skip
MAKESHIFT = {  # of a type that transformers does not know
    "model_type": "made_up", "hidden_size": 512, "num_attention_heads": 8, "num_key_value_heads": 2,
    "num_hidden_layers": 6, "torch_dtype": "bfloat16",
}  # fmt: skip


@pytest.fixture
def config(tmp_path: Path):
    """Write a config.json; gives its path."""

    def write(document: dict, folder: str = "m") -> Path:
        (tmp_path / folder).mkdir(exist_ok=True)
        file = tmp_path / folder / "config.json"
        file.write_text(json.dumps(document), encoding="utf-8")
        return file

    return write


def planned(file: Path, **more: object) -> Capacity:
    return plan(shape_of_config(file, "m"), parse_gpu_memory("H200"), 9000, **more)


@pytest.mark.parametrize(
    ("document", "token_bytes", "layers", "heads"),
    [
        pytest.param(STEP_3_5, 45 * 8 * 128 * 2 * 2, 45, (64, 8, 128), id="num_attention_groups"),
        pytest.param(STEP_3, 61 * 1 * 256 * 2 * 2, 61, (64, 1, 256), id="multi-matrix factorised attention"),
        pytest.param(RING, 4 * 4 * 128 * 2 * 2, 4, (16, 4, 128), id="layer_group_size"),
        pytest.param(LLAMA_VISION, 32 * 8 * 128 * 2 * 2, 32, (32, 8, 128), id="cross-attention"),
        pytest.param(GEMMA_4_HUB, (10 * 4 * 512 + 50 * 16 * 256) * 2 * 2, 60, (32, 4, 512), id="Gemma 4"),
        pytest.param(GEMMA_4_RESAVED, (10 * 4 * 512 + 50 * 16 * 256) * 2 * 2, 60, (32, 4, 512), id="Gemma 4 resaved"),
        pytest.param(MINIMAX_M2, 62 * 8 * 128 * 2 * 2, 62, (48, 8, 128), id="attn_type_list without a linear layer"),
        pytest.param(MIMO, (9 * 4 + 39 * 8) * (192 + 128) * 2, 48, (64, 4, 192), id="shorter values, sliding heads"),
        pytest.param(QWEN_OMNI, 28 * 4 * 128 * 2 * 2, 28, (28, 4, 128), id="a text config within another"),
        pytest.param(NEMOTRON_H, 6 * 2 * 128 * 2 * 2, 6, (64, 2, 128), id="layers_block_type"),
    ],
)
def test_bytes_of_a_token_are_those_of_the_layers_that_have_a_cache(config, document, token_bytes, layers, heads):
    found = planned(config(document), dtype="bf16")
    geometry = found.geometry
    assert found.kv_bytes_per_token == token_bytes
    assert len(geometry.cached_layers) == layers
    assert (geometry.attention_heads, geometry.kv_heads, geometry.head_size) == heads
    without = [decision.value for decision in found.decisions if decision.what == "layers without a cache"]
    assert without == ([f"{geometry.layers - layers} of {geometry.layers}"] if layers < geometry.layers else [])


def test_layers_of_gemma_4_hold_what_their_own_heads_hold(config):
    found = planned(config(GEMMA_4_HUB), retentions=[0.5])
    full, half = found.at
    # ten full layers of 4 heads x 512 hold 9,000 tokens, fifty of 16 x 256 their window of 1,024; keys and values
    assert full.kv_bytes_read_per_step_per_gpu == (10 * 4 * 512 * 9000 + 50 * 16 * 256 * 1024) * 4
    assert full.full_heads == 40
    # 30.7 billion parameters: full layers take their keys as values
    assert found.weight_bytes == 2 * 30_696_013_824
    assert full.requests == 47
    assert half.kv_bytes_read_per_step_per_gpu == (10 * 4 * 512 * (4500 + 192) + 50 * 16 * 256 * 1024) * 4
    two = planned(config(GEMMA_4_HUB), tensor_parallel_size=4)
    assert two.kv_bytes_per_token_per_gpu == found.kv_bytes_per_token // 4
    with pytest.raises(InputError, match="layers have 4 and 16 KV heads, and tensor-parallel size 8 would replicate"):
        planned(config(GEMMA_4_HUB), tensor_parallel_size=8)


HYBRIDS = {
    "full_attention_interval": ({"full_attention_interval": 3}, [2, 5]),
    "layer_group_size with a rest": ({"layer_group_size": 4}, [3, 4, 5]),
    "attn_type_list": ({"attn_type_list": [0, 1, 0, 0, 1, 0]}, [1, 4]),
    "attn_layer_period": ({"attn_layer_period": 4, "attn_layer_offset": 1}, [1, 5]),
    "attn_layer_indices": ({"attn_layer_indices": [2]}, [2]),
    "hybrid_override_pattern": ({"hybrid_override_pattern": "M-*EM*"}, [2, 5]),
    "layers_block_type": ({"layers_block_type": ["mamba", "attention", "moe"] * 2}, [1, 4]),
    "layer_types": ({"layer_types": ["conv", FULL, "linear_attention"] * 2}, [1, 4]),
    "linear_attn_config": ({"linear_attn_config": {"full_attn_layers": [3, 6], "kda_layers": [1, 2, 4, 5]}}, [2, 5]),
    "block_configs": (
        {
            "block_configs": [{"attention": {"no_op": layer % 2 == 1, "n_heads_in_group": 4}} for layer in range(6)],
            "num_key_value_heads": None,
        },
        [0, 2, 4],
    ),
}


@pytest.mark.parametrize(("keys", "full"), HYBRIDS.values(), ids=HYBRIDS)
def test_hybrids_of_unknown_types_are_counted_as_their_config_lists_them(config, keys, full):
    geometry = cache_of(read_config(config({**MAKESHIFT, **keys})), "m", "planned").geometry
    assert geometry.profiled_layers == tuple(full)
    assert geometry.layer_types == [FULL_ATTENTION if layer in full else NO_CACHE for layer in range(6)]
    assert geometry.kv_heads == 2
    assert f"{6 - len(full)} without a cache" in geometry.describe()


@pytest.mark.parametrize(
    ("keys", "kv_heads"),
    [
        ({"num_key_value_heads": 4}, 4),
        ({"num_key_value_heads": None, "multi_query_group_num": 2, "multi_query_attention": True}, 2),
        ({"num_key_value_heads": None, "n_head_kv": 2}, 2),
        ({"num_key_value_heads": None, "num_kv_heads": 1}, 1),
        ({"num_key_value_heads": None, "num_attention_groups": 4}, 4),
        ({"num_key_value_heads": None, "multi_query": True}, 1),
        ({"num_key_value_heads": None, "multi_query": True, "new_decoder_architecture": True, "n_head_kv": 4}, 4),
        ({"num_key_value_heads": None, "attn_config": {"kv_n_heads": 2}}, 2),
    ],
)
def test_kv_heads_are_found_under_every_name_that_vllm_reads(config, keys, kv_heads):
    geometry = cache_of(read_config(config({**MAKESHIFT, **keys})), "m", "planned").geometry
    assert (geometry.kv_heads, geometry.head_size) == (kv_heads, 64)


def test_a_class_without_kv_heads_has_multi_head_attention(config):
    gpt2 = {"model_type": "gpt2", "n_layer": 12, "n_head": 12, "n_embd": 768, "n_positions": 1024}
    found = cache_of(read_config(config(gpt2)), "m", "planned")
    assert found.geometry.describe() == "12 layers x 12 KV heads (12 query heads, head size 64)"
    assert found.max_positions == 1024


def test_falcon_has_one_kv_head_whatever_its_config_counts(config):
    """tiiuae/falcon-7b states num_kv_heads 71 and multi_query; tiiuae/falcon-40b the newer architecture."""
    small = {
        "model_type": "falcon", "hidden_size": 4544, "num_attention_heads": 71, "num_hidden_layers": 32,
        "num_kv_heads": 71, "multi_query": True, "new_decoder_architecture": False,
    }  # fmt: skip
    large = {**small, "hidden_size": 8192, "num_attention_heads": 128, "num_kv_heads": 8, "num_hidden_layers": 60}
    large["new_decoder_architecture"] = True
    counts = [cache_of(read_config(config(each)), "m", "planned").geometry.kv_heads for each in (small, large)]
    assert counts == [1, 8]


@pytest.mark.parametrize(
    ("document", "reason"),
    [
        ({**MAKESHIFT, "num_key_value_heads": None}, "states no number of KV heads"),
        ({**MAKESHIFT, "mamba_d_state": 16}, r"keep a state instead of a cache \(mamba_d_state\)"),
        ({**MAKESHIFT, "num_kv_shared_layers": 2}, r"layers share their caches \(num_kv_shared_layers\)"),
        ({**MAKESHIFT, "use_cla": True}, r"layers share their caches \(use_cla\)"),
        ({**MAKESHIFT, "sliding_window": 128}, "not which layers slide"),
        ({**MAKESHIFT, "index_topk": 2048}, r"sparse or compressed \(index_topk\)"),
        ({**MAKESHIFT, "num_key_value_heads": [2, 2, 2, 4, 4, 4]}, "differ in their heads"),
        ({**MAKESHIFT, "layer_types": ["telepathy"] * 6}, "layers of type telepathy"),
        ({**MAKESHIFT, "kv_lora_rank": 512}, "multi-head latent attention"),
        ({**MAKESHIFT, "attn_type_list": [0] * 6}, "no layer keeps a key-value cache"),
        ({**QWEN3, "num_attention_groups": 4}, "says num_attention_groups 4, which transformers' class does not read"),
        # deepseek-ai/DeepSeek-V4-Flash
        (
            {
                "model_type": "deepseek_v4", "num_hidden_layers": 43, "num_attention_heads": 64, "head_dim": 512,
                "num_key_value_heads": 1, "sliding_window": 128, "compress_ratios": [0, 0, *[4, 128] * 21, 0],
            },
            "keep a compressed context",
        ),
        ({"model_type": "deepseek_v32"}, "multi-head latent attention"),
        ({"model_type": "llama4_text"}, "attend within chunks"),
        ({"model_type": "qwen4_exp_text"}, "sparse attention"),
        ({"model_type": "mamba2"}, "no layer keeps a key-value cache"),
        ({"model_type": "bert"}, "it is an encoder"),
        ({"model_type": "t5"}, "it is an encoder-decoder"),
        ({"model_type": "recurrent_gemma"}, "every layer slides over a window of 2048 tokens"),
    ],
)  # fmt: skip
def test_unknown_is_refused_in_one_true_line(config, document, reason):
    with pytest.raises(InputError, match=reason) as caught:
        planned(config(document))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "keys",
    [
        {"mamba_d_state": 0},
        {"use_cla": False, "cla_share_factor": None},
        {"num_kv_shared_layers": 0},
        {"kv_lora_rank": None},
        {"attention_chunk_size": None},
        {"sliding_window": None},
        {"sliding_window": 4096, "use_sliding_window": False},
        {"index_topk": None, "compress_ratios": []},
    ],
)
def test_a_keys_value_counts_and_not_its_presence(config, keys):
    geometry = cache_of(read_config(config({**MAKESHIFT, **keys})), "m", "planned").geometry
    assert geometry.layer_types == [FULL_ATTENTION] * 6


def test_shared_caches_are_counted_once(config):
    """google/gemma-3n-E4B-it: the last 15 of 35 layers read the caches of earlier ones."""
    found = planned(config({"model_type": "gemma3n_text", "num_kv_shared_layers": 15}), dtype="bf16")
    assert found.kv_bytes_per_token == 20 * 2 * 256 * 2 * 2
    assert found.geometry.layer_types[20:] == [NO_CACHE] * 15
    assert found.geometry.layer_types.count(SLIDING_ATTENTION) == 16


def test_step_3_5_lists_layers_that_it_predicts_further_tokens_with(config):
    listed = {**MAKESHIFT, "layer_types": [FULL] * 9}
    assert cache_of(read_config(config(listed)), "m", "planned").geometry.layers == 6


SCHEMES = {
    "modelopt": (
        {"quant_method": "modelopt", "kv_cache_scheme": {"dynamic": False, "num_bits": 8, "type": "float"}},
        1,
    ),
    "modelopt, nvfp4": ({"quant_method": "modelopt", "kv_cache_scheme": {"num_bits": 4, "type": "float"}}, 0.5625),
    "modelopt, unknown": ({"quant_method": "modelopt", "kv_cache_scheme": {"num_bits": 8, "type": "int"}}, 2),
    "modelopt, by name": ({"quant_method": "modelopt", "quantization": {"kv_cache_quant_algo": "FP8"}}, 1),
    "modelopt, none": ({"quant_method": "modelopt", "quantization": {"kv_cache_quant_algo": None}}, 2),
    "compressed-tensors": (
        {"quant_method": "compressed-tensors", "kv_cache_scheme": {"num_bits": 8, "type": "float"}},
        1,
    ),
    "compressed-tensors, none": ({"quant_method": "compressed-tensors", "kv_cache_scheme": None}, 2),
    "another method": ({"quant_method": "awq", "kv_cache_scheme": {"num_bits": 8, "type": "float"}}, 2),
}


@pytest.mark.parametrize(("scheme", "value_bytes"), SCHEMES.values(), ids=SCHEMES)
def test_a_cache_dtype_that_the_checkpoint_asks_for_is_counted(config, scheme, value_bytes):
    file = config({**QWEN3, "quantization_config": scheme})
    found = plan(shape_of_config(file, "m"), parse_gpu_memory("H100"), 9000, weight_bytes=20 * 2**30)
    assert found.kv_bytes_per_token == 64 * 8 * 128 * 2 * value_bytes
    assert planned(file, dtype="bf16").kv_bytes_per_token == 64 * 8 * 128 * 2 * 2
    if value_bytes == 1:
        # (0.9 x 81,559 MiB - 20 GiB) / (131,072 x 9,000) = 47.04; in bfloat16 it would be 23
        assert (found.dtype, found.at[0].requests) == ("fp8", 47)


def test_a_quantisation_stated_next_to_the_config_counts_as_in_it(config):
    file = config(QWEN3)
    assert shape_of_config(file, "m").weight_bytes is not None
    beside = {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "FP8", "kv_cache_quant_algo": "FP8"}}
    (file.parent / "hf_quant_config.json").write_text(json.dumps(beside))
    found = shape_of_config(file, "m")
    assert (found.cache_dtype, found.weight_bytes) == ("fp8", None)


def test_weights_tied_by_the_class_are_counted_once(config):
    """CohereForAI/c4ai-command-r-v01 and google/gemma-7b-it do not state tie_word_embeddings."""
    command_r = {
        "model_type": "cohere", "hidden_size": 8192, "intermediate_size": 22528, "num_attention_heads": 64,
        "num_hidden_layers": 40, "num_key_value_heads": 64, "vocab_size": 256000, "torch_dtype": "float16",
        "max_position_embeddings": 8192, "model_max_length": 131072,
    }  # fmt: skip
    gemma = {
        "model_type": "gemma", "head_dim": 256, "hidden_size": 3072, "intermediate_size": 24576,
        "num_attention_heads": 16, "num_hidden_layers": 28, "num_key_value_heads": 16, "vocab_size": 256000,
    }  # fmt: skip
    for document, parameters in ((command_r, 34_980_495_360), (gemma, 8_537_505_792)):
        assert shape_of_config(config(document), "m").weight_bytes == 2 * parameters
        untied = shape_of_config(config({**document, "tie_word_embeddings": False}), "m").weight_bytes
        assert untied == 2 * (parameters + document["vocab_size"] * document["hidden_size"])
    assert shape_of_config(config(command_r), "m").max_positions == 131072


def longrope(window: int) -> dict:
    """microsoft/Phi-3-mini-128k-instruct's positions; its window is 262,144."""
    factors = {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
    return {
        "max_position_embeddings": 131072,
        "original_max_position_embeddings": 4096,
        "rope_scaling": {"type": "longrope", **factors},
        "sliding_window": window,
    }


def test_plan_and_score_read_one_geometry_of_a_longrope_model(tmp_path, tokenizer):
    """Its keys stay valid for 4,096 positions, which a window of 8,192 covers: no layer slides for anybody."""
    folder = save_checkpoint(random_model("phi3", **longrope(8192)), tmp_path / "phi3", tokenizer)
    scored = describe(locate(str(folder)))
    shape = shape_of_config(folder / "config.json", "phi3")
    assert scored.geometry == shape.geometry
    assert shape.geometry.layer_types == [FULL_ATTENTION] * 3
    assert scored.max_positions == 4096
    assert shape.max_positions == 131072
    assert "longrope RoPE changes its factors beyond 4096 positions" in shape.decisions[-1].reason


@pytest.mark.parametrize("document", [QWEN_OMNI, {**MAKESHIFT, "num_key_value_heads": None}])
def test_a_plan_says_nothing_of_a_librarys(config, document, capfd):
    code = run(["plan", str(config(document).parent), "--gpu-memory", "H200", "--context", "1000"])
    said = capfd.readouterr().err
    assert (code, said.count("\n")) in ((0, 0), (2, 1))


@pytest.mark.parametrize(
    ("document", "reason"),
    [
        (GEMMA_4_HUB, "its layers differ in their heads"),
        (MIMO, "its layers differ in their heads"),
    ],
)
def test_score_refuses_other_layers_by_name_and_large_numbers_are_no_reason(config, document, reason):
    """vocab_size_per_layer_input and time_step_limit are no counts of layers."""
    with pytest.raises(InputError, match=f"cannot be profiled: .*{reason}"):
        describe(locate(str(config(document).parent)))


def test_layers_that_keep_a_state_are_no_reason_to_refuse(config):
    """All that is missing is what is not there: the weights."""
    with pytest.raises(InputError, match=r"has no \*\.safetensors"):
        describe(locate(str(config(NEMOTRON_H).parent)))


def test_a_theta_for_each_layer_is_no_count_of_layers(config):
    granite = {  # ibm-granite, with sliding windows
        "model_type": "granite_swa", "hidden_size": 2560, "intermediate_size": 8192, "num_attention_heads": 20,
        "num_hidden_layers": 24, "num_key_value_heads": 4, "sliding_window": 128, "vocab_size": 100352,
        "layer_rope_theta": [10000.0] * 24, "layer_types": [FULL, SLIDING, SLIDING, SLIDING] * 6,
        "max_position_embeddings": 8192,
    }  # fmt: skip
    file = config(granite)
    assert planned(file, dtype="bf16").kv_bytes_per_token == 24 * 4 * 128 * 2 * 2
    with pytest.raises(InputError, match=r"has no \*\.safetensors"):  # nothing but weights is amiss
        describe(locate(str(file.parent)))


def test_bytes_are_those_of_all_layers(config):
    layers = cache_of(read_config(config(MAKESHIFT)), "m", "planned").layers
    assert kv_bytes_per_token(layers, 2) == 6 * 2 * 64 * 2 * 2


def test_a_flat_file_of_a_nested_class_is_read_as_it_is(config):
    """stepfun-ai/Step-3.7-Flash: transformers' class of the type would answer with the defaults of its text part."""
    flat = {**STEP_3_5, "model_type": "step3p7", "num_key_value_heads": 4, "max_position_embeddings": 65536}
    found = cache_of(read_config(config(flat)), "m", "planned")
    assert (found.geometry.kv_heads, found.window_tokens, found.max_positions) == (4, 512, 65536)
