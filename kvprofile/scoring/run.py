"""A whole profiling run: corpora and a checkpoint in, a profile out, resumable chunk by chunk."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from kvprofile import __version__
from kvprofile.budget.allocate import preset_budgets
from kvprofile.budget.profile import (
    DEFAULT_RECENT_TOKENS,
    DEFAULT_SINK_TOKENS,
    CorpusRecord,
    Profile,
    Runtime,
    Scores,
    Scoring,
    Shortcuts,
)
from kvprofile.checkpoint import Description, identity
from kvprofile.corpus.sources import Corpus, cut
from kvprofile.errors import InputError, plain
from kvprofile.files import require_writable, sha256_of, write_atomically
from kvprofile.scoring.effort import EXACT, Effort
from kvprofile.scoring.methods import METHODS
from kvprofile.scoring.prompts import PROMPTS_VERSION, Document, Frame, encode, frame_document

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from kvprofile.scoring.engines import Engine
    from kvprofile.scoring.progress import ChunkStore

MOST_TOKENS = 1_000_000
"""Most sinks or recent tokens that a budget file may ask for."""


@dataclass(frozen=True)
class Options:
    """What a user may choose about a run."""

    method: str = "kvzip"
    chunk_tokens: int = 2000
    context_tokens: int | None = None
    seed: int = 0
    sink_tokens: int = DEFAULT_SINK_TOKENS
    recent_tokens: int = DEFAULT_RECENT_TOKENS
    effort: Effort = EXACT

    def __post_init__(self) -> None:
        for name in ("chunk_tokens", "context_tokens", "recent_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"--{name.replace('_', '-')} must be at least 1, not {value}")
        if self.sink_tokens < 0:
            raise InputError(f"--sink-tokens must not be negative, not {self.sink_tokens}")
        if max(self.sink_tokens, self.recent_tokens) > MOST_TOKENS:
            raise InputError(f"--sink-tokens and --recent-tokens must not exceed {MOST_TOKENS:,}")
        if self.method not in METHODS:
            raise InputError(f"unknown method {self.method!r}; known: {', '.join(METHODS)}")
        if METHODS[self.method].loss_aware and not self.effort.exact:
            raise InputError(f"--fast has no shortcut for --method {self.method}, which differentiates every repeat")


class Progress(Protocol):
    """Where a run tells how far it is; units are tokens that the model reads."""

    def start(self, total: int) -> None:
        """Called once, before the first forward pass."""

    def advance(self, tokens: int) -> None:
        """Called after every forward pass."""

    def say(self, message: str) -> None:
        """A line worth reading."""


class Silent(Progress):
    """Progress that nobody watches."""

    def start(self, total: int) -> None:
        """Nothing."""

    def advance(self, tokens: int) -> None:
        """Nothing."""

    def say(self, message: str) -> None:
        """Nothing."""


@dataclass(frozen=True)
class Plan:
    """A run that has passed every check that needs no weights."""

    description: Description
    tokenizer: PreTrainedTokenizerBase
    frame: Frame
    documents: tuple[Document, ...]
    corpora: tuple[CorpusRecord, ...]
    options: Options

    @property
    def document_tokens(self) -> int:
        """Prefix and context tokens of the longest document."""
        return max(len(d.prefix_ids) + len(d.context_ids) for d in self.documents)

    def chunk_count(self, document: int) -> int:
        """How many chunks a document has."""
        return math.ceil(len(self.documents[document].context_ids) / self.options.chunk_tokens)

    def wanted(self, document: int) -> frozenset[int]:
        """Indices of the chunks of a document that are to be repeated."""
        return self.options.effort.chunks(self.chunk_count(document), self.options.seed, document)

    @property
    def positions(self) -> int:
        """Positions that the longest forward pass reaches."""
        from kvprofile.scoring.kvzip import required_positions

        return max(required_positions(d, self.frame, self.options.chunk_tokens) for d in self.documents)


def plan(
    description: Description, tokenizer: PreTrainedTokenizerBase, corpora: Iterable[Corpus], options: Options
) -> Plan:
    """Tokenise and check. Raises InputError for short corpora, a foreign tokenizer, or contexts that do not fit."""
    from kvprofile.scoring.prompts import chat_frame

    frame = chat_frame(tokenizer)
    documents: list[Document] = []
    records: list[CorpusRecord] = []
    for corpus in corpora:
        found = [
            frame_document(f"{corpus.name}/{name}", ids, frame)
            for name, ids in cut(corpus, lambda text: encode(tokenizer, text), options.context_tokens)
        ]
        short = [document.name for document in found if not document.context_ids]
        if short:
            raise InputError(f"{short[0]} has no token left after the prefix; give a longer document")
        tokens = sum(len(document.context_ids) for document in found)
        records.append(
            CorpusRecord(name=plain(corpus.name), sha256=corpus.sha256(), documents=len(found), tokens=tokens)
        )
        documents += found
    made = Plan(description, tokenizer, frame, tuple(documents), tuple(records), options)
    _check_ids(made)
    _check_positions(made)
    return made


def profile(
    plan: Plan,
    engine: Engine,
    output: Path,
    progress: Progress,
    save_token_scores: Path | None = None,
) -> Profile:
    """Score every document and build the profile; ``output`` names the folder of finished chunks, removed at the end.

    The caller writes the profile. Raises InputError where weights do not load or the disk is full; finished
    chunks stay for the next run.
    """
    from kvprofile.scoring.progress import ChunkStore

    store = ChunkStore(output, _run_key(plan, engine, save_token_scores is not None))
    kept = store.open()
    if kept:
        progress.say(f"continuing: {kept} chunks are finished already")
    elif store.replaced:
        progress.say(f"starting anew: {store.replaced} finished chunks belong to a run with other inputs")
    try:
        attention = engine.score(plan, store, progress, save_token_scores is not None)
        if save_token_scores is not None:
            _write_token_scores(plan, store, save_token_scores)
    except BaseException:
        store.discard_if_empty()
        raise
    return _assemble(plan, engine, attention, store)


def finish(output: Path) -> None:
    """Remove the finished chunks of a run whose profile is written."""
    from kvprofile.scoring.progress import ChunkStore

    ChunkStore(output, "").discard()


def _assemble(plan: Plan, engine: Engine, attention: str, store: ChunkStore) -> Profile:
    from kvprofile.scoring.aggregate import merge_documents

    options = plan.options
    read = [index for index in range(len(plan.documents)) if store.finished(index)]
    statistics = [store.statistics(index) for index in read]
    statistic = METHODS[options.method].statistic
    losses = [store.loss(index) for index in read]
    tokens = [len(plan.documents[index].context_ids) for index in read]
    scores: Scores = merge_documents(statistics, plan.description.geometry, losses, tokens)
    return Profile(
        schema_version=1,
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
            shortcuts=None if options.effort.exact else _shortcuts(plan, store),
        ),
        scores=scores,
        budgets=preset_budgets(scores, statistic),
        runtime=Runtime(sink_tokens=options.sink_tokens, recent_tokens=options.recent_tokens),
    )


def _shortcuts(plan: Plan, store: ChunkStore) -> Shortcuts:
    """What the run left out, counted from what it has finished."""
    effort = plan.options.effort
    counts = [len(store.finished(index)) for index in range(len(plan.documents))]
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
    if path.resolve() == output.resolve():
        raise InputError(f"--save-token-scores {path} is the budget file too; give another name")
    if path.is_file() and not force and not _holds_token_scores(path):
        raise InputError(f"{path} exists and holds no token scores; pass --force to replace it or give another name")
    require_writable(path)


def _holds_token_scores(path: Path) -> bool:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as tensors:
            return "kvprofile" in (tensors.metadata() or {})
    except (OSError, SafetensorError):
        return False


def _write_token_scores(plan: Plan, store: ChunkStore, path: Path) -> None:
    """One tensor [L, G, T] for each document, NaN in layers that slide, in one safetensors file."""
    import safetensors.torch
    import torch

    geometry = plan.description.geometry
    tensors = {}
    for index, document in enumerate(plan.documents):
        found = store.token_scores(index)
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


def _run_key(plan: Plan, engine: Engine, keep_token_scores: bool) -> str:
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
    if METHODS[plan.options.method].loss_aware:
        facts["trimmed"] = (plan.options.sink_tokens, plan.options.recent_tokens)
    ids: Sequence[object] = [(d.name, d.prefix_ids, d.context_ids) for d in plan.documents]
    return sha256_of(json.dumps(facts, sort_keys=True).encode(), json.dumps(ids).encode())


def _check_ids(plan: Plan) -> None:
    rows = plan.description.vocabulary_rows
    frame = (*plan.frame.suffix_ids, *plan.frame.repeat_all_ids, *plan.frame.repeat_from_ids)
    highest = max(max((*d.prefix_ids, *d.context_ids, *frame)) for d in plan.documents)
    if highest >= rows:
        raise InputError(
            f"{plan.description.source.folder}: the tokenizer gives id {highest}, the model has {rows} embeddings; "
            "it belongs to another model"
        )


def _check_positions(plan: Plan) -> None:
    from kvprofile.scoring.kvzip import required_positions

    limit = plan.description.max_positions
    chunk_tokens = plan.options.chunk_tokens
    for document in plan.documents:
        needed = required_positions(document, plan.frame, chunk_tokens)
        if needed > limit:
            context = len(document.context_ids)
            raise InputError(
                f"{document.name} has {context} tokens and needs {needed} positions with its repeats, but "
                f"{plan.description.position_reason}; pass --context-tokens {max(1, limit // 2 - 100)} "
                "or a smaller --chunk-tokens"
            )
