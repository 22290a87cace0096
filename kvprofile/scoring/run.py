"""A whole profiling run: corpora and a checkpoint in, a profile out, resumable chunk by chunk."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open

from kvprofile import __version__
from kvprofile.budget import store
from kvprofile.budget.allocate import preset_budgets
from kvprofile.budget.probe import FEATURES, FLOOR, Probe, digest, is_probe
from kvprofile.budget.probe import path_of as probe_path
from kvprofile.budget.profile import (
    GRADED_VERSION,
    WHOLE_VERSION,
    ProbeRecord,
    Profile,
    Runtime,
    Scores,
    Scoring,
    Shortcuts,
)
from kvprofile.checkpoint import identity
from kvprofile.errors import InputError
from kvprofile.files import require_writable, sha256_of, write_atomically
from kvprofile.progress import Progress
from kvprofile.scoring.aggregate import merge_documents
from kvprofile.scoring.chunk_store import ChunkStore
from kvprofile.scoring.engine import Engine
from kvprofile.scoring.methods import METHODS
from kvprofile.scoring.plan import ScoringPlan
from kvprofile.scoring.prompts import PROMPTS_VERSION
from kvprofile.scoring.shares import graded_budgets


def profile(
    plan: ScoringPlan,
    engine: Engine,
    output: Path,
    progress: Progress,
    save_token_scores: Path | None = None,
) -> Profile:
    """Score every document and write the profile to ``output``; finished chunks lie next to it until then.

    Raises InputError where weights do not load, the disk is full or another process writes ``output``; finished chunks
    stay for the next run.
    """
    keep_token_scores = save_token_scores is not None
    chunks = ChunkStore(output, _run_key(plan, engine, keep_token_scores), plan.description.geometry)
    with chunks.opened() as kept:
        if kept:
            progress.say(f"continuing: {kept} chunks are finished already")
        elif chunks.replaced:
            progress.say(f"starting anew: {chunks.replaced} finished chunks belong to a run with other inputs")
        attention = engine.score(plan, chunks, progress, keep_token_scores)
        if save_token_scores is not None:
            _write_token_scores(plan, chunks, save_token_scores)
        probe = _probe(plan, chunks)
        made = _assemble(plan, engine, attention, chunks, probe)
        if probe is not None:
            write_atomically(probe_path(output), probe.content)
        store.save(made, output)
        if probe is None and is_probe(probe_path(output)):  # of the file that was there before
            probe_path(output).unlink()
        chunks.discard()
    return made


@dataclass(frozen=True)
class _FittedProbe:
    """The bytes of a probe's file, and what the budget file says of it."""

    content: bytes
    record: ProbeRecord


def _probe(plan: ScoringPlan, chunks: ChunkStore) -> _FittedProbe | None:
    """The probe, fitted to all tokens between sinks and window; None where no document is long enough to have any."""
    if not chunks.fit.tokens:
        return None
    weights, r2 = chunks.fit.solve()
    content = Probe(plan.description.geometry.profiled_layers, weights).to_bytes()
    target = f"log({METHODS[plan.options.method].token_score} + {FLOOR:g})"
    record = ProbeRecord(sha256=digest(content), features=FEATURES, target=target, tokens=chunks.fit.tokens, r2=r2)
    return _FittedProbe(content, record)


def _assemble(
    plan: ScoringPlan, engine: Engine, attention: str, chunks: ChunkStore, probe: _FittedProbe | None
) -> Profile:
    options = plan.options
    read = [index for index in range(len(plan.documents)) if chunks.finished(index)]
    statistics = [chunks.statistics(index) for index in read]
    statistic = METHODS[options.method].statistic
    losses = [chunks.loss(index) for index in read]
    tokens = [len(plan.documents[index].context_ids) for index in read]
    scores: Scores = merge_documents(statistics, plan.description.geometry, losses, tokens)
    if probe is None:
        budgets = preset_budgets(scores, statistic)
    else:
        between = [chunks.middle(index) for index in read]
        budgets = graded_budgets([one for one in between if one.any()], plan.description.geometry)
    return Profile(
        schema_version=WHOLE_VERSION if probe is None else GRADED_VERSION,
        kvprofile_version=__version__,
        model=identity(plan.description, plan.tokenizer),
        scoring=Scoring(
            method=options.method,
            statistic=statistic,
            chunk_tokens=options.chunk_tokens,
            context_tokens=options.context_tokens,
            prompts_version=PROMPTS_VERSION,
            prefix=plan.frame.prefix,
            suffix=plan.frame.suffix,
            engine=engine.name,
            attention=attention,
            dtype=engine.dtype,
            device=engine.device,
            seed=options.seed,
            corpora=list(plan.corpora),
            imported_from=None,
            shortcuts=None if options.effort.exact else _shortcuts(plan, chunks),
        ),
        scores=scores,
        budgets=budgets,
        probe=None if probe is None else probe.record,
        runtime=Runtime(sink_tokens=options.sink_tokens, recent_tokens=options.recent_tokens),
    )


