"""Profiling on a GPU, in one command: `python benchmarks/gpu_profile.py --output docs/measurements/NAME.json`.

Parity first: token scores of a checkpoint on the device, float32 and bfloat16, against float32 on the CPU. Then cost:
models of real shapes with random weights, made on the device, because speed does not depend on the weights; seconds
for reading and for scoring, exact and with sparse rows, memory over weights and cache, and the fraction of the
machine's matrix rate. `--device cpu --shape tiny --context 600` tries it without a GPU.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from kvprofile.budget.profile import FULL_ATTENTION, Geometry
from kvprofile.checkpoint import Placement, describe, load_model, load_tokenizer, locate
from kvprofile.corpus.sources import load_corpus
from kvprofile.files import json_bytes, write_atomically
from kvprofile.scoring.attention import recording
from kvprofile.scoring.prompts import Frame, FramedDocument, chat_frame, chunks, encode, frame_document
from kvprofile.scoring.reconstruction import Scorer
from kvprofile.scoring.work import DecoderShape, Repeat, count, matrix_rate

SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2.5-14b": ("Qwen2Config", {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 48,
                                    "num_attention_heads": 40, "num_key_value_heads": 8, "vocab_size": 152064}),
    "llama-3.1-8b": ("LlamaConfig", {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
                                     "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256}),
    "tiny": ("LlamaConfig", {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2,
                             "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 512}),
}  # fmt: skip
"""Sizes of published checkpoints, from their config.json, and one to try this with."""

FRAME = Frame("", "", tuple(range(1, 16)), tuple(range(16, 21)), tuple(range(21, 29)), tuple(range(29, 43)))
PARITY_CONTEXT, PARITY_CHUNK = 960, 240


def synchronize(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


def parity(checkpoint: str, device: str, dtype: str) -> dict[str, Any]:
    """Worst difference and rank correlation of a checkpoint's token scores on the device against the CPU."""
    from scipy.stats import spearmanr

    description = describe(locate(checkpoint))
    tokenizer = load_tokenizer(description.source)
    frame = chat_frame(tokenizer)
    text = "\n\n".join(found.text for found in load_corpus("prose").texts)
    document = frame_document("prose", encode(tokenizer, text)[:PARITY_CONTEXT], frame)
    scores = []
    for place in (Placement("cpu", "float32", False, ()), Placement(device, dtype, False, ())):
        model = load_model(description, place)
        with recording(model, description.geometry) as recorder:
            scorer = Scorer(model, recorder, frame, document_tokens=2 * PARITY_CONTEXT, chunk_tokens=PARITY_CHUNK)
            scores.append(torch.cat([found.token_scores for found in scorer.score(document)], -1))
    pairs = {"max": [each.amax(-1) for each in scores], "token": scores}
    return {
        "checkpoint": description.source.name,
        "dtype": dtype,
        "worst_difference": (scores[0] - scores[1]).abs().max().item(),
        **{f"rank_{name}": float(spearmanr(a.flatten(), b.flatten()).statistic) for name, (a, b) in pairs.items()},
    }


def random_model(shape: str, device: str, dtype: str, positions: int) -> tuple[Any, Geometry]:
    """A model of a shape with random weights, made where it will run."""
    import transformers

    name, sizes = SHAPES[shape]
    config = getattr(transformers, name)(**sizes, max_position_embeddings=positions)
    torch.manual_seed(0)
    with torch.device(device):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype)).eval()
    geometry = Geometry(
        layers=config.num_hidden_layers,
        attention_heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_size=config.hidden_size // config.num_attention_heads,
        layer_types=[FULL_ATTENTION] * config.num_hidden_layers,
    )
    return model.requires_grad_(False), geometry


