"""The counts of docs/production.md: profiling a model of 70 billion parameters on 64 GPUs, by our own functions.

`python -m tests.helpers.fleet_on_paper` prints them.
"""

from __future__ import annotations

import json
from dataclasses import dataclass

from kvprofile.budget import fleet
from kvprofile.budget.capacity import parse_gpu_memory, plan
from kvprofile.budget.model_shape import shape_of_config
from kvprofile.budget.probe import sums_bytes
from kvprofile.scoring.work import DecoderShape, Repeat, count

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
"""Llama 3.1 70B."""

DOCUMENTS, CONTEXT, CHUNK, PREFIX, ASKED = 1000, 16_000, 2000, 30, 30
"""Tokens: of a context, of a chunk, before the context, and of the words that ask for a repeat."""

SERVERS, RANKS = 8, 8
PEAK = 989e12 / 2
"""Multiply-adds a second of an H100 in 16 bits, by its data sheet."""

SHARE = 0.4
"""Of the peak that is assumed: what prefills of large models reach."""

WORKER_BYTES_A_SECOND = 10**9
"""Assumed speed at which a server reads the checkpoint from shared storage."""


@dataclass(frozen=True)
class Paper:
    """Of the whole run unless said otherwise."""

    tokens_read: int
    petaflop: float
    hours: float
    hours_one_server: float
    weights_gb: float
    load_minutes: float
    exchanged_gb_per_second: float
    shard_mb: float
    score_mb: float


def profiling(folder) -> Paper:
    """``folder`` gets the config."""
    (folder / "config.json").write_text(json.dumps(CONFIG))
    shape = shape_of_config(folder / "config.json", "70B")
    geometry = shape.geometry
    decoder = DecoderShape(
        geometry, CONFIG["hidden_size"], 3 * CONFIG["hidden_size"] * CONFIG["intermediate_size"], None
    )
    repeats = [Repeat(CHUNK + ASKED, CHUNK, CONTEXT - CHUNK)] * (CONTEXT // CHUNK)
    work = count(decoder, PREFIX, CONTEXT, repeats)
    total = DOCUMENTS * (work.prefill + work.scoring)
    tokens = DOCUMENTS * (PREFIX + CONTEXT + sum(repeat.rows for repeat in repeats))
    seconds = total / (SERVERS * RANKS * PEAK * SHARE)
    counted = fleet.fleet(plan(shape, parse_gpu_memory("H100"), CONTEXT, tensor_parallel_size=RANKS), SERVERS)
    return Paper(
        tokens_read=tokens,
        petaflop=2 * total / 1e15,
        hours=seconds / 3600,
        hours_one_server=seconds * SERVERS / 3600,
        weights_gb=shape.weight_bytes / 1e9,
        load_minutes=shape.weight_bytes / WORKER_BYTES_A_SECOND / 60,
        exchanged_gb_per_second=tokens / SERVERS / seconds * counted.exchanged_bytes_per_token_per_gpu / 1e9,
        shard_mb=sums_bytes(geometry) / 1e6,
        score_mb=len(geometry.profiled_layers) * geometry.kv_heads * CONTEXT * 4 / 1e6,
    )


if __name__ == "__main__":
    import tempfile
    from pathlib import Path

    with tempfile.TemporaryDirectory() as folder:
        print(profiling(Path(folder)))
