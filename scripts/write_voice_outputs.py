"""Real outputs for the voice verifier's test: `python scripts/write_voice_outputs.py`, tests/data/voice_outputs.json.

models/pocket can only repeat, so it repeats the voice samples of the bundled documents, sampled hot enough to slip.
Each seed is a run of its own.
"""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from kvprofile.bench.documents import load
from kvprofile.evaluate.tasks import REPEAT
from kvprofile.files import json_bytes, write_atomically
from kvprofile.scoring.prompts import chat_frame, encode

ROOT = Path(__file__).resolve().parents[1]
POCKET = ROOT / "models" / "pocket"
OUTPUT = ROOT / "tests" / "data" / "voice_outputs.json"
TEMPERATURE, SEEDS, SPARE_TOKENS = 1.2, 5, 8


def main() -> None:
    tokenizer = AutoTokenizer.from_pretrained(POCKET)
    model = AutoModelForCausalLM.from_pretrained(POCKET, dtype=torch.float32).eval()
    frame = chat_frame(tokenizer)
    samples = [(document.name, text) for document in load(("bundled",)) for text in document.voice_samples]
    rows, lengths = [], []
    for _, text in samples:
        ids = encode(tokenizer, text)
        lengths.append(len(ids))
        rows.append([*frame.prefix_ids, *ids, *encode(tokenizer, f"\n\n{REPEAT}"), *frame.suffix_ids])
    width = max(map(len, rows))
    pad = [width - len(row) for row in rows]
    ids = torch.tensor([[0] * blank + row for blank, row in zip(pad, rows, strict=True)] * SEEDS)
    mask = torch.tensor([[0] * blank + [1] * (width - blank) for blank in pad] * SEEDS)
    torch.manual_seed(0)
    options = {"max_new_tokens": max(lengths) + SPARE_TOKENS, "do_sample": True, "temperature": TEMPERATURE}
    with torch.no_grad():
        written = model.generate(ids, attention_mask=mask, **options)[:, width:]
    found: dict[str, list[list[str]]] = {}
    for number, (name, _) in enumerate(samples):
        runs = found.setdefault(name, [[] for _ in range(SEEDS)])
        for seed in range(SEEDS):
            ids_of = written[seed * len(samples) + number][: lengths[number] + SPARE_TOKENS]
            runs[seed].append(tokenizer.decode(ids_of, skip_special_tokens=True))
    content = {"model": "models/pocket", "temperature": TEMPERATURE, "outputs": found}
    write_atomically(OUTPUT, json_bytes(content))


if __name__ == "__main__":
    main()
