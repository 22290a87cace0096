#!/usr/bin/env bash
# Expected: a forward pass that is given a cache of 12 tokens, and no position_ids, takes its tokens for the 13th and
# on, as Llama, Granite 4 hybrid, Falcon-H1 and the other hybrid models of this library do.
# Seen with transformers 5.19.0 on 2026-11-27: Bamba counts from 0 again. Its keys then carry the rotary positions of
# other tokens; nothing is said, and generate() is right, because it passes position_ids itself.
# It matters because whoever scores or trims a cache calls the model with pieces and a cache, and the wrong keys stay.
# Seen, 24 tokens in two pieces against at once: Llama, Granite 4 hybrid, Falcon-H1 0.00; Bamba 0.18 of logits up to
# 3.02 (token by token 0.47), and 0.00 where position_ids are passed.
set -euo pipefail
export OMP_NUM_THREADS=1 TRANSFORMERS_VERBOSITY=error
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
python="$folder/venv/bin/python"
"$python" -m pip install --quiet --disable-pip-version-check torch==2.13.0 transformers==5.19.0

cat > "$folder/recorded" <<'END'
24 tokens read in pieces with a cache against at once, largest difference of logits; expected: 0.00 everywhere
llama: logits to 2.90; two pieces 0.00; token by token 0.00; with position_ids 0.00 and 0.00
granitemoehybrid: logits to 3.31; two pieces 0.00; token by token 0.00; with position_ids 0.00 and 0.00
falcon_h1: logits to 2.75; two pieces 0.00; token by token 0.00; with position_ids 0.00 and 0.00
bamba: logits to 3.02; two pieces 0.18; token by token 0.47; with position_ids 0.00 and 0.00
END

"$python" - > "$folder/seen" <<'END'
import sys

import torch
import transformers
from transformers import (
    AutoModelForCausalLM, BambaConfig, DynamicCache, FalconH1Config, GraniteMoeHybridConfig, LlamaConfig,
)

print("transformers", transformers.__version__, "torch", torch.__version__, file=sys.stderr)
same = {
    "vocab_size": 256, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}
mamba = {
    "mamba_n_heads": 4, "mamba_d_head": 32, "mamba_d_state": 16, "mamba_n_groups": 1, "mamba_expand": 2,
    "mamba_chunk_size": 16,
}
configs = [
    LlamaConfig(**same),
    GraniteMoeHybridConfig(
        **same, **mamba, layer_types=["mamba", "attention"] * 2, position_embedding_type="rope", num_local_experts=0,
        shared_intermediate_size=128,
    ),
    FalconH1Config(**same, **mamba, mamba_d_ssm=128, head_dim=16),
    BambaConfig(**same, **mamba, attn_layer_indices=[1, 3]),
]


def off(model, ids, whole, size, with_positions=False):
    """How far logits are from those of the whole, reading pieces of that size with a cache."""
    cache, logits = DynamicCache(config=model.config), []
    for start in range(0, ids.shape[1], size):
        piece = ids[:, start : start + size]
        assert cache.get_seq_length() == start
        more = {"position_ids": torch.arange(start, start + size)[None]} if with_positions else {}
        logits.append(model(piece, past_key_values=cache, use_cache=True, **more).logits)
    return f"{(torch.cat(logits, dim=1) - whole).abs().max():.2f}"


print("24 tokens read in pieces with a cache against at once, largest difference of logits; expected: 0.00 everywhere")
for config in configs:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for weights in model.parameters():
            if weights.dim() > 1:
                weights.mul_(5)  # so that layers say more than rounding does
        ids = torch.randint(5, 250, (1, 24))
        whole = model(ids).logits
        print(
            f"{config.model_type}: logits to {whole.abs().max():.2f}; two pieces {off(model, ids, whole, 12)}; "
            f"token by token {off(model, ids, whole, 1)}; "
            f"with position_ids {off(model, ids, whole, 12, True)} and {off(model, ids, whole, 1, True)}"
        )
END
cat "$folder/seen"
if diff "$folder/recorded" "$folder/seen"; then
  echo "as recorded"
else
  echo "the behaviour changed" >&2
  exit 1
fi
