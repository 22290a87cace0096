"""The default engine: transformers' own model in this process, its attention routed through ``scoring.attention``."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from kvprofile.budget.trim import SLIDING, TrimRule
from kvprofile.checkpoint import Placement, load_model
from kvprofile.progress import Progress
from kvprofile.scoring.attention import Recorder, recording
from kvprofile.scoring.chunk_store import ChunkStore
from kvprofile.scoring.contribution import watching
from kvprofile.scoring.gates import GatedModel, ablation_scores, gate_scores, gating
from kvprofile.scoring.kernels import choose_fused
from kvprofile.scoring.methods import GATE_STEPS, METHODS, repeats_read
from kvprofile.scoring.plan import ScoringPlan
from kvprofile.scoring.prompts import FramedDocument, chunks
from kvprofile.scoring.reconstruction import Scorer, forward_tokens
from kvprofile.scoring.stopping import FEWEST_PIECES, Stopping

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class HfEngine:
    """A model loaded as ``placement`` says. Raises InputError where weights do not load."""

    placement: Placement
    name = "hf"

    @property
    def dtype(self) -> str:
        """Of weights and activations, and what they were multiplied out from."""
        return self.placement.weights

    @property
    def device(self) -> str:
        """Its kind: cpu, cuda."""
        return self.placement.device.partition(":")[0]

    @property
    def reasons(self) -> tuple[str, ...]:
        """Its choices, each with its reason."""
        return self.placement.reasons

    def facts(self) -> dict[str, object]:
        """What scores depend on besides the plan."""
        return {"dtype": self.placement.dtype, "device": self.placement.device}

    def score(self, plan: ScoringPlan, store: ChunkStore, progress: Progress, keep_token_scores: bool) -> str:
        """Score what is not finished yet; returns the attention kernel used, with the reason."""
        chunk_tokens = plan.options.chunk_tokens
        work = [
            forward_tokens(plan.documents[i], plan.frame, chunk_tokens, store.finished(i), plan.wanted(i))
            for i in plan.own
        ]
        work += [_loss_tokens(plan, plan.documents[i]) for i in plan.own if store.loss(i) is None]
        loss_aware = METHODS[plan.options.method].loss_aware
        model = load_model(plan.description, self.placement, needs_head=loss_aware)
        progress.start(sum(work))
        sparse_rows = plan.options.effort.sparse_rows
        geometry = plan.description.geometry
        weighs = METHODS[plan.options.method].weighs
        with (
            watching(model, geometry) if weighs else nullcontext() as contributions,
            recording(model, geometry, sparse_rows=sparse_rows, contributions=contributions) as recorder,
        ):
            scorer = Scorer(
                model,
                recorder,
                plan.frame,
                document_tokens=plan.document_tokens,
                chunk_tokens=chunk_tokens,
                advance=progress.advance,
            )
            if _score_chunks(plan, scorer, store, keep_token_scores):
                progress.say("the budgets have settled: stopping before the end of the corpora")
            attention = _kernel(model, recorder)
        if loss_aware:
            _score_losses(plan, model, store, progress)
        return attention


def _score_chunks(plan: ScoringPlan, scorer: Scorer, store: ChunkStore, keep_token_scores: bool) -> bool:
    """Score the chunks that are wanted; returns whether it stopped early.

    Where the run may stop early, finished chunks of an interrupted run are looked at again in the same order, so it
    stops where an undisturbed run does.
    """
    options = plan.options
    stopping = Stopping(METHODS[options.method].statistic, options.seed) if options.effort.stop_early else None
    by_document = len(plan.documents) >= FEWEST_PIECES
    for index in options.effort.order(len(plan.documents), options.seed):
        if index not in plan.own:
            continue
        done = sorted(store.finished(index))
        if stopping and not by_document and any(stopping.add(store.chunk_statistics(index, chunk)) for chunk in done):
            return True
        for scored in scorer.score(plan.documents[index], set(done), plan.wanted(index)):
            middle = plan.middle(index, scored.chunk.start, scored.chunk.stop)
            sums = scorer.sums(plan.documents[index], scored, middle) if plan.has_middle else None
            store.save(index, scored.chunk.index, scored.token_scores, keep_token_scores, middle, sums)
            if stopping and not by_document and stopping.add(store.chunk_statistics(index, scored.chunk.index)):
                return True
        if stopping and by_document and stopping.add(store.statistics(index)):
            return True
    return False


def _score_losses(plan: ScoringPlan, model: PreTrainedModel, store: ChunkStore, progress: Progress) -> None:
    """Loss-aware scores of every document that has none yet."""
    options = plan.options
    rule = TrimRule(options.sink_tokens, options.recent_tokens, block_tokens=1, window=SLIDING)
    sizes: dict[str, Any] = {"document_tokens": plan.document_tokens, "chunk_tokens": options.chunk_tokens}
    with gating(model, plan.description.geometry, rule, plan.frame, advance=progress.advance, **sizes) as gated:
        for index in plan.own:
            if store.loss(index) is None:
                store.save_loss(index, _loss_scores(options.method, gated, plan.documents[index]))


def _loss_scores(method: str, gated: GatedModel, document: FramedDocument) -> torch.Tensor:
    """Loss-aware scores [L', G] of a document, nats per token. Raises KeyError for a method that is not loss-aware."""
    if method == "gate":
        return gate_scores(gated, [document], GATE_STEPS)
    return {"ablation": ablation_scores}[method](gated, [document])


def _loss_tokens(plan: ScoringPlan, document: FramedDocument) -> int:
    """Tokens that the loss-aware part of a method reads of a document."""
    times = repeats_read(plan.options.method, plan.description.geometry)
    if not times:
        return 0
    repeats = sum(len(chunk.repeat_ids) - 1 for chunk in chunks(document, plan.frame, plan.options.chunk_tokens))
    return len(document.prefix_ids) + len(document.context_ids) + times * repeats


def _kernel(model: PreTrainedModel, recorder: Recorder) -> str:
    """The attention kernel of the run, the same whether it was resumed or not."""
    if getattr(model.config, "attn_logit_softcapping", None):
        return "plain products: the model caps its logits"
    geometry = recorder.geometry
    parameter = next(model.parameters())
    group = geometry.attention_heads // geometry.kv_heads
    device = parameter.device if parameter.device.type != "meta" else torch.device("cpu")
    return choose_fused(device, parameter.dtype, geometry.head_size, group)[1]
