"""``capture_prompt``: what the cache of a prompt is like in a running ``vllm.LLM``, for people who want to look."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from kvprofile.capture.marks import Mark
from kvprofile.capture.session import Session
from kvprofile.errors import InputError
from kvprofile.scoring.aggregate import HeadStatistics
from kvprofile.scoring.prompts import (
    BARE_PREFIX_TOKENS,
    FramedDocument,
    chat_frame,
    encode,
    frame_document,
    required_positions,
)
from kvprofile.scoring.reconstruction import DEFAULT_CHUNK_TOKENS
from kvprofile.scoring.session_scorer import SessionScorer

SUMMARIES = tuple(
    f"{kind}_{name}" for kind in ("key", "value") for name in ("mean", "norm_mean", "norm_std", "norm_min", "norm_max")
)


@dataclass(frozen=True)
class PromptCapture:
    """One prompt after its prefill. L' are the layers with full attention, whose indices ``layers`` holds.

    ``summaries`` has, for keys (as cached, rotated) and values: ``*_mean`` [L', G, D], the mean vector over all tokens
    of the prompt, and ``*_norm_mean``, ``_std``, ``_min``, ``_max`` [L', G] of their norms. ``token_scores`` [L', G, T]
    are those of ``kvprofile score`` for the tokens after the first ``prefix_tokens``; None where not asked for.
    """

    prompt_tokens: int
    prefix_tokens: int
    layers: tuple[int, ...]
    summaries: dict[str, torch.Tensor]
    token_scores: torch.Tensor | None

    def statistics(self) -> HeadStatistics:
        """Maximum, mean and quantile of the token scores for each head. Raises ValueError without scores."""
        if self.token_scores is None:
            raise ValueError("this prompt was captured without scores")
        return HeadStatistics.of(self.token_scores)


def capture_prompt(
    llm: Any,
    prompt: str | Sequence[int],
    *,
    scores: bool = True,
    chunk_tokens: int = DEFAULT_CHUNK_TOKENS,
) -> PromptCapture:
    """Prefill a prompt on ``llm`` and look at its cache; with ``scores`` let the model repeat it, as profiling does.

    ``llm`` is a ``vllm.LLM`` started with ``kvprofile.capture.ENGINE_ARGUMENTS`` added to its usual arguments, its
    prefix cache on and nothing else running on it meanwhile. A text is put into the chat template; ids are taken as
    they are, the first four of them as prefix. Raises InputError where the engine cannot be watched or the prompt
    does not fit.
    """
    document, frame = _framed(llm, prompt)
    ids = (*document.prefix_ids, *document.context_ids)
    limit = llm.llm_engine.vllm_config.model_config.max_model_len
    needed = (required_positions(document, frame, chunk_tokens) if scores else len(ids)) + 1
    if needed > limit:
        raise InputError(f"the prompt has {len(ids)} tokens and needs {needed} positions, max_model_len is {limit}")
    salt = f"kvprofile-{uuid.uuid4().hex}"  # an earlier prompt's blocks would hide rows that must be computed
    with Session(llm) as session:
        mark = Mark(f"{salt}/summary", len(ids))
        session.read(ids, mark, salt=salt)
        layers = session.take(mark).layers
        summaries = {name: torch.stack([layers[layer][name] for layer in session.layers]) for name in SUMMARIES}
        token_scores = None
        if scores:
            scorer = SessionScorer(session, frame, chunk_tokens=chunk_tokens)
            token_scores = torch.cat([scored.token_scores for scored in scorer.score(document, salt)], -1)
        return PromptCapture(len(ids), len(document.prefix_ids), session.layers, summaries, token_scores)


def _framed(llm: Any, prompt: str | Sequence[int]) -> tuple[FramedDocument, Any]:
    """The prompt as a document in the frame of the engine's tokenizer."""
    try:
        tokenizer = llm.get_tokenizer()
    except ValueError as error:
        raise InputError("the engine has no tokenizer; start it without skip_tokenizer_init") from error
    frame = chat_frame(tokenizer)
    if isinstance(prompt, str):
        document = frame_document("prompt", encode(tokenizer, prompt), frame)
    else:
        document = FramedDocument("prompt", tuple(prompt[:BARE_PREFIX_TOKENS]), tuple(prompt[BARE_PREFIX_TOKENS:]))
    if not document.context_ids:
        raise InputError("the prompt has no token after its prefix; give a longer one")
    return document, frame
