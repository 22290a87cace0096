"""Small random checkpoints of many architectures, sharp enough that their attention is not uniform."""

from __future__ import annotations

from pathlib import Path

# torch and transformers are imported where a model is made: most tests want no more from here than a path.

ROOT = Path(__file__).resolve().parents[2]
POCKET = ROOT / "models" / "pocket"

_SHAPE = {
    "vocab_size": 1024,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 3,
}

FAMILIES = {
    "llama": ("LlamaConfig", {}),
    "qwen2": ("Qwen2Config", {}),
    "qwen3": ("Qwen3Config", {"head_dim": 32}),
    "mistral": ("MistralConfig", {"sliding_window": None}),
    "mistral_wide": ("MistralConfig", {"sliding_window": 4096}),
    "phi3": ("Phi3Config", {"sliding_window": None}),
    "gemma2": (
        "Gemma2Config",
        {"head_dim": 32, "query_pre_attn_scalar": 32, "num_hidden_layers": 4, "sliding_window": 24},
    ),
    "gemma3": ("Gemma3TextConfig", {"head_dim": 32, "num_hidden_layers": 7, "sliding_window": 24}),
    "qwen3_moe": (
        "Qwen3MoeConfig",
        {"head_dim": 32, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
    ),
    "afmoe": (
        "AfmoeConfig",
        {
            "head_dim": 32,
            "num_hidden_layers": 4,
            "sliding_window": 24,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
        },
    ),
    "gpt_oss": (
        "GptOssConfig",
        {
            "head_dim": 32,
            "num_hidden_layers": 4,
            "sliding_window": 24,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
        },
    ),
}

_L, _F = "linear_attention", "full_attention"
_DELTA = {
    "head_dim": 32,
    "layer_types": [_L, _F, _L, _L, _F, _L],
    "num_hidden_layers": 6,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
}
_EXPERTS = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
}
_MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 16, "mamba_chunk_size": 16}
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}

HYBRIDS = {
    "qwen3_next": ("Qwen3NextConfig", {**_DELTA, **_EXPERTS}),
    "qwen3_5": ("Qwen3_5TextConfig", _DELTA),
    "qwen3_5_moe": ("Qwen3_5MoeTextConfig", {**_DELTA, **_EXPERTS}),
    "olmo_hybrid": ("OlmoHybridConfig", _DELTA),
    "lfm2": ("Lfm2Config", {"layer_types": ["conv", _F, "conv", "conv", _F, "conv"], "num_hidden_layers": 6}),
    "lfm2_moe": (
        "Lfm2MoeConfig",
        {
            **_EXPERTS,
            "layer_types": ["conv", _F, "conv", "conv", _F, "conv"],
            "num_hidden_layers": 6,
            "num_dense_layers": 1,
            "rope_parameters": _ROPE,
        },
    ),
    "bamba": ("BambaConfig", {**_MAMBA, "attn_layer_indices": [1, 4], "num_hidden_layers": 6}),
    "granitemoehybrid": (
        "GraniteMoeHybridConfig",
        {
            **_MAMBA,
            "layer_types": [_L, _F, _L, _L, _F, _L],
            "num_hidden_layers": 6,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "shared_intermediate_size": 48,
            "attention_multiplier": 0.25,
        },
    ),
    "nemotron_h": (
        "NemotronHConfig",
        {
            "layers_block_type": ["mamba", "mlp", "attention", "mamba", "moe", "attention", "mamba", "mlp"],
            "num_hidden_layers": 8,
            "head_dim": 16,
            "mamba_num_heads": 8,
            "mamba_head_dim": 16,
            "ssm_state_size": 16,
            "n_groups": 2,
            "chunk_size": 16,
            "n_routed_experts": 4,
            "moe_intermediate_size": 32,
            "moe_shared_expert_intermediate_size": 32,
        },
    ),
    "falcon_h1": ("FalconH1Config", {**_MAMBA, "mamba_d_ssm": 128}),
    "zaya": (
        "ZayaConfig",
        {
            "head_dim": 32,
            "num_experts": 4,
            "num_experts_per_tok": 1,
            "moe_intermediate_size": 32,
            "router_hidden_size": 16,
        },
    ),
}
"""Models of which some layers keep a state: in place of a cache or, in the last two, next to one.

A layer with a state follows the last one with attention, so that passes that end early leave a layer unread.
"""

SHARPENED = ("q_proj", "k_proj", "qkv_proj", "in_proj")
"""Projections whose random weights are too small for attention, or a state, to make a difference."""


def random_model(family: str, seed: int = 0, **changes):
    """A float32 causal LM with eager attention."""
    import torch
    import transformers

    name, own = {**FAMILIES, **HYBRIDS}[family]
    config = getattr(transformers, name)(**{**_SHAPE, **own, **changes})
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if any(part in parameter_name for part in SHARPENED) and parameter.dim() > 1:
                parameter.mul_(6.0)
            if parameter_name.endswith("sinks"):
                parameter.normal_(0.0, 1.0)
            if parameter_name.endswith("A_log"):  # a state remembers some ten tokens; at random, one or two
                parameter.fill_(-3.0)
            if parameter_name.endswith("qk_norm.temp"):  # Zaya begins with keys of zero
                parameter.fill_(2.0)
    return model


def save_checkpoint(model, folder: Path, tokenizer) -> Path:
    """Write model and tokenizer as a real checkpoint folder."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
