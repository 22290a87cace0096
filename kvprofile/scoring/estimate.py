"""What a run would cost, before weights load: products counted, bytes by formula, and the time they cannot beat."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from kvprofile.budget.dtypes import MODEL_DTYPES
from kvprofile.budget.probe import sums_bytes
from kvprofile.checkpoint import Placement, weight_bytes_in
from kvprofile.scoring.attention import DEVICE_LOGIT_BLOCK_VALUES
from kvprofile.scoring.prompts import chunks, longest_repeat
from kvprofile.scoring.reconstruction import PREFILL_SLICE_TOKENS
from kvprofile.scoring.work import DecoderShape, Repeat, Work, count, matrix_rate

if TYPE_CHECKING:
    from kvprofile.scoring.plan import ScoringPlan


@dataclass(frozen=True)
class RunEstimate:
    """Of one run. ``least_seconds`` is the count over the machine's rate on large matrices: no run is faster."""

    documents: int
    context_tokens: int
    tokens_read: int
    prefill_multiply_adds: int
    scoring_multiply_adds: int
    multiply_adds_per_second: float
    least_seconds: float
    weight_bytes: int
    cache_bytes: int
    working_bytes: int
    probe_bytes: int
    device: str
    dtype: str

    def payload(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self)


def estimate(plan: ScoringPlan, placement: Placement, rate: Callable[[str, str], float] = matrix_rate) -> RunEstimate:
    """The estimate of a plan placed somewhere. ``rate`` gives multiply-adds a second for a device and a dtype.

    Documents that early stopping would leave out are counted.
    """
    options, geometry = plan.options, plan.description.geometry
    shape = DecoderShape.of(plan.description.config, geometry)
    work, read = Work(), 0
    for index in plan.own:
        document = plan.documents[index]
        wanted = plan.wanted(index)
        repeats = [
            Repeat.of(document, chunk, sparse_rows=options.effort.sparse_rows)
            for chunk in chunks(document, plan.frame, options.chunk_tokens)
            if chunk.index in wanted
        ]
        prefix, context = len(document.prefix_ids), len(document.context_ids)
        work += count(shape, prefix, context, repeats)
        read += prefix + context + sum(repeat.rows for repeat in repeats)
    speed = rate(placement.device, placement.dtype)
    value_bytes = MODEL_DTYPES[placement.dtype]
    longest = longest_repeat(plan.frame, min(options.chunk_tokens, plan.document_tokens))
    held = geometry.values_per_token * (plan.document_tokens + longest)
    return RunEstimate(
        documents=len(plan.own),
        context_tokens=sum(len(plan.documents[index].context_ids) for index in plan.own),
        tokens_read=read,
        prefill_multiply_adds=work.prefill,
        scoring_multiply_adds=work.scoring,
        multiply_adds_per_second=speed,
        least_seconds=(work.prefill + work.scoring) / speed,
        weight_bytes=weight_bytes_in(plan.description, placement.dtype),
        cache_bytes=held * value_bytes,
        working_bytes=_working_bytes(shape, max(longest, PREFILL_SLICE_TOKENS), value_bytes),
        probe_bytes=sums_bytes(geometry) if plan.has_middle else 0,
        device=placement.device,
        dtype=placement.dtype,
    )


def _working_bytes(shape: DecoderShape, rows: int, value_bytes: int) -> int:
    """Rows of one layer: residual, norm, queries, outputs and the MLP's three; two outputs in float32; logits."""
    heads = shape.geometry.attention_heads * shape.geometry.head_size
    inner = shape.mlp // (3 * shape.width)
    return rows * ((3 * shape.width + 2 * heads + 3 * inner) * value_bytes + 2 * heads * 4) + (
        4 * DEVICE_LOGIT_BLOCK_VALUES
    )
