"""Memory that scoring takes over weights and cache, from 2k to 16k context tokens: `make bench-profile`.

Each context length runs in a process of its own, so that peaks do not mix. The model is random and has the head
layout of a small Llama: memory does not depend on the weights. Beside the measured peak stands the cache by formula;
what is left over must not grow with the context.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.table import Table

CONTEXTS = (2048, 4096, 8192, 16384)
CHUNK_TOKENS = 1024
MIB = 2**20


def measure(context_tokens: int) -> dict[str, float]:
    """Score one random document; sizes in bytes."""
    import psutil
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from kvprofile.checkpoint.describe import describe
    from kvprofile.checkpoint.source import Source
    from kvprofile.scoring.attention import recording
    from kvprofile.scoring.prompts import Frame, frame_document
    from kvprofile.scoring.reconstruction import Scorer

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1024,
        hidden_size=512,
        intermediate_size=1024,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=32768,
    )
    model = LlamaForCausalLM(config).eval()
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        geometry = describe(Source("random", Path(folder), None)).geometry
    frame = Frame("", "", (1,), (2,), (3, 4), (3, 4, 5))

    def score(tokens: int) -> int:
        document = frame_document("random", torch.randint(5, 1024, (tokens,)).tolist(), frame)
        with recording(model, geometry) as recorder:
            scorer = Scorer(model, recorder, frame, document_tokens=tokens + 1, chunk_tokens=CHUNK_TOKENS)
            for _ in scorer.score(document):
                pass
            allocations = {layer.allocations for layer in scorer.cache.layers}
            if allocations != {1}:
                raise RuntimeError(f"layers were allocated {allocations} times")
            return scorer.cache.nbytes()

    score(64)  # load kernels and thread pools
    before = psutil.Process().memory_info().rss
    cache_bytes = score(context_tokens)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"context_tokens": context_tokens, "cache_bytes": cache_bytes, "extra_bytes": peak - before - cache_bytes}


def main() -> None:
    parser = argparse.ArgumentParser(description="Extra memory of scoring against context length.")
    parser.add_argument("--context", type=int, help="measure one length and print JSON")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    if arguments.context:
        print(json.dumps(measure(arguments.context)))
        return
    rows = []
    for context in CONTEXTS:
        command = [sys.executable, __file__, "--context", str(context)]
        rows.append(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
    if arguments.json:
        print(json.dumps({"chunk_tokens": CHUNK_TOKENS, "rows": rows}, indent=2))
        return
    table = Table("context tokens", "cache MiB", "extra MiB over weights and cache", "of the first row")
    for row in rows:
        ratio = row["extra_bytes"] / rows[0]["extra_bytes"]
        sizes = (f"{row[key] / MIB:.0f}" for key in ("cache_bytes", "extra_bytes"))
        table.add_row(f"{row['context_tokens']:,}", *sizes, f"{ratio:.2f}")
    Console().print(table)


if __name__ == "__main__":
    main()
