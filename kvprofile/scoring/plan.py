"""What a profiling run will do, before weights load: options, documents as ids, every check that needs no weights."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from kvprofile.budget.profile import DEFAULT_RECENT_TOKENS, DEFAULT_SINK_TOKENS, CorpusRecord
from kvprofile.checkpoint import Description
from kvprofile.corpus.sources import Corpus, cut
from kvprofile.errors import InputError, plain
from kvprofile.scoring.effort import EXACT, Effort
from kvprofile.scoring.methods import METHODS
from kvprofile.scoring.prompts import (
    OPEN_THOUGHT_NOTE,
    Frame,
    FramedDocument,
    chat_frame,
    encode,
    frame_document,
    most_context_tokens,
    required_positions,
)
from kvprofile.scoring.shard import Shard

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MOST_TOKENS = 1_000_000
"""Most sinks or recent tokens that a budget file may ask for."""


@dataclass(frozen=True)
class ScoringOptions:
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
        if METHODS[self.method].weighs and not self.effort.exact:
            raise InputError(f"--fast has no shortcut for --method {self.method}, which ranks by maximum")


@dataclass(frozen=True)
class ScoringPlan:
    """A run that has passed every check that needs no weights. ``notes`` are what its user should know of it.

    With a ``shard``, this process scores only some of the documents; all of them are planned.
    """

    description: Description
    tokenizer: PreTrainedTokenizerBase
    frame: Frame
    documents: tuple[FramedDocument, ...]
    corpora: tuple[CorpusRecord, ...]
    options: ScoringOptions
    notes: tuple[str, ...] = ()
    shard: Shard | None = None

    @property
    def own(self) -> range:
        """Numbers of the documents that this process scores."""
        count = len(self.documents)
        return self.shard.documents(count) if self.shard else range(count)

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

    def middle(self, document: int, start: int = 0, stop: int | None = None) -> slice:
        """Which of a document's context tokens [start, stop), counted from start, lie between sinks and window."""
        found = self.documents[document]
        length = len(found.context_ids)
        last = length if stop is None else stop
        first = max(start, self.options.sink_tokens - len(found.prefix_ids))
        end = min(last, length - self.options.recent_tokens)
        return slice(min(first, last) - start, max(min(first, last), end) - start)

    @property
    def has_middle(self) -> bool:
        """Whether a document has tokens between sinks and window, so that an exact run makes graded budgets."""
        if not self.options.effort.exact:
            return False
        found = (self.middle(index) for index in range(len(self.documents)))
        return any(middle.stop > middle.start for middle in found)

    @property
    def positions(self) -> int:
        """Positions that the longest forward pass reaches."""
        return max(required_positions(d, self.frame, self.options.chunk_tokens) for d in self.documents)


def plan(
    description: Description, tokenizer: PreTrainedTokenizerBase, corpora: Iterable[Corpus], options: ScoringOptions
) -> ScoringPlan:
    """Tokenise and check. Documents too long for the model are cut, unless the user asked for a length.

    Raises InputError for short corpora, a foreign tokenizer, or contexts of the length asked for that do not fit.
    """
    frame = chat_frame(tokenizer)
    documents: list[FramedDocument] = []
    records: list[CorpusRecord] = []
    cut_documents: list[FramedDocument] = []
    for corpus in corpora:
        whole = [
            frame_document(f"{corpus.name}/{name}", ids, frame)
            for name, ids in cut(corpus, lambda text: encode(tokenizer, text), options.context_tokens)
        ]
        short = [document.name for document in whole if not document.context_ids]
        if short:
            raise InputError(f"{short[0]} has no token left after the prefix; give a longer document")
        found = whole
        if options.context_tokens is None:
            found = [_fitting(document, frame, options.chunk_tokens, description.max_positions) for document in whole]
        shortened = [after for before, after in zip(whole, found, strict=True) if after is not before]
        records.append(
            CorpusRecord(
                name=plain(corpus.name),
                sha256=corpus.sha256(),
                documents=len(found),
                tokens=sum(len(document.context_ids) for document in found),
                cut_to_tokens=len(shortened[0].context_ids) if shortened else None,
            )
        )
        documents += found
        cut_documents += shortened
    notes = [*description.notes, *([OPEN_THOUGHT_NOTE] if frame.leaves_thought_open else [])]
    if cut_documents:
        notes.append(_cut_note(cut_documents, description.position_reason))
    made = ScoringPlan(description, tokenizer, frame, tuple(documents), tuple(records), options, tuple(notes))
    _check_ids(made)
    _check_positions(made)
    return made


def _fitting(document: FramedDocument, frame: Frame, chunk_tokens: int, positions: int) -> FramedDocument:
    """The document itself where it fits with its repeats, else its beginning; one position stays free, for vLLM."""
    if required_positions(document, frame, chunk_tokens) <= positions:
        return document
    most = most_context_tokens(frame, len(document.prefix_ids), chunk_tokens, positions - 1)
    return replace(document, context_ids=document.context_ids[:most]) if most >= 1 else document


def _cut_note(cut_documents: list[FramedDocument], reason: str) -> str:
    names = ", ".join(document.name for document in cut_documents[:3])
    more = f" and {len(cut_documents) - 3} more" if len(cut_documents) > 3 else ""
    tokens = len(cut_documents[0].context_ids)
    return f"cut to the first {tokens:,} tokens, because {reason}: {names}{more}"


def _check_ids(plan: ScoringPlan) -> None:
    rows = plan.description.vocabulary_rows
    frame = (*plan.frame.suffix_ids, *plan.frame.repeat_all_ids, *plan.frame.repeat_from_ids)
    highest = max(max((*d.prefix_ids, *d.context_ids, *frame)) for d in plan.documents)
    if highest >= rows:
        raise InputError(
            f"{plan.description.source.path}: the tokenizer gives id {highest}, the model has {rows} embeddings; "
            "it belongs to another model"
        )


def _check_positions(plan: ScoringPlan) -> None:
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
