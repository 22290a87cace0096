#!/usr/bin/env bash
# Expected: a model class whose attention goes through the attention interface, passes keyword arguments down to it and
# can slice logits says so: _supports_attention_backend is True, as in Llama, and so is is_backend_compatible().
# Seen with transformers 5.19.0 on 2026-11-27: both are False for Qwen3-Next, Qwen3.5, Bamba, Nemotron-H, OLMo-Hybrid.
# A function registered with AttentionInterface is nevertheless called in each attention layer, with the arguments.
# It matters because the flag looks like the way to ask whether attention can be watched or gated per head; whoever
# believes it refuses models that work. (The library says the flag also stands for other duties, such as a tensor
# parallel plan; Qwen3-Next and OLMo-Hybrid have one.)
# Seen: flag False, function called in layers [1, 3] of 4, argument seen, 0.000 off, for all five; Llama: True, all.
set -euo pipefail
export OMP_NUM_THREADS=1 TRANSFORMERS_VERBOSITY=error
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
python="$folder/venv/bin/python"
"$python" -m pip install --quiet --disable-pip-version-check torch==2.13.0 transformers==5.19.0

cat > "$folder/recorded" <<'END'
expected: a flag that is True where the function is called
LlamaForCausalLM: flag True, is_backend_compatible True; called in layers [0, 1, 2, 3] of 4, argument arrived True; logits of two positions off by 0.000
Qwen3NextForCausalLM: flag False, is_backend_compatible False; called in layers [1, 3] of 4, argument arrived True; logits of two positions off by 0.000
Qwen3_5ForCausalLM: flag False, is_backend_compatible False; called in layers [1, 3] of 4, argument arrived True; logits of two positions off by 0.000
BambaForCausalLM: flag False, is_backend_compatible False; called in layers [1, 3] of 4, argument arrived True; logits of two positions off by 0.000
NemotronHForCausalLM: flag False, is_backend_compatible False; called in layers [1, 3] of 4, argument arrived True; logits of two positions off by 0.000
OlmoHybridForCausalLM: flag False, is_backend_compatible False; called in layers [1, 3] of 4, argument arrived True; logits of two positions off by 0.000
END

"$python" - > "$folder/seen" <<'END'
import sys

import torch
import transformers
from transformers import (
    AttentionInterface, AutoModelForCausalLM, BambaConfig, LlamaConfig, NemotronHConfig, OlmoHybridConfig,
    Qwen3NextConfig, Qwen3_5TextConfig,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

print("transformers", transformers.__version__, "torch", torch.__version__, file=sys.stderr)
calls = []


def watched(module, *arguments, **named):
    calls.append((module.layer_idx, named.get("marker")))
    return sdpa_attention_forward(module, *arguments, **named)


AttentionInterface.register("watched", watched)
AttentionMaskInterface.register("watched", sdpa_mask)

same = {
    "vocab_size": 256, "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}
four = {"num_hidden_layers": 4}
kinds = {"layer_types": ["linear_attention", "full_attention"] * 2}
linear = {
    "linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 16, "linear_value_head_dim": 16,
}
experts = {
    "num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32,
}
configs = [
    LlamaConfig(**same, **four),
    Qwen3NextConfig(**same, **four, **kinds, **linear, **experts, head_dim=16),
    Qwen3_5TextConfig(**same, **four, **kinds, **linear, head_dim=16),
    BambaConfig(
        **same, **four, attn_layer_indices=[1, 3], mamba_n_heads=4, mamba_d_head=32, mamba_d_state=16, mamba_n_groups=1,
        mamba_chunk_size=16,
    ),
    NemotronHConfig(
        **same, layers_block_type=["mamba", "attention"] * 2, head_dim=16, mamba_num_heads=4, mamba_head_dim=32,
        ssm_state_size=16, n_groups=1, chunk_size=16,
    ),
    OlmoHybridConfig(**same, **four, **kinds, **linear),
]

print("expected: a flag that is True where the function is called")
for config in configs:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()
    ids = torch.arange(3, 27)[None]
    with torch.no_grad():
        wanted = model(ids).logits[:, [3, 5]]
        model.set_attn_implementation("watched")
        calls.clear()
        got = model(ids, marker=7, logits_to_keep=torch.tensor([3, 5])).logits
    print(
        f"{type(model).__name__}: flag {model._supports_attention_backend}, is_backend_compatible "
        f"{model.is_backend_compatible()}; called in layers {[layer for layer, _ in calls]} of 4, argument arrived "
        f"{all(marker == 7 for _, marker in calls)}; logits of two positions off by {(got - wanted).abs().max():.3f}"
    )
END
cat "$folder/seen"
if diff "$folder/recorded" "$folder/seen"; then
  echo "as recorded"
else
  echo "the behaviour changed" >&2
  exit 1
fi