def cost(model: Any, geometry: Geometry, context: int, asked: argparse.Namespace, rate: float) -> list[dict[str, Any]]:
    """Seconds and memory of one context, exact and with sparse rows."""
    ids = torch.randint(64, model.config.vocab_size, (context,), generator=torch.Generator().manual_seed(0)).tolist()
    document = FramedDocument("random", FRAME.prefix_ids, tuple(ids))
    length = len(FRAME.prefix_ids) + context
    on_gpu = asked.device.startswith("cuda")
    rows = []
    for sparse_rows in (False, True):
        split = read = 0.0

        def advance(tokens: int) -> None:
            nonlocal read, split
            read += tokens
            if read == length:
                synchronize(asked.device)
                split = time.perf_counter()

        with recording(model, geometry, sparse_rows=sparse_rows) as recorder:
            scorer = Scorer(
                model, recorder, FRAME, document_tokens=length, chunk_tokens=asked.chunk_tokens, advance=advance
            )
            for _ in scorer.score(FramedDocument("warm-up", FRAME.prefix_ids, tuple(ids[:256]))):
                pass
            read = 0.0
            if on_gpu:
                torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated() if on_gpu else 0  # weights, and the cache of the warm-up
            synchronize(asked.device)
            started = time.perf_counter()
            for _ in scorer.score(document):
                pass
            synchronize(asked.device)
            ended = time.perf_counter()
            extra = torch.cuda.max_memory_allocated() - before if on_gpu else None
            cache = scorer.cache.nbytes()
        repeats = [
            Repeat.of(document, part, sparse_rows=sparse_rows) for part in chunks(document, FRAME, asked.chunk_tokens)
        ]
        shape = DecoderShape.of(model.config, geometry)
        work = count(shape, len(FRAME.prefix_ids), context, repeats)
        rows.append(
            {
                "context_tokens": context,
                "rows": "sparse" if sparse_rows else "exact",
                "prefill_s": split - started,
                "scoring_s": ended - split,
                "tokens_per_second": context / (ended - started),
                "prefill_tflop": 2e-12 * work.prefill,
                "scoring_tflop": 2e-12 * work.scoring,
                "fraction_of_rate": (work.prefill + work.scoring) / rate / (ended - started),
                "cache_bytes": cache,
                "extra_bytes": extra,
            }
        )
        del scorer
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description="Profiling on a GPU: parity and cost.")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", default="bfloat16", help="of the models of random weights")
    parser.add_argument("--shape", action="append", choices=SHAPES, help="both published ones unless given")
    parser.add_argument("--context", type=int, action="append", help="88,000 and 124,000 unless given")
    parser.add_argument("--chunk-tokens", type=int, default=2000)
    parser.add_argument("--checkpoint", default="models/pocket", help="of the parity check")
    parser.add_argument("--output", type=Path, help="write the document to this file")
    asked = parser.parse_args()
    contexts = asked.context or [88_000, 124_000]
    rate = matrix_rate(asked.device, asked.dtype, size=8192 if asked.device.startswith("cuda") else 512)
    document: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if asked.device.startswith("cuda") else "cpu",
        "torch": torch.__version__,
        "dtype": asked.dtype,
        "chunk_tokens": asked.chunk_tokens,
        "tflop_per_second": 2e-12 * rate,
        "parity": [parity(asked.checkpoint, asked.device, dtype) for dtype in ("float32", "bfloat16")],
        "cost": {},
    }
    table = Table("shape", "tokens", "rows", "read, s", "score, s", "of the rate", "cache GiB", "extra MiB")
    for shape in asked.shape or ["qwen2.5-14b", "llama-3.1-8b"]:
        model, geometry = random_model(shape, asked.device, asked.dtype, 2 * max(contexts) + 4 * asked.chunk_tokens)
        document["cost"][shape] = [row for context in contexts for row in cost(model, geometry, context, asked, rate)]
        for row in document["cost"][shape]:
            extra = row["extra_bytes"]
            table.add_row(
                shape,
                f"{row['context_tokens']:,}",
                row["rows"],
                f"{row['prefill_s']:.2f}",
                f"{row['scoring_s']:.2f}",
                f"{row['fraction_of_rate']:.0%}",
                f"{row['cache_bytes'] / 2**30:.2f}",
                "unknown" if extra is None else f"{extra / 2**20:.0f}",
            )
        del model
        if asked.device.startswith("cuda"):
            torch.cuda.empty_cache()
        if asked.output:  # what is measured stays, whatever happens next
            write_atomically(asked.output, json_bytes(document))
    Console().print(table)
    print(json.dumps(document["parity"]))


if __name__ == "__main__":
    main()
