"""Starting a real engine in a process of its own, and comparing what it says with the simulation."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from dataclasses import dataclass

import torch

from kvprofile.budget import store
from kvprofile.budget.probe import Probe, digest, path_of
from kvprofile.budget.profile import SLIDING_ATTENTION, HeadBudgets, mean_budget
from kvprofile.checkpoint import Source, describe
from kvprofile.evaluate.simulate import simulating
from tests.helpers.factories import make_graded, save_runtime_file
from tests.helpers.models import ROOT, random_model

NEAR_TIE = 1e-3
"""Logits closer than this may be ranked either way by another order of summation."""

CLOSE = 1e-3
"""Log-probabilities of float32 differ by a hundredth of this, and by ten times this where a row reads other tokens."""

NEAR_TIE_FLOAT8 = 0.05
"""One key that is rounded otherwise moves logits that far; without any rounding they are 0.2 apart and more."""

UNEVEN = [[1.0, 0.0, 0.0, 1.0], [0.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0], [0.0, 1.0, 1.0, 0.0]]
"""Heads apart and side by side, a layer without full heads, one with nothing else."""

SHARES = [[1.0, 0.3, 0.3, 1.0], [0.6, 0.0, 0.0, 0.6], [1.0, 1.0, 1.0, 1.0], [0.0, 0.3, 0.6, 1.0]]
"""Heads of one share apart and side by side, a layer without full heads, one with nothing else, one of every share."""


@dataclass
class Subject:
    """A random float32 model on disk and its description."""

    model: object
    folder: object
    geometry: object


def make_subject(folder, family="llama", **changes):
    shape = {"head_dim": 32, "num_attention_heads": 8, "num_key_value_heads": 4, "num_hidden_layers": 4, **changes}
    model = random_model(family, **shape)
    model.save_pretrained(folder)
    model.set_attn_implementation("sdpa")
    return Subject(model, folder, describe(Source(folder.name, folder, None)).geometry)


def draw(rng, count):
    return [rng.randrange(4, 1000) for _ in range(count)]


def draw_batch(rng, count, longest=400, shared=()):
    """Prompts with shared beginnings, around block borders and shorter than sinks and window; outputs of 1 and more."""
    lengths = [n for n in (1, 5, 31, 32, 33, 64, 97, 150, 260, 400) if n <= longest]
    return [
        (
            list(shared[: rng.choice((0, 32, 64, 100, 192))]) + draw(rng, rng.choice(lengths)),
            rng.choice((1, 2, 8, 30, 60, 100)),
        )
        for _ in range(count)
    ]


def finite(result):
    return all(
        math.isfinite(value) for batch in result["batches"] for found in batch["outputs"] for value in found["logprobs"]
    )


def write_budget(path, subject, heads, rule, name=None):
    """A runtime file that keeps the heads of value 1.0."""
    full = [None if row[0] is None else [head for head, value in enumerate(row) if value == 1.0] for row in heads]
    return save_runtime_file(
        path,
        subject.geometry,
        name or subject.folder.name,
        full,
        sink_tokens=rule.sink_tokens,
        recent_tokens=rule.recent_tokens,
    )


def write_graded(path, subject, heads, rule, seed=0):
    """A budget file whose only budget is ``heads`` [L][G], shares of at most four sizes, and a made-up probe.

    Gives the probe.
    """
    geometry = subject.geometry
    features = geometry.head_size // 2 + geometry.head_size + 7
    generator = torch.Generator().manual_seed(seed)
    shape = len(geometry.profiled_layers), geometry.kv_heads, features
    made = Probe(geometry.profiled_layers, torch.randn(shape, generator=generator))
    content = made.to_bytes()
    path_of(path).write_bytes(content)
    profile = make_graded(
        layers=geometry.layers,
        kv_heads=geometry.kv_heads,
        query_groups=geometry.attention_heads // geometry.kv_heads,
        head_size=geometry.head_size,
        sliding=[layer for layer, kind in enumerate(geometry.layer_types) if kind == SLIDING_ATTENTION],
        name=subject.folder.name,
        sink_tokens=rule.sink_tokens,
        recent_tokens=rule.recent_tokens,
        probe_sha256=digest(content),
    )
    budgets = {"0.5": HeadBudgets(heads=heads, retention_realised=mean_budget(heads))}
    store.save(profile.model_copy(update={"budgets": budgets}), path)
    return made


def environment(budget=None, **settings):
    """The environment of an engine in one process; with a budget it serves with that."""
    kept = "LLM_KVZIP_ALLOW_UNTESTED"  # set where another release of vLLM is tried
    found = {n: v for n, v in os.environ.items() if n == kept or not n.startswith("LLM_KVZIP_")}
    found |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}
    found |= {"VLLM_LOGGING_LEVEL": "INFO", "TOKENIZERS_PARALLELISM": "false"}
    if budget is not None:
        found |= {"LLM_KVZIP_ENABLED": "1", "LLM_KVZIP_BUDGET": str(budget)}
    return found | settings


def start(jobs, env, driver="tests.vllm.driver"):
    """Run a driver on jobs. Gives the finished process."""
    run = subprocess.run(
        [sys.executable, "-m", driver],
        input=json.dumps(jobs),
        env=env,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=1500,
        check=False,
    )
    assert run.returncode == 0, (run.stdout + run.stderr)[-6000:]
    return run


def job(subject, batches, budget=None, every_step=False, reload_before=None, window=None, graded=False, **engine):
    """One engine's work: batches of (prompt, max_tokens), and vLLM's arguments."""
    options = {
        "model": str(subject.folder),
        "skip_tokenizer_init": True,
        "dtype": "float32",
        "max_model_len": 1024,
        "enforce_eager": True,
        "block_size": 32,
        **engine,
    }
    requests = [[{"prompt": prompt, "max_tokens": most} for prompt, most in batch] for batch in batches]
    own = {} if budget is None else {"LLM_KVZIP_BUDGET": str(budget)}
    own |= {} if window is None else {"LLM_KVZIP_WINDOW": window}
    own |= {"LLM_KVZIP_KIND": "graded", "LLM_KVZIP_RETENTION": "0.5"} if graded else {}
    return {
        "engine": options,
        "batches": requests,
        "every_step": every_step,
        "reload_before": reload_before,
        "environment": own,
    }


def serve_all(jobs, env):
    """Results of several engines, one after the other in one process, and its log."""
    run = start(jobs, env)
    lines = [line.removeprefix("RESULT") for line in run.stdout.splitlines() if line.startswith("RESULT")]
    return [json.loads(line) for line in lines], run.stdout + run.stderr


def serve(subject, batches, env, **options):
    """Outputs of batches of (prompt, max_tokens) from one engine, with the log of its process."""
    (result,), log = serve_all([job(subject, batches, **options)], env)
    return result | {"log": log}


def expected_lives(prompt, output, v2):
    """[(where prefill ends, where its tokens end)] for each time the request was admitted.

    On model runner V1 the last generated tokens of a resumed request count as decoded where they came one by one.
    """
    ends = [*output["admissions"][1:], len(prompt) + len(output["tokens"])]
    lives = []
    for start_at, end, chunks in zip(output["admissions"], ends, output["chunks"], strict=True):
        prefill_end = start_at
        if not v2:
            singles = [start for start, count in chunks if count == 1 and len(prompt) <= start < start_at]
            if singles:
                prefill_end = singles[0]
                after = [count for start, count in chunks if prefill_end <= start < start_at]
                assert set(after) == {1}, "a chunk behind single tokens is beyond this replay"
        lives.append((prefill_end, start_at, end))
    return lives


def compare(simulation, prompt, output, v2, near_tie=NEAR_TIE, close=None):
    """Assert that an engine's tokens are the simulation's, life by life. Gives (tokens, near ties).

    Where ``close`` is given, so close are their log-probabilities too.
    """
    tokens = [*prompt, *output["tokens"]]
    count = ties = 0
    for prefill_end, first, end in expected_lives(prompt, output, v2):
        logits = [simulation.prefill(tokens[:prefill_end])]
        simulation.trim(prompt_tokens=len(prompt))
        simulation.forget_context()
        if end - 1 > prefill_end:
            logits += simulation.start().read([tokens[prefill_end : end - 1]])[0]
        for position in range(first, end):
            row = logits[position - prefill_end]
            gap = float(row.max() - row[tokens[position]])
            assert gap < near_tie, f"token {position} of a prompt of {len(prompt)}: {gap:.4f} below the best"
            if close is not None:
                likely = float(row.log_softmax(-1)[tokens[position]]) - output["logprobs"][position - len(prompt)]
                assert abs(likely) < close, f"token {position}: its log-probability is {likely:.4f} from the engine's"
            ties += gap > 0
            count += 1
    return count, ties


def compare_all(subject, heads, rule, batches, result, choice=None, float8=None, close=None):
    """Assert that every output of every batch is the simulation's. Gives (tokens, near ties).

    Rows of graded heads, which have a ``choice`` of tokens, are trimmed after prefill on either model runner. With a
    cache of ``float8`` ties are wider: another order of summation may now and then round a key to its neighbour.
    """
    count = ties = 0
    near_tie = NEAR_TIE if float8 is None else NEAR_TIE_FLOAT8
    with simulating(subject.model, subject.geometry, heads, rule, choice, float8) as simulation:
        for batch, found in zip(batches, result["batches"], strict=True):
            for (prompt, _), output in zip(batch, found["outputs"], strict=True):
                more, tied = compare(simulation, prompt, output, result["v2"] or choice is not None, near_tie, close)
                count, ties = count + more, ties + tied
    return count, ties
