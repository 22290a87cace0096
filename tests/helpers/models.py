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


def random_model(family: str, seed: int = 0, **changes):
    """A float32 causal LM with eager attention."""
    import torch
    import transformers

    name, own = FAMILIES[family]
    config = getattr(transformers, name)(**{**_SHAPE, **own, **changes})
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if any(part in parameter_name for part in ("q_proj", "k_proj", "qkv_proj")) and parameter.dim() > 1:
                parameter.mul_(6.0)
            if parameter_name.endswith("sinks"):
                parameter.normal_(0.0, 1.0)
    return model


def save_checkpoint(model, folder: Path, tokenizer) -> Path:
    """Write model and tokenizer as a real checkpoint folder."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
