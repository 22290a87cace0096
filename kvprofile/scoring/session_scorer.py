"""KVzip's chunk-based context reconstruction on a running vLLM engine: token scores of one document, chunk by chunk.

The context goes in as one request (a long one as several, each of which continues the one before), each repeat as a
request that begins with the context, whose keys and values it finds in vLLM's prefix cache. vLLM caches whole blocks,
so a repeat computes the last few rows of the context again; those do not belong to the repeat and are left out. Nothing
is taken on trust: every rank says which rows it saw, and vLLM says how many tokens it had cached.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Set

import torch

from kvprofile.budget import probe
from kvprofile.capture.marks import Mark
from kvprofile.capture.merge import Captured
from kvprofile.capture.session import Session
from kvprofile.errors import InputError
from kvprofile.scoring.prompts import Chunk, Frame, FramedDocument, chunks
from kvprofile.scoring.reconstruction import ChunkScores

CONTEXT_REQUEST_TOKENS = 8192
"""How much of a context one request adds, so that long ones show how far they are."""


class SessionScorer:
    """Scores documents on an open session.

    ``advance`` is called with the number of tokens each request adds. ``evictions`` counts repeats whose context was no
    longer in the cache, ``shortcuts`` those that found their own first rows there; both were read again in full.
    """

    def __init__(
        self,
        session: Session,
        frame: Frame,
        *,
        chunk_tokens: int,
        request_tokens: int = CONTEXT_REQUEST_TOKENS,
        advance: Callable[[int], None] = lambda _: None,
    ) -> None:
        self.session, self.frame = session, frame
        self.chunk_tokens, self.request_tokens = chunk_tokens, request_tokens
        self.advance = advance
        self.evictions = self.shortcuts = 0

    def score(
        self,
        document: FramedDocument,
        salt: str,
        finished: Set[int] = frozenset(),
        probed: Callable[[Chunk], slice] = lambda _: slice(0, 0),
    ) -> Iterator[ChunkScores]:
        """Scores of the document's chunks in order, those in ``finished`` left out.

        ``probed`` names the tokens of a chunk, counted from its start, whose sums are wanted. Only requests of one
        ``salt`` share cached blocks: give each document its own.
        """
        wanted = [c for c in chunks(document, self.frame, self.chunk_tokens) if c.index not in finished]
        if not wanted:
            return
        ids = (*document.prefix_ids, *document.context_ids)
        for start in range(0, len(ids), self.request_tokens):
            read = ids[: start + self.request_tokens]
            self.session.read(read, salt=salt)
            self.advance(len(read) - start)
        for chunk in wanted:
            first, tokens = len(document.prefix_ids) + chunk.start, probed(chunk)
            here = (first + tokens.start, first + tokens.stop)
            found = self._repeat(ids, len(document.prefix_ids), chunk, salt, here)
            self.advance(len(chunk.repeat_ids))
            yield ChunkScores(chunk, self._stacked(found), self._sums(found))

    def _sums(self, found: Captured) -> list[dict[str, torch.Tensor]] | None:
        """The sums of each layer; None where ranks that share heads could not make them."""
        layers = [found.layers[layer] for layer in self.session.layers]
        made = all("gram" in layer for layer in layers)
        return [{name: layer[name] for name in probe.SUMS} for layer in layers] if made else None

    def _repeat(self, ids: tuple[int, ...], prefix: int, chunk: Chunk, salt: str, probed: tuple[int, int]) -> Captured:
        whole = (*ids, *chunk.repeat_ids)
        scored = (prefix + chunk.start, prefix + chunk.stop)
        mark = Mark(f"{salt}/{chunk.index}", len(ids), prefix, scored, probed)
        cached = self.session.read(whole, mark, salt=salt)
        found = self.session.take(mark)
        if found.missing(len(ids), len(whole)):
            self.shortcuts += 1
            self.session.read(whole, mark, salt=salt, fresh=True)
            found = self.session.take(mark)
            if found.missing(len(ids), len(whole)):
                raise InputError(f"vLLM did not compute every row of the repeat of chunk {chunk.index}")
        elif cached < len(ids) - len(ids) % self.session.block_tokens:
            self.evictions += 1  # the request has computed the evicted rows again before those that score
        return found

    def _stacked(self, found: Captured) -> torch.Tensor:
        scores = [found.layers[layer]["scores"] for layer in self.session.layers]
        broken = [layer for layer, one in zip(self.session.layers, scores, strict=True) if not one.isfinite().all()]
        if broken:
            raise InputError(
                f"layer {broken[0]} gives scores that are not numbers: its weights are broken, or the dtype is too "
                "small for its activations; try --dtype float32 or bfloat16"
            )
        return torch.stack(scores)
