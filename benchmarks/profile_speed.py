"""Profiling one context, ours against NVIDIA kvpress' KVzipPress: `make bench-profile`.

Same random model, same context, same chunks, 1k to 16k tokens. Sides take turns, each measurement in a process of its
own, and a short context warms each up. kvpress comes from PyPI into `.peers/`, with this environment's torch. Both
score every token of the context, so agreement is measured on the way. Beside the seconds stands what the count of
products allows (`kvprofile.scoring.work`) at the rate that large products reach here in the same run.

`--smoke` runs it all once at 512 tokens, which says whether it runs and nothing about speed.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts"))

from environments import interpreter

ROOT = Path(__file__).resolve().parents[1]
PEERS = ROOT / ".peers"
KVPRESS = "0.5.5"
KVPRESS_NEEDS = (
    f"kvpress=={KVPRESS}", "transformers==5.2.0", "huggingface_hub==1.33.0", "tokenizers==0.22.2", "peft==0.20.0",
    "fire==0.6.0", "termcolor==2.5.0", "six==1.17.0", "pandas==2.3.3", "pytz==2025.2", "tzdata==2025.2",
    "python-dateutil==2.9.0.post0", "cachetools==5.5.2", "typer-slim==0.21.1",
)  # fmt: skip
"""kvpress and what it needs in other versions than this environment has; everything else, torch too, is shared."""

CONTEXTS, CHUNK_TOKENS = (1024, 2048, 4096, 8192, 16384), 2048
SMOKE_CONTEXT, SMOKE_CHUNK_TOKENS = 512, 200
LONG, REPEATS = 8192, 2
"""Contexts up to LONG are measured REPEATS times, longer ones once."""

SIDES = ("exact", "fast", "kvpress")
LAYERS, WIDTH, INNER, HEADS, KV_HEADS = 8, 512, 1536, 8, 4
WORDS = 2000
PREFIX = "begin of this chat"
"""Four words: kvpress scores against four sinks, and against them alone, so ours gets a prefix of as many."""

TEMPLATE = f"{{{{ '{PREFIX} ' }}}}{{{{ messages[0]['content'] }}}}{{{{ ' end of it' }}}}"
MIB = 2**20


# ---- what both sides read ----


def write_model(folder: Path, positions: int) -> None:
    """A random Llama with attention sharp enough that scores differ, and a tokenizer of whole words."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    from kvprofile.budget.config_file import quiet_transformers

    quiet_transformers()
    named = f"{PREFIX} end of it Repeat the previous context exactly part starting with dummy . , # <unk>".split()
    words = {word: index for index, word in enumerate(dict.fromkeys([*named, *(f"w{i}" for i in range(WORDS))]))}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))  # noqa: S106 - a token of text
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")  # noqa: S106
    fast.chat_template = TEMPLATE
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(words),
        hidden_size=WIDTH,
        intermediate_size=INNER,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        max_position_embeddings=positions,
        bos_token_id=None,
        eos_token_id=None,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "q_proj" in name or "k_proj" in name:
                parameter.mul_(4.0)
    model.save_pretrained(folder)


