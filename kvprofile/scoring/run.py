"""A whole profiling run: corpora and a checkpoint in, a profile or a shard of it out, resumable chunk by chunk."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open

from kvprofile import __version__
from kvprofile.budget.probe import path_of as probe_path
from kvprofile.budget.profile import Profile, Runtime, Scoring, Shortcuts
from kvprofile.checkpoint import identity
from kvprofile.errors import InputError
from kvprofile.files import require_writable, sha256_of, write_atomically
from kvprofile.progress import Progress
from kvprofile.scoring import shard_file
from kvprofile.scoring.aggregate import DocumentScores
from kvprofile.scoring.assemble import Facts, assemble
from kvprofile.scoring.chunk_store import ChunkStore
from kvprofile.scoring.engine import Engine
from kvprofile.scoring.methods import METHODS
from kvprofile.scoring.plan import ScoringPlan
from kvprofile.scoring.prompts import PROMPTS_VERSION


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
    with _scored(plan, engine, chunks, progress, keep_token_scores) as attention:
        if save_token_scores is not None:
            _write_token_scores(plan, chunks, save_token_scores)
        made = assemble(_facts(plan, engine, attention, chunks), _documents(plan, chunks), chunks.fit)
        made.write(output)
        chunks.discard()
    return made.profile


def score_shard(plan: ScoringPlan, engine: Engine, path: Path, progress: Progress, force: bool = False) -> bool:
    """Score the documents of the plan's shard and write its file to ``path``; False where it is there already.

    Raises InputError as ``profile``.
    """
    if plan.shard is None:
        raise ValueError("the plan has no shard")
    key = _run_key(plan, engine, keep_token_scores=False)
    chunks = ChunkStore(path, key, plan.description.geometry)
    facts = _facts(plan, engine, "", chunks)
    header = shard_file.ShardFile(path, __version__, plan.shard, len(plan.documents), key, facts)
    if shard_file.is_finished(header, force):
        return False
    with _scored(plan, engine, chunks, progress, keep_token_scores=False) as attention:
        header = replace(header, facts=_facts(plan, engine, attention, chunks))
        shard_file.write(header, _documents(plan, chunks), chunks.fit)
        chunks.discard()
    return True


@contextmanager
def _scored(
    plan: ScoringPlan, engine: Engine, chunks: ChunkStore, progress: Progress, keep_token_scores: bool
) -> Iterator[str]:
    """Every chunk of the plan finished, for this process alone; gives the attention kernel used, '' for no document."""
    with chunks.opened() as kept:
        if kept:
            progress.say(f"continuing: {kept} chunks are finished already")
        elif chunks.replaced:
            progress.say(f"starting anew: {chunks.replaced} finished chunks belong to a run with other inputs")
        yield engine.score(plan, chunks, progress, keep_token_scores) if plan.own else ""


def _documents(plan: ScoringPlan, chunks: ChunkStore) -> list[DocumentScores]:
    """What each document that was read adds to the profile."""
    return [
        DocumentScores.of(
            chunks.statistics(index),
            chunks.middle(index),
            chunks.loss(index),
            len(plan.documents[index].context_ids),
        )
        for index in plan.own
        if chunks.finished(index)
    ]


def _facts(plan: ScoringPlan, engine: Engine, attention: str, chunks: ChunkStore) -> Facts:
    options = plan.options
    return Facts(
        model=identity(plan.description, plan.tokenizer),
        scoring=Scoring(
            method=options.method,
            statistic=METHODS[options.method].statistic,
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
