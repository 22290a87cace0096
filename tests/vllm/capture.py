"""Scoring the same documents with transformers here and on vLLM in a process of its own."""

from __future__ import annotations

import json
import random
from dataclasses import asdict

import torch
from safetensors.torch import load_file

from kvprofile.checkpoint import Source, describe
from kvprofile.scoring.attention import recording
from kvprofile.scoring.prompts import Frame, frame_document, required_positions
from kvprofile.scoring.reconstruction import Scorer
from kvprofile.scoring.vllm_engine import place_in_vllm
from tests.vllm.engine import environment, start

TOLERANCE = 1e-3

FRAME = Frame("", "", (1, 2), (5, 6, 7), tuple(range(10, 19)), tuple(range(10, 24)))
"""Requests to repeat later chunks share 14 tokens, so most block borders fall among them or behind."""


def draw_documents(seed, lengths):
    rng = random.Random(seed)
    return [frame_document(f"{i}", [rng.randrange(30, 1000) for _ in range(n)], FRAME) for i, n in enumerate(lengths)]


def description_of(folder):
    return describe(Source(folder.name, folder, None))


def case_of(folder, documents, chunk_tokens, output, frame=FRAME, dtype="float32", ranks=1, arguments=(), **others):
    """What the driver reads: ``arguments`` are of ``--vllm-arg``."""
    positions = max(required_positions(document, frame, chunk_tokens) for document in documents)
    engine = place_in_vllm(description_of(folder), dtype, "auto", positions, ranks, arguments)
    return {
        "engine": dict(engine.arguments),
        "frame": asdict(frame),
        "documents": [[d.name, d.prefix_ids, d.context_ids] for d in documents],
        "chunk_tokens": chunk_tokens,
        "output": str(output),
        **others,
    }


def run_cases(cases, **settings):
    """What the driver noticed of each case, with its token scores by document."""
    env = environment(VLLM_LOGGING_LEVEL="WARNING", **settings)
    run = start(cases, env, "tests.vllm.capture_driver")
    lines = [line.removeprefix("RESULT") for line in run.stdout.splitlines() if line.startswith("RESULT")]
    results = [json.loads(line) for line in lines]
    for case, result in zip(cases, results, strict=True):
        tensors = load_file(case["output"])
        result["scores"] = [tensors[f"{index}"] for index in range(len(case["documents"]))]
    return results


def hf_scores(model, folder, documents, chunk_tokens, frame=FRAME):
    """Token scores [profiled layers, G, T] of each document with transformers."""
    most = max(len(d.prefix_ids) + len(d.context_ids) for d in documents)
    with recording(model, description_of(folder).geometry) as recorder:
        scorer = Scorer(model, recorder, frame, document_tokens=most, chunk_tokens=chunk_tokens)
        return [torch.cat([s.token_scores for s in scorer.score(document)], -1) for document in documents]


def worst_difference(expected, found):
    """Over token scores and head scores of all documents; asserts shapes and that the scores say anything."""
    worst = 0.0
    for ours, theirs in zip(expected, found, strict=True):
        assert ours.shape == theirs.shape
        assert ours.std() > 1e-3, "scores without spread would make this comparison empty"
        heads = (ours.amax(-1) - theirs.amax(-1)).abs().max().item()
        worst = max(worst, heads, (ours - theirs).abs().max().item())
    return worst