def context_ids(folder: Path, tokens: int) -> list[int]:
    """Prefix and context as both sides read them."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    rng = random.Random(0)
    text = " ".join([PREFIX, *(f"w{rng.randrange(WORDS)}" for _ in range(tokens))])
    found: list[int] = tokenizer.encode(text, add_special_tokens=False)
    return found


# ---- our side, in a process of its own ----


def measure(asked: argparse.Namespace) -> dict[str, Any]:
    """Score one context exactly or fast, or find the rate of large products."""
    import torch

    from kvprofile.scoring.work import matrix_rate

    if asked.side == "rate":
        return {"multiply_adds_per_second": matrix_rate("cpu", asked.dtype), "threads": torch.get_num_threads()}
    from measuring import Watch
    from safetensors.torch import save_file

    from kvprofile.checkpoint import Placement, Source, describe, load_model, load_tokenizer
    from kvprofile.scoring.attention import recording
    from kvprofile.scoring.effort import EXACT, FAST
    from kvprofile.scoring.prompts import chat_frame, chunks, frame_document
    from kvprofile.scoring.reconstruction import Scorer

    source = Source("random", asked.model, None)
    description = describe(source)
    frame = chat_frame(load_tokenizer(source))
    ids = json.loads(asked.ids.read_text())
    prefix = len(frame.prefix_ids)
    if tuple(ids[:prefix]) != frame.prefix_ids:
        raise RuntimeError("the two sides would read different prefixes")
    document = frame_document("context", ids[prefix:], frame)
    effort = FAST if asked.side == "fast" else EXACT
    model = load_model(description, Placement("cpu", asked.dtype, False, ()))
    watch = Watch()

    def score(tokens: int) -> Any:
        some = frame_document("context", document.context_ids[:tokens], frame)
        count = sum(1 for _ in chunks(some, frame, asked.chunk_tokens))
        read = 0

        def advance(rows: int) -> None:
            nonlocal read
            read += rows
            if read == prefix + tokens:
                watch.part("prefill")

        scorer = Scorer(
            model, recorder, frame, document_tokens=prefix + tokens, chunk_tokens=asked.chunk_tokens, advance=advance
        )
        return [found.token_scores for found in scorer.score(some, wanted=effort.chunks(count, 0, 0))]

    with recording(model, description.geometry, sparse_rows=effort.sparse_rows) as recorder:
        score(128)
        if asked.side == "operators":
            return {"operators": operators(lambda: score(len(document.context_ids)))}
        watch = Watch()
        scores = torch.cat(score(len(document.context_ids)), -1)
        watch.part("scoring")
    measured = watch.found()
    save_file({"scores": scores.contiguous()}, asked.scores)
    return {**measured, "threads": torch.get_num_threads()}


def operators(work: Callable[[], object]) -> dict[str, float]:
    """Share of the time that each of torch's operators takes by itself, the largest first."""
    import torch

    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as found:
        work()
    taken = {event.key: event.self_cpu_time_total for event in found.key_averages()}
    return {name: taken[name] / sum(taken.values()) for name in sorted(taken, key=lambda name: -taken[name])}


# ---- all of it ----


@dataclass(frozen=True)
class Setting:
    """What one run of this benchmark holds fixed."""

    dtype: str
    chunk_tokens: int
    repeats: int
    sides: tuple[str, ...]


def run_child(side: str, setting: Setting, folder: Path, scores: Path) -> dict[str, Any]:
    """One measurement in a process of its own."""
    command: list[str | Path] = ["--model", folder, "--ids", folder / "ids.json", "--scores", scores]
    command += ["--chunk-tokens", str(setting.chunk_tokens), "--dtype", setting.dtype]
    peer = (
        [interpreter(PEERS / f"kvpress-{KVPRESS}", *KVPRESS_NEEDS), Path(__file__).with_name("peer_kvpress.py")]
        if side == "kvpress"
        else None
    )
    start = peer or [sys.executable, __file__, "--side", side]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    if peer:
        environment.pop("PYTHONPATH", None)
    run = subprocess.run([*start, *command], capture_output=True, text=True, env=environment, check=False)
    if run.returncode:
        raise SystemExit(f"{side} failed:\n{run.stderr[-2000:]}")
    found: dict[str, Any] = json.loads(run.stdout.splitlines()[-1])
    return found


def compare(folder: Path, context: int, setting: Setting) -> dict[str, Any]:
    """One context length: medians of every side, how they agree, and what counting allows."""
    ids = context_ids(folder, context)
    (folder / "ids.json").write_text(json.dumps(ids))
    runs: dict[str, list[dict[str, Any]]] = {side: [] for side in (*setting.sides, "rate")}
    files = {side: folder / f"scores-{side}" for side in runs}
    for turn in range(setting.repeats if context <= LONG else 1):
        order = [side for side in runs if side != "rate" or turn == 0]
        for side in order if turn % 2 == 0 else order[::-1]:
            runs[side].append(run_child(side, setting, folder, files[side]))
    rate = max(run["multiply_adds_per_second"] for run in runs["rate"])
    row: dict[str, Any] = {"context_tokens": context, "multiply_adds_per_second": rate, "sides": {}, "runs": runs}
    for side in setting.sides:
        found = {
            key: statistics.median(run[key] for run in runs[side]) for key in ("prefill_s", "scoring_s", "extra_bytes")
        }
        found["total_s"] = statistics.median(run["prefill_s"] + run["scoring_s"] for run in runs[side])
        if side != "kvpress":
            bound = counted(folder, ids, setting.chunk_tokens, fast=side == "fast")
            for part, products in (("prefill", bound.prefill), ("scoring", bound.scoring)):
                found[f"bound_{part}_s"] = products / rate
            found["fraction"] = (bound.prefill + bound.scoring) / rate / found["total_s"]
            found["bound_scoring_over_prefill"] = bound.scoring / bound.prefill
        row["sides"][side] = found
    if {"exact", "kvpress"} <= set(setting.sides):
        row["agreement"] = agreement(files["exact"], files["kvpress"])
        row["speed_up"] = row["sides"]["kvpress"]["total_s"] / row["sides"]["exact"]["total_s"]
        row["memory_ratio"] = row["sides"]["exact"]["extra_bytes"] / row["sides"]["kvpress"]["extra_bytes"]
        if setting.dtype != "float32":
            exact = run_child("exact", replace(setting, dtype="float32"), folder, folder / "scores-float32")
            runs["float32"] = [exact]
            row["against_float32"] = {
                side: agreement(files[side], folder / "scores-float32") for side in ("exact", "kvpress")
            }
    if {"fast", "kvpress"} <= set(setting.sides):
        row["fast_speed_up"] = row["sides"]["kvpress"]["total_s"] / row["sides"]["fast"]["total_s"]
    return row


