"""Run records made up for tests and previews: plausible in shape, invented in every number, marked as such.

`python -m tests.helpers.made_up FILE` writes one, to look at a page without a benchmark.
"""

from __future__ import annotations

import hashlib
import math
import random
import statistics
import sys
from pathlib import Path

from kvprofile import __version__
from kvprofile.records import run_files
from kvprofile.records.record import (
    Attention,
    Bound,
    Cost,
    Document,
    Experiment,
    Heads,
    Leg,
    Load,
    Machine,
    Memory,
    Metrics,
    Provenance,
    Request,
    RunRecord,
    Sample,
    Verdict,
)

LAYERS, KV_HEADS, BLOCK = 28, 4, 16
SINK, RECENT, CONTEXT = 128, 256, 9000
POOL_BYTES = 8 * 2**30
QUESTIONS = {
    "field-manual": [
        ("Which valve is closed first when the pressure alarm sounds?", "valve C-4"),
        ("How many hours may the pump run without oil?", "six"),
        ("Who signs the inspection sheet?", "the shift lead"),
    ],
    "voice-guide": [
        ("Write Liz's reply to a guest who lost an umbrella.", "umbrella"),
        ("Which word does Liz never use?", "unfortunately"),
        ("How does Liz end a letter?", "Warmly, Liz"),
    ],
    "personas": [
        ("Which persona travels with a cello?", "Marta"),
        ("What does Ned order on Mondays?", "barley soup"),
        ("Who of the four is allergic to lilies?", "Ines"),
    ],
}
VERIFIERS = ("answer", "voice drift", "repetition")
LEGS = {"baseline": 1.0, "0.9": 0.9, "0.7": 0.7, "0.5": 0.5}


def make_record(
    repetitions: int = 3, legs=(*LEGS, "remote"), looks: int = 40, seed: int = 0, **experiment
) -> RunRecord:
    """A record as the `seed` preset leaves it. ``experiment`` overrides fields of the experiment."""
    asked = {"name": "seed plan", "preset": "seed", "baseline": "baseline", "made_up": True, **experiment}
    asked.setdefault("settings", {"repetitions": repetitions, "retentions": [0.9, 0.7, 0.5], "concurrency": 8})
    return RunRecord(
        kvprofile_version=__version__,
        experiment=Experiment(**asked),
        provenance=make_provenance(),
        legs=[make_leg(name, repetition, seed=seed, looks=looks) for repetition in range(repetitions) for name in legs],
    )


def make_provenance(**changes) -> Provenance:
    facts = {
        "started": "2026-11-24T09:00:00Z",
        "finished": "2026-11-24T10:12:00Z",
        "git_commit": "0123456789abcdef0123456789abcdef01234567",
        "git_dirty": False,
        "versions": {"python": "3.11.7", "kvprofile": __version__, "torch": "2.13.0", "vllm": "0.32.0"},
        "machine": Machine(
            system="Linux 6.1.0", architecture="x86_64", processor="Made-Up CPU", cores=16,
            memory_bytes=128 * 2**30, accelerators=["Made-Up GPU, 80 GiB"],
        ),
        "environment": {"OMP_NUM_THREADS": "1"},
    }  # fmt: skip
    return Provenance(**facts | changes)


def make_leg(name: str = "baseline", repetition: int = 0, *, seed: int = 0, looks: int = 40, **changes) -> Leg:
    """A leg. ``changes`` override its fields."""
    rng = random.Random(f"{seed} {name} {repetition}")
    retention = LEGS.get(name)
    remote = retention is None
    kept = 1.0 if remote else retention + (1 - retention) * (SINK + RECENT) / CONTEXT
    requests = make_requests(rng, retention, kept)
    bound = None if remote or retention == 1 else make_bound(rng, kept)
    fields = {
        "name": name,
        "kind": "remote" if remote else "local",
        "repetition": repetition,
        "status": "ok",
        "started": f"2026-11-24T09:{len(name) + repetition * 10:02d}:00Z",
        "compressed": None if remote else retention < 1,
        "retention_asked": retention,
        "retention_realised": None if remote else round(retention * LAYERS * KV_HEADS) / (LAYERS * KV_HEADS),
        "provider": "moonshot" if remote else None,
        "engine": None if remote else "vllm 0.32.0",
        "model": "kimi-made-up" if remote else "Qwen/Made-Up-14B",
        "dtype": None if remote else "bfloat16",
        "device": None if remote else "cuda: Made-Up GPU",
        "pool_bytes": None if remote else POOL_BYTES,
        "block_tokens": None if remote else BLOCK,
        "load": Load(
            mode="closed", concurrency=8, requests=len(requests), warmup_requests=2, max_output_tokens=128,
            temperature=0.0, streaming=True, description="8 requests in flight, each document with each question",
        ),
        "documents": [
            Document(name=each, sha256=hashlib.sha256(each.encode()).hexdigest(), tokens=CONTEXT) for each in QUESTIONS
        ],
        "seeds": [0],
        "metrics": make_metrics(requests, kept, rng),
        "requests": requests,
        "samples": [] if remote else make_samples(rng, kept, looks),
        "memory": Memory() if remote else Memory(
            pool_bytes_peak=int(POOL_BYTES * 0.95 * kept), device_memory_bytes_peak=71 * 2**30, preemptions=0
        ),
        "eviction_ratio": None if remote else round(1 - kept, 4),
        "attention": None if remote else Attention(
            mean_ms=4.2 * kept * rng.uniform(0.97, 1.03), median_ms=4.1 * kept, p99_ms=5.0 * kept, steps=256,
            context_tokens=CONTEXT, how="eager pass of its own, events around each attention operation",
        ),
        "bound": bound,
        "cost": Cost(amount=0.42, currency="USD", input_per_million_tokens=0.6, output_per_million_tokens=2.5)
        if remote
        else None,
        "heads": None if remote or retention == 1 else make_heads(retention),
    }  # fmt: skip
    return Leg(**fields | changes)


