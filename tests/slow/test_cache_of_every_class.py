"""What is read from a config against the cache that a model of every class of transformers really keeps.

A tiny random model of each causal language model class reads a few tokens; the keys and values that its cache then
holds, by layer, are compared with the layers, heads and sizes read from the config.json it saves. Falcon's newer
architecture is left out: transformers repeats its KV heads before it caches them, and vLLM, which is planned for, does
not. Classes with states are said to continue a text from them where they do, and nowhere else.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from kvprofile.budget.config_file import read_config
from kvprofile.budget.model_cache import ModelCache, cache_of
from kvprofile.budget.profile import NO_CACHE
from kvprofile.checkpoint.states import states_of, why_not_followed
from kvprofile.errors import InputError

pytestmark = pytest.mark.slow

MOST_PARAMETERS = 30_000_000
POSITIONS = 512

SIZES = {
    "hidden_size": 64, "intermediate_size": 96, "vocab_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2,
    "num_hidden_layers": 8, "head_dim": 24, "max_position_embeddings": POSITIONS, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2, "moe_intermediate_size": 32, "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4,
    "num_experts_per_tok": 2, "shared_expert_intermediate_size": 32, "n_group": 1, "topk_group": 1,
    "num_shared_experts": 1, "n_shared_experts": 1, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    "linear_key_head_dim": 16, "linear_value_head_dim": 16, "mamba_n_heads": 4, "mamba_d_head": 32,
    "mamba_num_heads": 4, "mamba_head_dim": 32, "ssm_state_size": 8, "n_groups": 2, "word_embed_proj_dim": 64,
    "ffn_dim": 96, "v_head_dim": 16, "vocab_size_per_layer_input": 128, "hidden_size_per_layer_input": 16,
}  # fmt: skip
LATENT = {
    "num_key_value_heads": 4, "kv_lora_rank": 16, "q_lora_rank": 16, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8,
}  # fmt: skip
"""Sizes that a class is given where it has such a name; those of latent attention for classes that have a rank."""

ROPE = {"rope_type": "default", "rope_theta": 10000.0}
MROPE = {**ROPE, "mrope_section": [4, 2, 2]}
HYBRID_TYPES = ["linear_attention", "linear_attention", "linear_attention", "full_attention"] * 2

OWN: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [3]},
    "codegen": {"rotary_dim": 8},
    "cohere_compass_text": {"rope_parameters": dict.fromkeys(("full_attention", "sliding_attention"), MROPE)},
    "dots1": {"sliding_window": None},
    "falcon": {"head_dim": None},
    "falcon_h1": {"mamba_d_ssm": 128},
    "gemma3n_text": {"num_hidden_layers": 10, "num_kv_shared_layers": 5, "activation_sparsity_pattern": None},
    "gpt_neo": {"attention_types": [[["global", "local"], 4]], "num_layers": 8},
    "gptj": {"rotary_dim": 8},
    "gpt_bigcode": {"num_attention_heads": None, "n_head": 4},
    "granitemoehybrid": {"layer_types": HYBRID_TYPES},
    "helium": {"head_dim": 16},
    "jamba": {"attn_layer_period": 4, "attn_layer_offset": 2},
    "lfm2_moe": {"layer_types": ["conv", "conv", "full_attention", "conv"] * 2},
    "lfm2": {"layer_types": ["conv", "conv", "full_attention", "conv"] * 2},
    "minimax_m3_vl_text": {"layer_types": ["full_attention", "minimax_m3_sparse"] * 4},
    "ministral": {"sliding_window": None},
    "mamba2": {"num_heads": 4, "head_dim": 32},
    "nemotron_h": {"layers_block_type": ["mamba", "moe", "attention", "mlp"] * 2, "num_hidden_layers": None},
    "prophetnet": {"num_hidden_layers": None},
    "xlstm": {"v_head_dim": None},
    "zamba": {"num_hidden_layers": 18, "head_dim": None, "attn_layer_period": 6, "attn_layer_offset": 4},
    "zamba2": {"layers_block_type": ["mamba", "mamba", "hybrid", "mamba"] * 2, "head_dim": None},
    "zaya": {"num_experts_per_tok": 1},
}
"""What single classes need to be built; null takes a size away."""

REFUSED = {
    "it is an encoder": (
        "bert", "bert-generation", "camembert", "data2vec-text", "electra", "ernie", "megatron-bert", "reformer",
        "rembert", "roberta", "roberta-prelayernorm", "roc_bert", "roformer", "xlm", "xlm-roberta", "xlm-roberta-xl",
        "xlnet", "xmod", "big_bird",
    ),
    "it is an encoder-decoder": (
        "bart", "bigbird_pegasus", "blenderbot", "blenderbot-small", "marian", "mbart", "mvp", "pegasus", "plbart",
        "prophetnet", "whisper",
    ),
    "multi-head latent attention": (
        "axk1", "axk2", "deepseek_v2", "deepseek_v3", "deepseek_v32", "glm4_moe_lite", "glm_moe_dsa", "hy_v4",
        "kimi_linear", "longcat_flash", "minicpm3", "youtu",
    ),
    "no layer keeps a key-value cache": ("falcon_mamba", "mamba", "mamba2"),
    "transformers keeps no key-value cache": ("openai-gpt", "rwkv", "xlstm"),
    "keep a compressed context": ("deepseek_v4",),
    "attend within chunks": ("llama4_text",),
    "sparse attention": ("minimax_m3_vl_text", "qwen4_exp_text"),
    "every layer slides": ("recurrent_gemma",),
}  # fmt: skip
"""Classes whose cache is not one of heads that can be budgeted, by the reason that is given."""

REASONS = {kind: reason for reason, kinds in REFUSED.items() for kind in kinds}


VARIANTS: list[tuple[str, dict[str, Any]]] = [
    ("falcon", {"multi_query": False}),
    ("gpt_bigcode", {"multi_query": False}),
    ("gemma4_text", {"attention_k_eq_v": True, "num_global_key_value_heads": 1, "global_head_dim": 32}),
    ("gemma4_text", {"num_kv_shared_layers": 2}),
    ("jamba", {"attn_layer_period": 3, "attn_layer_offset": 0}),
    ("qwen3", {"use_sliding_window": True, "max_window_layers": 3}),
    ("mimo_v2_flash", {"swa_num_key_value_heads": 4}),
]
"""Further forms of classes whose cache depends on more than sizes."""


def classes() -> list[Any]:
    """The classes with a config of their own: those of several senses are there by their text configs."""
    found = {config.model_type: (config, model) for config, model in MODEL_FOR_CAUSAL_LM_MAPPING.items()}
    text = transformers.models.mllama.configuration_mllama.MllamaTextConfig
    found["mllama_text_model"] = (text, transformers.MllamaForCausalLM)
    plain = [pytest.param(*pair, {}, id=name) for name, pair in found.items() if not pair[0].sub_configs]
    return plain + [pytest.param(*found[name], more, id=f"{name}-{'-'.join(more)}") for name, more in VARIANTS]


def tiny_config(config_class: Any, more: dict[str, Any]) -> Any:
    """A config of a few thousand parameters, or the class's own error where it cannot be."""
    kind, aliases = config_class.model_type, config_class.attribute_map
    wanted = dict(SIZES)
    if hasattr(config_class, "kv_lora_rank"):
        wanted = {key: value for key, value in wanted.items() if key != "head_dim"} | LATENT
    if hasattr(config_class, "layer_types"):
        wanted["sliding_window"] = 8
    wanted |= OWN.get(kind, {})
    known = {key: value for key, value in wanted.items() if hasattr(config_class, key) or key in aliases}
    own = {key: value for key, value in OWN.get(kind, {}).items() if value is not None}
    return config_class(**{key: value for key, value in known.items() if value is not None} | own | more)