def counted(folder: Path, ids: list[int], chunk_tokens: int, *, fast: bool) -> Any:
    """The products of one context, exact or fast."""
    from kvprofile.checkpoint import Source, describe, load_tokenizer
    from kvprofile.scoring.effort import EXACT, FAST
    from kvprofile.scoring.prompts import chat_frame, chunks, frame_document
    from kvprofile.scoring.work import DecoderShape, Repeat, count

    source = Source("random", folder, None)
    description, frame = describe(source), chat_frame(load_tokenizer(source))
    prefix = len(frame.prefix_ids)
    document = frame_document("context", ids[prefix:], frame)
    parts = list(chunks(document, frame, chunk_tokens))
    effort = FAST if fast else EXACT
    wanted = effort.chunks(len(parts), 0, 0)
    repeats = [Repeat.of(document, part, sparse_rows=effort.sparse_rows) for part in parts if part.index in wanted]
    shape = DecoderShape.of(description.config, description.geometry)
    return count(shape, prefix, len(ids) - prefix, repeats)


def agreement(ours: Path, theirs: Path) -> dict[str, float]:
    """Rank correlation of head scores (maximum and mean over the context) and of all token scores."""
    from safetensors.torch import load_file
    from scipy.stats import spearmanr

    left, right = load_file(ours)["scores"], load_file(theirs)["scores"]
    both = min(left.shape[-1], right.shape[-1])  # kvpress gives its prefix a place too
    left, right = left[..., -both:], right[..., -both:]
    pairs = {"max": (left.amax(-1), right.amax(-1)), "mean": (left.mean(-1), right.mean(-1)), "token": (left, right)}
    found = {name: float(spearmanr(a.flatten(), b.flatten()).statistic) for name, (a, b) in pairs.items()}
    return {**found, "worst_difference": (left - right).abs().max().item()}


def show_operators(folder: Path, context: int, setting: Setting) -> None:
    """Print what exact scoring of one context spends its time on, down to a hundredth."""
    (folder / "ids.json").write_text(json.dumps(context_ids(folder, context)))
    found = run_child("operators", setting, folder, folder / "scores")["operators"]
    table = Table("operator", "share of time")
    for name, share in found.items():
        if share >= 0.01:
            table.add_row(name, f"{share:.1%}")
    Console().print(table)


def growth(rows: Sequence[dict[str, Any]], side: str, part: str) -> float | None:
    """Exponent of seconds against context tokens, by least squares over the logarithms; None with one context."""
    points = [(math.log(row["context_tokens"]), math.log(row["sides"][side][part])) for row in rows]
    if len(points) < 2:
        return None
    return statistics.linear_regression(*zip(*points, strict=True)).slope