def _shortcuts(plan: ScoringPlan, chunks: ChunkStore) -> Shortcuts:
    """What the run left out, counted from what it has finished."""
    effort = plan.options.effort
    counts = [len(chunks.finished(index)) for index in range(len(plan.documents))]
    wanted = sum(len(plan.wanted(index)) for index in range(len(plan.documents)))
    return Shortcuts(
        sparse_rows=effort.sparse_rows,
        chunk_share=effort.chunk_share,
        stop_early=effort.stop_early,
        stopped_early=sum(counts) < wanted,
        chunks_read=sum(counts),
        chunks=sum(plan.chunk_count(index) for index in range(len(plan.documents))),
        documents_read=sum(count > 0 for count in counts),
    )


def refuse_token_score_file(path: Path, output: Path, force: bool) -> None:
    """Raise InputError unless token scores may be written to ``path``: a new file, or one of kvprofile's own."""
    if path.suffix != ".safetensors":
        raise InputError(f"--save-token-scores {path}: give a file name that ends in .safetensors")
    if path.resolve() == probe_path(output).resolve():
        raise InputError(f"--save-token-scores {path} is the probe's file too; give another name")
    if path.resolve() == output.resolve():
        raise InputError(f"--save-token-scores {path} is the budget file too; give another name")
    if path.is_file() and not force and not _holds_token_scores(path):
        raise InputError(f"{path} exists and holds no token scores; pass --force to replace it or give another name")
    require_writable(path)


def _holds_token_scores(path: Path) -> bool:
    try:
        with safe_open(path, "pt") as tensors:
            return "prefix_tokens" in (tensors.metadata() or {}).get("kvprofile", "")
    except (OSError, SafetensorError):
        return False


def _write_token_scores(plan: ScoringPlan, chunks: ChunkStore, path: Path) -> None:
    """One tensor [L, G, T] for each document, NaN in layers that are not scored, in one safetensors file."""
    geometry = plan.description.geometry
    tensors = {}
    for index, document in enumerate(plan.documents):
        found = chunks.token_scores(index)
        full = torch.full((geometry.layers, geometry.kv_heads, found.shape[-1]), torch.nan)
        full[list(geometry.profiled_layers)] = found
        tensors[f"{index:05}/{document.name}"] = full
    notes = {
        "model": plan.description.source.name,
        "shape": "layers, kv_heads, context_tokens",
        "prefix_tokens": [len(document.prefix_ids) for document in plan.documents],
    }
    # save_file would leave a temporary file of its own where the process is killed
    write_atomically(path, safetensors.torch.save(tensors, {"kvprofile": json.dumps(notes, sort_keys=True)}))


def _run_key(plan: ScoringPlan, engine: Engine, keep_token_scores: bool) -> str:
    """Everything the chunks on disk depend on."""
    description = plan.description
    facts: dict[str, object] = {
        "version": __version__,
        "model": identity(description, plan.tokenizer).model_dump(mode="json"),
        **engine.facts(),
        "chunk_tokens": plan.options.chunk_tokens,
        "method": plan.options.method,
        "frame": asdict(plan.frame),
        "keep_token_scores": keep_token_scores,
    }
    if not plan.options.effort.exact:
        facts["effort"] = asdict(plan.options.effort)
        facts["seed"] = plan.options.seed
    facts["trimmed"] = (plan.options.sink_tokens, plan.options.recent_tokens)
    ids: Sequence[object] = [(d.name, d.prefix_ids, d.context_ids) for d in plan.documents]
    return sha256_of(json.dumps(facts, sort_keys=True).encode(), json.dumps(ids).encode())