def really_kept(model: Any, layers: int) -> list[tuple[int, int, int] | None]:
    """(KV heads, size of a key, size of a value) that each layer keeps of six tokens; None where it keeps none."""
    with torch.no_grad():
        past = model(input_ids=torch.arange(3, 9)[None], use_cache=True).past_key_values
    found: list[tuple[int, int, int] | None] = []
    for layer in past.layers:
        keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
        kept = keys is not None and keys.numel() > 0
        found.append((keys.shape[1], keys.shape[-1], values.shape[-1]) if kept else None)
    return found + [None] * (layers - len(found))


def counted(cache: ModelCache) -> list[tuple[int, int, int] | None]:
    return [
        None if layer.kind == NO_CACHE else (layer.kv_heads, layer.key_size, layer.value_size) for layer in cache.layers
    ]


@pytest.mark.parametrize(("config_class", "model_class", "more"), classes())
def test_plan_counts_the_cache_that_the_class_keeps(config_class, model_class, more, tmp_path: Path):
    kind = config_class.model_type
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            config = tiny_config(config_class, more)
            if kind not in REASONS:
                with torch.device("meta"):
                    size = sum(parameter.numel() for parameter in model_class(config).parameters())
                assert size < MOST_PARAMETERS
                torch.manual_seed(0)
                model = model_class(config).float().eval()
        except Exception as error:
            if kind in REASONS:
                config = config_class()
            else:
                pytest.skip(f"cannot be built here: {type(error).__name__}: {error}")
    config.save_pretrained(tmp_path)
    if kind in REASONS:
        with pytest.raises(InputError, match=REASONS[kind]):
            cache_of(read_config(tmp_path / "config.json"), kind, "planned")
        return
    cache = cache_of(read_config(tmp_path / "config.json"), kind, "planned")
    assert counted(cache) == really_kept(model, len(cache.layers))


def continues(model: Any) -> bool:
    """Whether a text read in two pieces leads to the logits of the text read at once."""
    ids = torch.arange(3, 99)[None]
    cache = transformers.DynamicCache(config=model.config)
    with torch.no_grad():
        whole = model(ids, use_cache=False).logits[:, 50:]
        model(ids[:, :50], past_key_values=cache, use_cache=True)
        places = torch.arange(50, 96)[None]
        pieces = model(ids[:, 50:], position_ids=places, past_key_values=cache, use_cache=True).logits
    return torch.allclose(whole, pieces, atol=1e-5 * float(whole.abs().max()), rtol=0)


@pytest.mark.parametrize(("config_class", "model_class", "more"), classes())
def test_states_are_followed_where_the_class_continues_from_them(config_class, model_class, more):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            config = tiny_config(config_class, more)
            states = states_of(config)
        except Exception as error:
            pytest.skip(f"cannot be built here: {type(error).__name__}: {error}")
        if not any(states) or config_class.model_type in REASONS:
            pytest.skip("keeps no state, or is refused before")
        torch.manual_seed(0)
        model = model_class(config).float().eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith("A_log"):
                    parameter.fill_(-3.0)  # a state that remembers
                elif parameter.dim() > 1:
                    parameter.mul_(10.0 if "mamba" in name else 4.0)
        why = why_not_followed(model_class, config)
    if why is not None and "cache of its own" in why:
        return
    assert continues(model) == (why is None), why