def machine(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The machine in words, threads of each side, and versions."""
    from kvprofile.records.provenance import machine as described

    return {
        "machine": described().model_dump(mode="json"),
        "threads": {side: runs[0]["threads"] for side, runs in rows[-1]["runs"].items()},
        "torch": version("torch"),
        "transformers": version("transformers"),
        "kvpress": KVPRESS,
        "python": platform.python_version(),
    }


def render(document: dict[str, Any], console: Console) -> None:
    """The same document for people."""
    sides = document["sides"]
    times = Table("tokens", *(f"{side} read + score, s" for side in sides), "times kvpress", "of the bound")
    extra = Table("tokens", *(f"{side} extra, MiB" for side in sides), "of kvpress", "score/read", "bound", "agreement")
    for row in document["rows"]:
        found = row["sides"]
        ups = [f"{row[key]:.2f}" for key in ("speed_up", "fast_speed_up") if key in row]
        fractions = [f"{found[side]['fraction']:.0%}" for side in sides if side != "kvpress"]
        times.add_row(
            f"{row['context_tokens']:,}",
            *(f"{found[side]['prefill_s']:.2f} + {found[side]['scoring_s']:.2f}" for side in sides),
            " / ".join(ups),
            " / ".join(fractions),
        )
        ours = next((found[side] for side in sides if side == "exact"), None)
        agreed = row.get("agreement")
        extra.add_row(
            f"{row['context_tokens']:,}",
            *(f"{found[side]['extra_bytes'] / MIB:.0f}" for side in sides),
            f"{row['memory_ratio']:.2f}" if "memory_ratio" in row else "",
            f"{ours['scoring_s'] / ours['prefill_s']:.2f}" if ours else "",
            f"{ours['bound_scoring_over_prefill']:.2f}" if ours else "",
            f"{min(agreed[name] for name in ('max', 'mean', 'token')):.5f}" if agreed else "",
        )
    console.print(times)
    console.print(extra)
    grown = [f"{side} {value:.2f}" for side, value in document["growth"].items() if value is not None]
    console.print(f"seconds grow with the context to the power of: {', '.join(grown) or 'one context says nothing'}")
    console.print(
        "of the bound: seconds that the counted products take at the rate of large products, over seconds taken;\n"
        "score/read and its bound: exact scoring over reading the context, taken and counted; agreement: the least of\n"
        "the rank correlations of head maxima, head means and token scores with kvpress; memory includes the cache."
    )
    for row in document["rows"]:
        for side, found in row.get("against_float32", {}).items():
            shown = ", ".join(f"{name} {found[name]:.4f}" for name in ("max", "mean", "token"))
            console.print(f"{row['context_tokens']:,} tokens, {side}, rank correlation with float32: {shown}")
    rate = max(row["multiply_adds_per_second"] for row in document["rows"])
    console.print(f"{document['dtype']}, large products {2e-9 * rate:.0f} GFLOP/s, {json.dumps(document['facts'])}")


def main() -> None:
    parser = argparse.ArgumentParser(description="Profiling one context, ours against kvpress.")
    parser.add_argument("--context", type=int, action="append", help="context tokens; repeatable")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--repeats", type=int, default=REPEATS)
    parser.add_argument("--only", action="append", choices=SIDES, help="measure this side; repeatable")
    parser.add_argument("--operators", action="store_true", help="what takes the time of exact scoring, and no speeds")
    parser.add_argument("--smoke", action="store_true", help="one short context: whether it runs")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--chunk-tokens", type=int, default=None)
    for name, kind in (("side", str), ("model", Path), ("ids", Path), ("scores", Path)):
        parser.add_argument(f"--{name}", type=kind, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.side:
        print(json.dumps(measure(asked)))
        return
    contexts = tuple(asked.context or ((SMOKE_CONTEXT,) if asked.smoke else CONTEXTS))
    chunk_tokens = asked.chunk_tokens or (SMOKE_CHUNK_TOKENS if asked.smoke else CHUNK_TOKENS)
    sides = tuple(side for side in SIDES if side in (asked.only or SIDES))
    setting = Setting(asked.dtype, chunk_tokens, 1 if asked.smoke else asked.repeats, sides)
    with tempfile.TemporaryDirectory() as place:
        write_model(Path(place), max(contexts) + 2 * chunk_tokens)
        if asked.operators:
            show_operators(Path(place), contexts[-1], setting)
            return
        rows = [compare(Path(place), context, setting) for context in contexts]
    document = {
        "dtype": asked.dtype,
        "chunk_tokens": chunk_tokens,
        "sides": list(sides),
        "rows": rows,
        "growth": {side: growth(rows, side, "total_s") for side in sides},
        "facts": machine(rows),
    }
    if asked.json:
        print(json.dumps(document, indent=2))
    else:
        render(document, Console())


if __name__ == "__main__":
    main()
