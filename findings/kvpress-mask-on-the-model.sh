#!/usr/bin/env bash
# Expected: a cache that was compressed, or was not, stays what it is while the model reads something else.
# Seen with kvpress 0.5.5 (transformers 5.2.0) on 2026-11-28: presses that choose per head (AdaKVPress here; KVzipPress,
# CriticalAdaKVPress and DuoAttentionPress set the same attribute) do not shorten a cache. They note on the model which
# keys are gone, `masked_key_indices` of each attention layer, and the next request writes fake keys in those places of
# whatever cache it brings. So an uncompressed cache of another text loses half of its keys, for good, and one that was
# compressed before is asked with the other text's mask. No error, no warning. Presses that shorten caches do not do it.
# It matters wherever more than one context is alive: documents kept ready for questions, or a comparison of methods.
# Seen: 200 of 400 keys of the other cache are overwritten in each layer, and its answers change.
set -euo pipefail
export OMP_NUM_THREADS=1
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
python="$folder/venv/bin/python"
"$python" -m pip install --quiet --disable-pip-version-check torch==2.13.0 transformers==5.2.0 kvpress==0.5.5

cat > "$folder/recorded" <<'END'
after KnormPress read another text: 0 of 400 keys of a layer overwritten, logits as before
after AdaKVPress read another text: 200 of 400 keys of a layer overwritten, logits differ
two texts with AdaKVPress: the first is answered as if it was read alone: False, the second: True
END

"$python" - > "$folder/seen" 2> "$folder/errors" <<'END' || { cat "$folder/errors" >&2; exit 1; }
import copy

import torch
from kvpress import AdaKVPress, KnormPress
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=500, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=16,
)
model = LlamaForCausalLM(config).eval()
TOKENS = 200
text, another, question = (torch.randint(500, (1, count)) for count in (TOKENS, TOKENS, 8))


def read(ids, press=None):
    """The cache of a text, compressed by a press."""
    cache = DynamicCache()
    with torch.no_grad():
        if press is None:
            model(ids, past_key_values=cache)
        else:
            with press(model):
                model(ids, past_key_values=cache)
    return cache


def ask(cache):
    """Logits of the question after the text of a cache, whose positions end at TOKENS."""
    positions = torch.arange(TOKENS, TOKENS + question.shape[1])[None]
    with torch.no_grad():
        return model(question, past_key_values=cache, position_ids=positions).logits


presses = {"KnormPress": KnormPress(0.5), "AdaKVPress": AdaKVPress(KnormPress(0.5))}
kept = read(text)
expected = ask(copy.deepcopy(kept))
for name, press in presses.items():
    cache = copy.deepcopy(kept)
    read(another, press)
    logits = ask(cache)
    changed = {int((a.keys[:, :, :TOKENS] != b.keys).any(-1).sum()) for a, b in zip(cache.layers, kept.layers)}
    same = "as before" if torch.allclose(logits, expected) else "differ"
    (count,) = changed
    print(f"after {name} read another text: {count} of {2 * TOKENS} keys of a layer overwritten, logits {same}")

alone = [ask(read(ids, presses["AdaKVPress"])) for ids in (text, another)]
caches = [read(ids, presses["AdaKVPress"]) for ids in (text, another)]
first, second = (torch.allclose(ask(cache), found) for cache, found in zip(caches, alone))
print(f"two texts with AdaKVPress: the first is answered as if it was read alone: {first}, the second: {second}")
END
cat "$folder/seen"
if diff "$folder/recorded" "$folder/seen"; then
  echo "as recorded"
else
  echo "the behaviour changed" >&2
  exit 1
fi
