"""What shares and probe cost while a model is scored: `python benchmarks/probe_cost.py [MODEL]`, part of bench-profile.

One process scores the same document in turns with and without the sums of the probe's fit, as `score` does: chunks and
sums are written to disk, and the fit is solved at the end. It prints the ratio of each pair of turns. Without MODEL it
is a random Llama with the heads of a small one (8 layers, 8 query and 4 KV heads of 64). Bar: 1.03.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from kvprofile.budget.profile import DEFAULT_RECENT_TOKENS, DEFAULT_SINK_TOKENS
from kvprofile.checkpoint import describe, load_model, locate, place
from kvprofile.scoring.attention import recording
from kvprofile.scoring.chunk_store import ChunkStore
from kvprofile.scoring.prompts import Frame, frame_document
from kvprofile.scoring.reconstruction import Scorer

CHUNK_TOKENS = 2000
MIB = 2**20


def random_model(folder: Path) -> str:
    """A checkpoint of random weights."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1024,
        hidden_size=512,
        intermediate_size=1408,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=32768,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return str(folder)


def measure(checkpoint: str, tokens: int, rounds: int) -> dict[str, Any]:
    """Seconds of every turn, in pairs, and the bytes of the sums."""
    description = describe(locate(checkpoint))
    geometry = description.geometry
    model = load_model(description, place(description, "float32", "cpu", tokens + CHUNK_TOKENS + 64))
    frame = Frame("", "", (1,), (2,), (3, 4), (3, 4, 5))
    ids = torch.randint(5, 1000, (tokens,), generator=torch.Generator().manual_seed(1)).tolist()
    document = frame_document("random", ids, frame)
    with recording(model, geometry) as recorder:
        scorer = Scorer(model, recorder, frame, document_tokens=tokens + 1, chunk_tokens=CHUNK_TOKENS)

        def turn(number: int, graded: bool) -> tuple[float, int]:
            with tempfile.TemporaryDirectory() as folder:
                started = time.perf_counter()
                store = ChunkStore(Path(folder) / "out.json", f"{number} {graded}", geometry)
                with store.opened():
                    for scored in scorer.score(document):
                        start, stop = scored.chunk.start, scored.chunk.stop
                        first, end = max(start, DEFAULT_SINK_TOKENS), min(stop, tokens - DEFAULT_RECENT_TOKENS)
                        middle = slice(first - start, max(first, end) - start)
                        sums = scorer.sums(document, scored, middle) if graded else None
                        store.save(0, scored.chunk.index, scored.token_scores, False, middle, sums)
                    if graded:
                        store.fit.solve()
                    held = store.fit.nbytes
                return time.perf_counter() - started, held

        held = turn(-1, graded=True)[1]  # kernels and thread pools, too
        pairs = []
        for number in range(rounds):
            order = (False, True) if number % 2 else (True, False)
            seconds = {graded: turn(number, graded)[0] for graded in order}
            pairs.append((seconds[False], seconds[True]))
    ratios = [graded / plain for plain, graded in pairs]
    return {
        "model": description.source.name,
        "geometry": geometry.describe(),
        "tokens": tokens,
        "rounds": rounds,
        "plain_s": [plain for plain, _ in pairs],
        "graded_s": [graded for _, graded in pairs],
        "ratio": statistics.median(ratios),
        "ratios": [min(ratios), max(ratios)],
        "sums_bytes": held,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Cost of shares and probe while scoring.")
    parser.add_argument("model", nargs="?", help="a checkpoint's folder; a random model unless given")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = measure(arguments.model or random_model(Path(folder)), arguments.tokens, arguments.rounds)
    if arguments.json:
        print(json.dumps(found, indent=1))
        return
    low, high = found["ratios"]
    print(f"{found['model']}: {found['geometry']}, {found['tokens']:,} tokens, {found['rounds']} pairs of turns")
    print(f"with shares and probe over without: {found['ratio']:.3f} ({low:.3f} to {high:.3f})")
    print(f"sums: {found['sums_bytes'] / MIB:.1f} MiB")


if __name__ == "__main__":
    main()
