"""KVzip's chunk-based context reconstruction: token scores of one document, chunk by chunk.

The context is prefilled once. Then, for each chunk, the model reads a request to repeat it and the chunk itself over
the whole cache, and the cache is cut back. arXiv 2505.23416, section 3.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from kvprofile.budget import probe
from kvprofile.checkpoint.rehearsal import cache_argument
from kvprofile.checkpoint.states import states_of
from kvprofile.errors import InputError
from kvprofile.scoring.attention import AllLayersDone, Recorder
from kvprofile.scoring.prompts import Chunk, Frame, FramedDocument, chunks, longest_repeat
from kvprofile.scoring.reconstruction_cache import ReconstructionCache

DEFAULT_CHUNK_TOKENS = 2000
PREFILL_SLICE_TOKENS = 1024


@dataclass(frozen=True)
class ChunkScores:
    """Token scores [profiled layers, G, m] (float32) of the context positions [start, stop) of a chunk.

    ``sums``: ``probe.sums`` of each profiled layer over the tokens that were asked for, where the engine makes them.
    """

    chunk: Chunk
    token_scores: torch.Tensor
    sums: Sequence[Mapping[str, torch.Tensor]] | None = None


class Scorer:
    """Scores documents with one model, reusing one cache. Use inside ``attention.recording``.

    ``advance`` is called with the number of tokens each forward pass has read.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        recorder: Recorder,
        frame: Frame,
        *,
        document_tokens: int,
        chunk_tokens: int = DEFAULT_CHUNK_TOKENS,
        slice_tokens: int = PREFILL_SLICE_TOKENS,
        advance: Callable[[int], None] = lambda _: None,
    ) -> None:
        self.decoder = model.base_model
        self._cache_argument = cache_argument(self.decoder)
        self.device = input_device(model)
        self.dtype = str(model.dtype).removeprefix("torch.")
        self.recorder = recorder
        self.frame = frame
        self.chunk_tokens, self.slice_tokens = chunk_tokens, slice_tokens
        self.advance = advance
        repeat = longest_repeat(frame, min(chunk_tokens, document_tokens))
        window = getattr(model.config, "sliding_window", None)
        self.cache = ReconstructionCache(
            recorder.geometry.layer_types,
            capacity=document_tokens + repeat,
            window=window,
            step_tokens=max(repeat, slice_tokens),
            states=states_of(model.config),
        )

    @torch.inference_mode()
    def score(
        self, document: FramedDocument, finished: Set[int] = frozenset(), wanted: Set[int] | None = None
    ) -> Iterator[ChunkScores]:
        """Scores of the document's chunks in order: all, or those in ``wanted``, those in ``finished`` left out.

        The document's prefix and context together must not be longer than ``document_tokens``.
        """
        waiting = _waiting(document, self.frame, self.chunk_tokens, finished, wanted)
        if not waiting:
            return
        self.cache.reset()
        self.recorder.prefix_tokens = len(document.prefix_ids)
        self.recorder.chunk = None
        ids = (*document.prefix_ids, *document.context_ids)
        for start in range(0, len(ids), self.slice_tokens):
            self._forward(ids[start : start + self.slice_tokens], start)
        self.cache.keep_states()
        check_routed(self.recorder)
        for chunk in waiting:
            yield ChunkScores(chunk, self._repeat(chunk, len(ids)))

    def sums(self, document: FramedDocument, scored: ChunkScores, tokens: slice) -> Iterator[dict[str, torch.Tensor]]:
        """``probe.sums`` over some tokens of the chunk that was scored last, for each profiled layer.

        To be read before the next chunk is scored.
        """
        first = len(document.prefix_ids) + scored.chunk.start
        here = slice(first + tokens.start, first + tokens.stop)
        length = len(document.prefix_ids) + len(document.context_ids)
        for layer, scores in zip(self.recorder.geometry.profiled_layers, scored.token_scores, strict=True):
            held = self.cache.layers[layer]
            keys, values = held.keys[0, :, here], held.values[0, :, here]
            yield probe.sums(keys, values, scores[:, tokens], here.start, length)

    def _repeat(self, chunk: Chunk, length: int) -> torch.Tensor:
        prefix = self.recorder.prefix_tokens
        self.recorder.chunk = (prefix + chunk.start, prefix + chunk.stop)
        self.recorder.token_scores.clear()
        try:
            self._forward(chunk.repeat_ids, length)
            found = self.recorder.token_scores
            layers = self.recorder.geometry.profiled_layers
            broken = [layer for layer in layers if not found[layer].isfinite().all()]
            if broken:
                raise InputError(
                    f"layer {broken[0]} gives scores that are not numbers: its weights are broken, or {self.dtype} is "
                    "too small for its activations; try --dtype float32 or bfloat16"
                )
            return torch.stack([found[layer] for layer in layers])
        finally:
            self.recorder.token_scores.clear()
            self.cache.cut_back(length)

    def _forward(self, ids: tuple[int, ...], start: int) -> None:
        """Run the decoder without its LM head over ids at positions start.., up to the last layer that matters."""
        self.recorder.query_start = self.cache.past_tokens = start
        tokens = torch.tensor([ids], device=self.device)
        positions = torch.arange(start, start + len(ids), device=self.device)[None]
        with contextlib.suppress(AllLayersDone):
            held = {self._cache_argument: self.cache}
            self.decoder(input_ids=tokens, position_ids=positions, use_cache=True, **held)
        self.advance(len(ids))


def input_device(model: PreTrainedModel) -> torch.device:
    """Where ids go; accelerate keeps offloaded weights on the meta device and moves inputs itself."""
    device = model.get_input_embeddings().weight.device
    return torch.device("cpu") if device.type == "meta" else device


def check_routed(recorder: Recorder) -> None:
    """Raise InputError where a profiled layer did not call the attention function."""
    missing = sorted(recorder.profiled - recorder.layers_seen)
    if missing:
        raise InputError(
            f"layer {missing[0]} does not call transformers' attention interface; the model cannot be profiled"
        )


def forward_tokens(
    document: FramedDocument,
    frame: Frame,
    chunk_tokens: int,
    finished: Set[int] = frozenset(),
    wanted: Set[int] | None = None,
) -> int:
    """Tokens that scoring a document reads, for progress bars."""
    waiting = _waiting(document, frame, chunk_tokens, finished, wanted)
    if not waiting:
        return 0
    return len(document.prefix_ids) + len(document.context_ids) + sum(len(chunk.repeat_ids) for chunk in waiting)


def _waiting(
    document: FramedDocument, frame: Frame, chunk_tokens: int, finished: Set[int], wanted: Set[int] | None
) -> list[Chunk]:
    """The chunks still to be repeated, in order."""
    return [
        chunk
        for chunk in chunks(document, frame, chunk_tokens)
        if chunk.index not in finished and (wanted is None or chunk.index in wanted)
    ]
