"""KVzip's scores of the very contexts that are asked about: the ceiling for what a probe can know of them."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from kvprofile.budget.profile import Geometry
from kvprofile.errors import InputError
from kvprofile.evaluate.token_choice import ByOwnScores
from kvprofile.scoring.attention import recording
from kvprofile.scoring.prompts import Frame, FramedDocument, longest_repeat
from kvprofile.scoring.reconstruction import DEFAULT_CHUNK_TOKENS, Scorer

LEAST_CHUNK_TOKENS = 256
"""Repeated at a time at least, where the context has so many."""


def chunk_tokens(frame: Frame, max_positions: int, context_tokens: int) -> int:
    """Tokens of a context, as long as that with its prefix, that are repeated at a time after it.

    Raises InputError where the model's positions leave room for fewer than LEAST_CHUNK_TOKENS, or than the context has.
    """
    room = max_positions - context_tokens - longest_repeat(frame, 0)
    least = min(LEAST_CHUNK_TOKENS, context_tokens)
    if room < least:
        raise InputError(
            f"--own-scores repeats each context after itself, at least {least} tokens at a time, and a context of "
            f"{context_tokens:,} tokens leaves {max(0, room)} of {max_positions:,} positions; ask about shorter "
            "contexts, or leave it out"
        )
    return min(DEFAULT_CHUNK_TOKENS, room)


def own_scores(model: PreTrainedModel, geometry: Geometry, frame: Frame, max_positions: int) -> ByOwnScores:
    """A choice by reconstruction scores, which reads every context once more, and its repeats.

    Raises InputError as ``chunk_tokens``, when it reads.
    """

    def score(ids: tuple[int, ...]) -> tuple[int, torch.Tensor]:
        repeated = chunk_tokens(frame, max_positions, len(ids))
        start = len(frame.prefix_ids) if ids[: len(frame.prefix_ids)] == frame.prefix_ids else 0
        document = FramedDocument("context", ids[:start], ids[start:])
        with recording(model, geometry) as recorder:
            scorer = Scorer(model, recorder, frame, document_tokens=len(ids), chunk_tokens=repeated)
            return start, torch.cat([scored.token_scores for scored in scorer.score(document)], -1)

    return ByOwnScores(score, geometry.profiled_layers)
