"""KVzip's scores of the very contexts that are asked about: the ceiling for what a probe can know of them."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from kvprofile.budget.profile import Geometry
from kvprofile.evaluate.token_choice import ByOwnScores
from kvprofile.scoring.attention import recording
from kvprofile.scoring.prompts import Frame, FramedDocument, longest_repeat
from kvprofile.scoring.reconstruction import DEFAULT_CHUNK_TOKENS, Scorer

LEAST_CHUNK_TOKENS = 256
"""Repeated at a time where a context leaves no more of the model's positions, even if that reaches beyond them."""


def own_scores(model: PreTrainedModel, geometry: Geometry, frame: Frame, max_positions: int) -> ByOwnScores:
    """A choice by reconstruction scores, which reads every context once more, and its repeats."""

    def score(ids: tuple[int, ...]) -> tuple[int, torch.Tensor]:
        room = max_positions - len(ids) - longest_repeat(frame, 0)
        chunk_tokens = max(LEAST_CHUNK_TOKENS, min(DEFAULT_CHUNK_TOKENS, room))
        start = len(frame.prefix_ids) if ids[: len(frame.prefix_ids)] == frame.prefix_ids else 0
        document = FramedDocument("context", ids[:start], ids[start:])
        with recording(model, geometry) as recorder:
            scorer = Scorer(model, recorder, frame, document_tokens=len(ids), chunk_tokens=chunk_tokens)
            return start, torch.cat([scored.token_scores for scored in scorer.score(document)], -1)

    return ByOwnScores(score, geometry.profiled_layers)