def make_bound(rng, kept) -> Bound:
    speedup = 1 / kept
    reached = 1 + (speedup - 1) * rng.uniform(0.7, 0.8)
    how = f"1 / (r + (1 - r) * (S + W) / n) with S = {SINK}, W = {RECENT}, n = {CONTEXT:,}"
    return Bound(speedup=speedup, reached=reached, fraction=reached / speedup, context_tokens=CONTEXT, how=how)


def make_heads(retention) -> Heads:
    """The best heads of a made-up ranking that prefers later layers."""
    rng = random.Random("heads")
    ranked = sorted(
        ((layer, head) for layer in range(LAYERS) for head in range(KV_HEADS)),
        key=lambda place: rng.random() + 0.4 * math.sin(place[0] / LAYERS * math.pi),
        reverse=True,
    )
    full = set(ranked[: round(retention * LAYERS * KV_HEADS)])
    budgets = [[float((layer, head) in full) for head in range(KV_HEADS)] for layer in range(LAYERS)]
    return Heads(budgets=budgets, method="kvzip", statistic="max", sink_tokens=SINK, recent_tokens=RECENT)


def make_requests(rng, retention, kept) -> list[Request]:
    blocks = CONTEXT // BLOCK
    rows = []
    for document, questions in QUESTIONS.items():
        for question, expected in questions:
            wrong = retention is not None and rng.random() < (1 - retention) * 0.3
            answer = "I am not certain." if wrong else f"It is {expected}."
            drift = retention is not None and document == "voice-guide" and rng.random() < (1 - retention) * 0.6
            verdicts = [
                Verdict(name="answer", passed=not wrong, score=float(not wrong)),
                Verdict(
                    name="voice drift", passed=not drift, score=round(rng.uniform(0.5, 0.99), 3),
                    warnings=["sentences are longer than the guide's samples"] if drift else [],
                ),
                Verdict(name="repetition", passed=True, score=0.0),
            ]  # fmt: skip
            tpot = 24 * (0.4 + 0.6 * kept) * rng.uniform(0.95, 1.05)
            ttft, count = rng.uniform(700, 1100), 96
            rows.append(
                Request(
                    document=document, question=question, output=answer, expected=expected, seed=0,
                    finish_reason="stop", verdicts=verdicts, start_s=len(rows) * 0.4, ttft_ms=ttft, tpot_ms=tpot,
                    e2el_ms=ttft + tpot * (count - 1), input_tokens=CONTEXT + 20, output_tokens=count,
                    blocks_after_prefill=None if retention is None else blocks,
                    blocks_after_trim=None if retention is None else int(blocks * kept),
                    blocks_at_end=None if retention is None else int(blocks * kept) + 6,
                    eviction_ratio=None if retention is None else 1 - int(blocks * kept) / blocks,
                )
            )  # fmt: skip
    return rows


def make_metrics(requests, kept, rng) -> Metrics:
    count = len(requests)
    duration = 30 * (0.45 + 0.55 * kept) * rng.uniform(0.98, 1.02)
    read = sum(request.input_tokens for request in requests)
    written = sum(request.output_tokens for request in requests)
    found = {
        "duration": duration,
        "completed": count,
        "failed": 0,
        "total_input_tokens": read,
        "total_output_tokens": written,
        "request_throughput": count / duration,
        "output_throughput": written / duration,
        "total_token_throughput": (read + written) / duration,
        "max_concurrent_requests": 8,
    }
    for name in ("ttft", "tpot", "e2el"):
        values = [getattr(request, f"{name}_ms") for request in requests]
        found |= _latency(name, values)
    return Metrics(**found | _latency("itl", [request.tpot_ms for request in requests]))


def _latency(name, values):
    return {
        f"mean_{name}_ms": statistics.fmean(values),
        f"median_{name}_ms": statistics.median(values),
        f"p99_{name}_ms": max(values),
    }


def make_samples(rng, kept, count) -> list[Sample]:
    rows = []
    for number in range(count):
        share = min(1.0, number / 8) * (1 if number < count - 4 else (count - number) / 4)
        used = share * (kept + 0.04 * math.sin(number / 2) + rng.uniform(-0.01, 0.01))
        rows.append(
            Sample(
                t_s=round(number * 0.75, 3), pool_bytes_in_use=int(POOL_BYTES * 0.9 * max(0, min(1, used))),
                eviction_ratio=round((1 - kept) * min(1.0, number / 6), 4),
                device_memory_bytes=71 * 2**30, attention_ms=4.2 * kept * rng.uniform(0.9, 1.1),
                running=min(8, number), waiting=0,
            )
        )  # fmt: skip
    return rows


if __name__ == "__main__":
    run_files.save(make_record(), Path(sys.argv[1]))
