#!/usr/bin/env bash
# Expected: transformers takes the head size of a GGUF file from its key attention.key_length, where the file has one.
# Seen with transformers 5.19.0 and gguf 0.19.0 on 2026-11-27: not for the architectures qwen3 and qwen2. For the
# first every head is 128 wide, whatever the file says; for the second as wide as hidden size / heads. Loading succeeds
# without a word. Then the first forward pass of qwen3 raises, and that of qwen2 runs with other heads and other logits.
# It matters because what a KV cache holds is worked out from the config, and here scored on heads that do not exist.
# Seen: qwen2 of 2 KV heads of 32 runs with 4 of 16, of 128 with 16 of 16; qwen3 of 16 or 32 says 128; llama is right.
# With head_dim set by hand, all of these files run as they should. Full output: below, as recorded.
set -euo pipefail
export OMP_NUM_THREADS=1 TRANSFORMERS_VERBOSITY=error
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
python="$folder/venv/bin/python"
"$python" -m pip install --quiet --disable-pip-version-check torch==2.13.0 transformers==5.19.0 gguf==0.19.0 accelerate==1.15.0

cat > "$folder/recorded" <<'END'
expected: the file's head size everywhere
llama, 2 KV heads of 16: config says 16; runs, 2 KV heads of 16 in the cache, logits off by 0%
llama, 2 KV heads of 32: config says 32; runs, 2 KV heads of 32 in the cache, logits off by 0%
llama, 2 KV heads of 128: config says 128; runs, 2 KV heads of 128 in the cache, logits off by 0%
qwen2, 2 KV heads of 16: config says 16; runs, 2 KV heads of 16 in the cache, logits off by 0%
qwen2, 2 KV heads of 32: config says 16; runs, 4 KV heads of 16 in the cache, logits off by 42%
qwen2, 2 KV heads of 128: config says 16; runs, 16 KV heads of 16 in the cache, logits off by 89%
qwen3, 2 KV heads of 16: config says 128; loads, then RuntimeError
qwen3, 2 KV heads of 32: config says 128; loads, then RuntimeError
qwen3, 2 KV heads of 128: config says 128; runs, 2 KV heads of 128 in the cache, logits off by 0%
END

"$python" - > "$folder/seen" <<'END'
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

import gguf
import numpy as np
import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM

print("transformers", transformers.__version__, "gguf", version("gguf"), "torch", torch.__version__, file=sys.stderr)
hidden, heads, kv_heads, inner, words = 64, 4, 2, 128, 32


def write(path, architecture, head_size):
    """A model of one layer and random weights, with every key that llama.cpp reads."""
    file = gguf.GGUFWriter(path, architecture)
    file.add_block_count(1)
    file.add_context_length(256)
    file.add_embedding_length(hidden)
    file.add_feed_forward_length(inner)
    file.add_head_count(heads)
    file.add_head_count_kv(kv_heads)
    file.add_key_length(head_size)
    file.add_value_length(head_size)
    file.add_rope_dimension_count(head_size)
    file.add_rope_freq_base(10000.0)
    file.add_layer_norm_rms_eps(1e-6)
    file.add_vocab_size(words)
    file.add_tokenizer_model("gpt2")
    file.add_token_list([f"t{number}" for number in range(words)])
    file.add_token_types([1] * words)
    file.add_token_merges(["t 1"])
    file.add_bos_token_id(1)
    file.add_eos_token_id(0)
    shapes = {
        "token_embd": [words, hidden],
        "output": [words, hidden],
        "output_norm": [hidden],
        "blk.0.attn_norm": [hidden],
        "blk.0.attn_q": [heads * head_size, hidden],
        "blk.0.attn_k": [kv_heads * head_size, hidden],
        "blk.0.attn_v": [kv_heads * head_size, hidden],
        "blk.0.attn_output": [hidden, heads * head_size],
        "blk.0.ffn_norm": [hidden],
        "blk.0.ffn_gate": [inner, hidden],
        "blk.0.ffn_up": [inner, hidden],
        "blk.0.ffn_down": [hidden, inner],
    }
    if architecture == "qwen3":
        shapes |= {"blk.0.attn_q_norm": [head_size], "blk.0.attn_k_norm": [head_size]}
    if architecture == "qwen2":
        biases = {f"blk.0.attn_{name}": shapes[f"blk.0.attn_{name}"][:1] for name in "qkv"}
        for name, shape in biases.items():
            file.add_tensor(f"{name}.bias", np.zeros(shape, np.float32))
    random = np.random.default_rng(0)
    for name, shape in shapes.items():
        file.add_tensor(f"{name}.weight", (0.1 * random.standard_normal(shape)).astype(np.float32))
    file.write_header_to_file()
    file.write_kv_data_to_file()
    file.write_tensors_to_file()
    file.close()


def run(folder, **config):
    """What happened, and the logits where there are some."""
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file="model.gguf", **config).eval()
    try:
        with torch.no_grad():
            seen = model(torch.arange(8)[None])
    except RuntimeError:
        return "loads, then RuntimeError", None
    _, cached_heads, _, size = seen.past_key_values.layers[0].keys.shape
    return f"runs, {cached_heads} KV heads of {size} in the cache", seen.logits


print("expected: the file's head size everywhere")
for architecture in ("llama", "qwen2", "qwen3"):
    for head_size in (16, 32, 128):
        with tempfile.TemporaryDirectory() as folder:
            write(Path(folder, "model.gguf"), architecture, head_size)
            config = AutoConfig.from_pretrained(folder, gguf_file="model.gguf")
            says = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
            as_is, logits = run(folder)
            config.head_dim = head_size
            by_hand, right = run(folder, config=config)
            assert by_hand == f"runs, {kv_heads} KV heads of {head_size} in the cache"
            off = "" if logits is None else f", logits off by {(logits - right).abs().max() / right.abs().max():.0%}"
            print(f"{architecture}, {kv_heads} KV heads of {head_size}: config says {says}; {as_is}{off}")
END
cat "$folder/seen"
if diff "$folder/recorded" "$folder/seen"; then
  echo "as recorded"
else
  echo "the behaviour changed" >&2
  exit 1
fi
