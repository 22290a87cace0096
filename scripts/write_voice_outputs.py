"""Real outputs for the voice verifier's test: `python scripts/write_voice_outputs.py`, tests/data/voice_outputs.json.

models/pocket can only repeat, so it repeats the voice samples of the bundled documents, sampled, so that it slips.
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
TEMPERATURE, SEEDS, MOST_TOKENS = 0.8, 5, 130


def main() -> None:
    tokenizer = AutoTokenizer.from_pretrained(POCKET)
    model = AutoModelForCausalLM.from_pretrained(POCKET, dtype=torch.float32).eval()
    frame = chat_frame(tokenizer)
    samples = [(document.name, text) for document in load(("bundled",)) for text in document.voice_samples]
    rows = []
    for _, text in samples:
        ids = encode(tokenizer, text)
        rows.append([*frame.prefix_ids, *ids, *encode(tokenizer, f"\n\n{REPEAT}"), *frame.suffix_ids])
    width = max(map(len, rows))
    pad = [width - len(row) for row in rows]
    ids = torch.tensor([[0] * blank + row for blank, row in zip(pad, rows, strict=True)] * SEEDS)
    mask = torch.tensor([[0] * blank + [1] * (width - blank) for blank in pad] * SEEDS)
    torch.manual_seed(0)
    options = {"max_new_tokens": MOST_TOKENS, "do_sample": True, "temperature": TEMPERATURE}
    with torch.no_grad():
        written = model.generate(ids, attention_mask=mask, **options)[:, width:]
    found: dict[str, list[list[str]]] = {}
    for number, (name, _) in enumerate(samples):
        runs = found.setdefault(name, [[] for _ in range(SEEDS)])
        for seed in range(SEEDS):
            row = written[seed * len(samples) + number]
            runs[seed].append(tokenizer.decode(row, skip_special_tokens=True))
    content = {"model": "models/pocket", "temperature": TEMPERATURE, "outputs": found}
    write_atomically(OUTPUT, json_bytes(content))


if __name__ == "__main__":
    main()
