"""Loss-aware head scores: how much worse a model repeats its context when heads are trimmed.

A gate between every KV head's full and trimmed attention turns trimming into a number that the loss can be
differentiated by. The loss is the mean cross entropy (nats per token) of repeating a chunk of the context, from the
inputs and over the cache of KVzip's reconstruction (arXiv 2505.23416, section 3). Gates between full and
sink-and-window attention are DuoAttention's (arXiv 2410.10819, section 3.2), which trains them; the first-order cost
of closing one is the Taylor score of Molchanov et al. (arXiv 1906.10771).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_outputs import MoeModelOutputWithPast

from kvprofile.budget.profile import Geometry
from kvprofile.budget.trim import TrimRule
from kvprofile.errors import InputError
from kvprofile.scoring import attention, kernels
from kvprofile.scoring.attention import Recorder, _check_shapes, _no_mask, _span
from kvprofile.scoring.cache import PreallocatedLayer, ReconstructionCache, SlidingLayer
from kvprofile.scoring.kernels import Part
from kvprofile.scoring.kvzip import DEFAULT_CHUNK_TOKENS, PREFILL_SLICE_TOKENS, _check_routed, _input_device
from kvprofile.scoring.prompts import Chunk, Document, Frame, chunks, longest_repeat

NAME = "kvprofile_gates"
DEFAULT_ROWS_AT_ONCE = 512
VOCABULARY_BLOCK_VALUES = 16 * 2**20
"""Most logits over the vocabulary held at once (64 MiB in float32)."""

Views = tuple[torch.Tensor, torch.Tensor]


class _GatedLayer(PreallocatedLayer):
    """A layer whose buffer holds no gradients; ``fresh`` are the newest keys and values [1, G, n, D], with theirs."""

    fresh: Views | None = None

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> Views:
        """Append values alone and remember what they came from."""
        self.fresh = (key_states, value_states)
        return super().update(key_states.detach(), value_states.detach(), *args, **kwargs)


class _GatedSlidingLayer(_GatedLayer, SlidingLayer):
    """A sliding layer that moves nothing once pinned, so that a repeat read in slices can be cut back to its start."""

    pinned = False

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> Views:
        """Append; a pinned layer has room for a whole repeat behind the window it kept."""
        if not self.pinned:
            return super().update(key_states, value_states, *args, **kwargs)
        self.fresh = (key_states, value_states)
        held, self.length = self.length - self.first, self.length + key_states.shape[-2]
        end = self.length - self.first
        self.keys[:, :, held:end] = key_states.detach()
        self.values[:, :, held:end] = value_states.detach()
        return self.keys[:, :, :end], self.values[:, :, :end]

    def pin(self) -> None:
        """Drop what no later token sees, and hold the rest where it is."""
        super().update(self.keys[:, :, :0], self.values[:, :, :0])
        self.pinned = True

    def reset(self) -> None:
        """Forget everything but keep the memory."""
        super().reset()
        self.pinned = False


@dataclass(frozen=True)
class _Sight:
    """Which keys the rows of a pass see: those before ``sink_end`` and the last ``window``, never later ones."""

    query_start: int
    key_start: int
    scale: float
    softcap: float | None
    sink_end: int = 0
    window: int | None = None

    def spans(self, first: int, stop: int) -> Iterator[tuple[int, int]]:
        """Positions [a, b) that rows at positions [first, stop) see, in blocks; none crosses the pass's first row."""
        if self.window is None:
            ends = [self.key_start, stop]
        else:
            recent = min(stop, max(self.key_start, self.sink_end, first + 1 - self.window))
            ends = [self.key_start, max(self.key_start, min(self.sink_end, stop)), recent, stop]
        for a, b in zip(ends[::2], ends[1::2], strict=True):
            for low, high in ((a, min(b, self.query_start)), (max(a, self.query_start), b)):
                for start in range(low, high, kernels.KEY_BLOCK):
                    yield start, min(start + kernels.KEY_BLOCK, high)

    def hidden(self, positions: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        """Bool [n, m]: rows at positions [n] do not see keys at places [m]."""
        rows = positions[:, None]
        later = places > rows
        if self.window is None:
            return later
        return later | ((places <= rows - self.window) & (places >= self.sink_end))


class _Attention(torch.autograd.Function):
    """Attention in memory that does not grow with rows times keys, in both directions.

    Gradients go to the queries and to the keys and values of the same pass (``fresh``); those of the context are
    constants.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        fresh_key: torch.Tensor | None,
        fresh_value: torch.Tensor | None,
        key: torch.Tensor,
        value: torch.Tensor,
        sinks: torch.Tensor | None,
        sight: _Sight,
        recorder: Recorder,
    ) -> torch.Tensor:
        """Output [1, H, n, D]; ``fresh`` [1, G, n, D] are also the last of ``key`` and ``value`` [1, G, m, D]."""
        part = kernels.merge(list(_parts(query, key, value, sight, recorder)), sinks)
        ctx.save_for_backward(query, key, value, part.output, part.lse)
        ctx.sight = sight
        return part.output

    @staticmethod
    def backward(ctx: Any, *slopes: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """The logits once more, block by block in float32, from the log-sum-exp of each row."""
        query, key, value, output, lse = ctx.saved_tensors
        sight: _Sight = ctx.sight
        heads, start, count = key.shape[1], sight.query_start, query.shape[2]
        by_query = torch.empty_like(query, dtype=torch.float32)
        by_key, by_value = (torch.zeros(1, heads, count, x.shape[-1], device=x.device) for x in (key, value))
        for first in range(0, count, kernels.ROW_BLOCK):
            rows = slice(first, min(first + kernels.ROW_BLOCK, count))
            positions = torch.arange(start + first, start + rows.stop, device=query.device)
            q, out, slope = (kernels.fold_groups(x[:, :, rows].float(), heads) for x in (query, output, slopes[0]))
            along = (slope * out).sum(-1, keepdim=True)
            normaliser = lse[:, :, rows].reshape(1, heads, -1, 1)
            total = torch.zeros_like(q)
            for low, high in sight.spans(start + first, start + rows.stop):
                span = slice(low - sight.key_start, high - sight.key_start)
                k, v = key[:, :, span].float(), value[:, :, span].float()
                logits = kernels.logits_of(q, k, sight.scale, sight.softcap)
                towards = torch.matmul(slope, v.transpose(-1, -2)).sub_(along)
                if sight.softcap is not None:
                    towards.mul_(1.0 - (logits / sight.softcap).square_())
                hidden = sight.hidden(positions, torch.arange(low, high, device=query.device))
                weights = logits.sub_(normaliser).exp_()
                weights.view(1, heads, -1, len(positions), high - low).masked_fill_(hidden, 0.0)
                if low >= start:
                    by_value[:, :, low - start : high - start] += torch.matmul(weights.transpose(-1, -2), slope)
                towards.mul_(weights)
                total += torch.matmul(towards, k)
                if low >= start:
                    by_key[:, :, low - start : high - start] += torch.matmul(towards.transpose(-1, -2), q)
            by_query[:, :, rows] = total.view(1, query.shape[1], -1, query.shape[-1])
        by_query, by_key = by_query.mul_(sight.scale), by_key.mul_(sight.scale)
        return by_query.to(query.dtype), by_key.to(key.dtype), by_value.to(value.dtype), *[None] * 5


def _parts(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, sight: _Sight, recorder: Recorder
) -> Iterator[Part]:
    """Attention to what the rows see, in parts to be merged."""
    start, scale, cap, sink_end = sight.query_start, sight.scale, sight.softcap, sight.sink_end
    if sight.window is None:
        if start:
            yield _span(recorder, query, key[:, :, :start], value[:, :, :start], scale, cap, 0, False)
        yield _span(recorder, query, key[:, :, start:], value[:, :, start:], scale, cap, start, True)
        return
    if sink_end:
        sinks = (key[:, :, :sink_end], value[:, :, :sink_end])
        yield kernels.blocked(query, *sinks, scale, query_start=start, key_start=0, softcap=cap)
    early = min(max(0, sink_end - start), query.shape[2])  # rows that are sinks themselves see no window
    if early < query.shape[2]:
        rest = (query[:, :, early:], key[:, :, sink_end:], value[:, :, sink_end:])
        key_start = sight.key_start + sink_end
        options: dict[str, Any] = {"key_start": key_start, "softcap": cap, "window": sight.window}
        part = kernels.blocked(*rest, scale, query_start=start + early, **options)
        pad = torch.nn.functional.pad
        yield Part(pad(part.output, (0, 0, early, 0)), pad(part.lse, (early, 0), value=-torch.inf))


class GatedModel:
    """A model with a gate a[l, g] between each KV head's full output o_f and its trimmed one o_s: o_s + a (o_f - o_s).

    Made by ``gating``. ``prefill`` a document, then ask for the loss of its chunks at gates [L', G], the rows being
    the profiled layers. Only rows of the repeat input are gated: the prefill is full attention for every head.
    Gradients are exact for a repeat input of at most ``rows_at_once`` + 1 tokens. A longer one is read in slices and
    earlier slices' keys count as constants.

    Memory beyond weights and one cache (T + repeat tokens): L * rows * hidden * bytes of a value for the layers'
    inputs, rows being at most ``rows_at_once``; one layer's activations over as many rows, which are recomputed when
    its gradient is due; about 5 * ROW_BLOCK * H * KEY_BLOCK * 4 bytes for blocks of attention; and 3 *
    VOCABULARY_BLOCK_VALUES * 4 bytes for blocks of logits. Nothing grows with rows * T or rows * vocabulary. For a
    14B model (48 layers, hidden size 5120, bfloat16) and 512 rows the inputs are 240 MiB.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        recorder: Recorder,
        rule: TrimRule,
        frame: Frame,
        *,
        document_tokens: int,
        chunk_tokens: int = DEFAULT_CHUNK_TOKENS,
        slice_tokens: int = PREFILL_SLICE_TOKENS,
        rows_at_once: int = DEFAULT_ROWS_AT_ONCE,
        advance: Callable[[int], None] = lambda _: None,
    ) -> None:
        if rule.block_tokens != 1:
            raise ValueError("gates know windows of tokens, not of blocks: give a rule with block_tokens=1")
        self.model, self.decoder, self.device = model, model.base_model, _input_device(model)
        self.recorder, self.geometry, self.rule, self.frame = recorder, recorder.geometry, rule, frame
        self.chunk_tokens, self.slice_tokens, self.rows_at_once = chunk_tokens, slice_tokens, rows_at_once
        self.advance = advance
        self.length = 0
        self._gates: torch.Tensor | None = None
        repeat = longest_repeat(frame, min(chunk_tokens, document_tokens))
        window, step = getattr(model.config, "sliding_window", None), max(repeat, slice_tokens)
        self.cache = ReconstructionCache(self.geometry.layer_types, document_tokens + repeat, window, step)
        self.cache.layers = [
            _GatedSlidingLayer(layer.window, step) if isinstance(layer, SlidingLayer) else _GatedLayer(layer.capacity)
            for layer in self.cache.layers
        ]

    @torch.no_grad()
    def prefill(self, document: Document) -> list[Chunk]:
        """Read a document of at most ``document_tokens`` (prefix and context); returns its chunks.

        Raises InputError where a layer cannot be gated.
        """
        ids = (*document.prefix_ids, *document.context_ids)
        self.cache.reset()
        for start in range(0, len(ids), self.slice_tokens):
            self._read(ids[start : start + self.slice_tokens], start)
        _check_routed(self.recorder)
        for layer in self.cache.layers:
            if isinstance(layer, _GatedSlidingLayer):
                layer.pin()
        self.length = len(ids)
        return list(chunks(document, self.frame, self.chunk_tokens))

    def loss(self, chunk: Chunk, gates: torch.Tensor) -> float:
        """Mean cross entropy in nats per token of a chunk of the prefilled document, at gates [L', G].

        A head whose gate is 1 computes no trimmed output, one whose gate is 0 no full one. Raises InputError where
        the loss is no number.
        """
        return self._repeat(chunk, gates.detach(), False)

    def loss_and_gradient(self, chunk: Chunk, gates: torch.Tensor) -> tuple[float, torch.Tensor]:
        """The loss as ``loss`` gives it, and its gradient [L', G] (float32, CPU) in nats per token and gate."""
        leaf = gates.detach().to(self.device, torch.float32, copy=True).requires_grad_()
        loss = self._repeat(chunk, leaf, True)
        gradient = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
        return loss, gradient.cpu() / (chunk.stop - chunk.start)

    def _repeat(self, chunk: Chunk, gates: torch.Tensor, differentiate: bool) -> float:
        """The mean loss; gradients of the sum of losses, which half precision holds better, go to ``gates.grad``."""
        ids, tokens = chunk.repeat_ids, chunk.stop - chunk.start
        asked = len(ids) - tokens - 1  # the row that predicts the chunk's first token; the last one predicts nothing
        total = 0.0
        self._gates = gates
        try:
            for first in range(0, len(ids) - 1, self.rows_at_once):
                stop = min(first + self.rows_at_once, len(ids) - 1)
                skip = max(0, asked - first)
                with torch.set_grad_enabled(differentiate and first + skip < stop):
                    rows = self._read(ids[first:stop], self.length + first)[0, skip:]
                    loss, slopes = self._nats(rows, ids[first + skip + 1 : stop + 1])
                    total += loss
                    if rows.requires_grad:
                        rows.backward(slopes)
        finally:
            self._gates = None
            self.cache.cut_back(self.length)
        if not math.isfinite(total):
            raise InputError(
                f"the loss is no number: the weights are broken, or {self.model.dtype} is too small for the model's "
                "activations; try --dtype float32 or bfloat16"
            )
        return total / tokens

    def _read(self, ids: Sequence[int], start: int) -> torch.Tensor:
        """Run the decoder over ids at positions start..; returns its last hidden states [1, n, hidden]."""
        self.recorder.query_start = start
        tokens = torch.tensor([ids], device=self.device)
        positions = torch.arange(start, start + len(ids), device=self.device)[None]
        found = self.decoder(input_ids=tokens, position_ids=positions, past_key_values=self.cache, use_cache=True)
        self.advance(len(ids))
        return found.last_hidden_state  # type: ignore[no-any-return]

    def _nats(self, hidden: torch.Tensor, targets: Sequence[int]) -> tuple[float, torch.Tensor]:
        """Sum of cross entropies of rows [n, hidden] and its gradient by them, over blocks of the vocabulary's logits.

        The model's own forward turns hidden states into logits, with whatever it scales or caps them by: only its
        decoder is stood in for.
        """
        total, slopes = 0.0, torch.zeros_like(hidden)
        step = max(1, VOCABULARY_BLOCK_VALUES // self.model.config.vocab_size)
        for first in range(0, len(targets), step):
            rows = hidden.detach()[first : first + step].requires_grad_(hidden.requires_grad)
            wanted = torch.tensor(targets[first : first + step])
            output = MoeModelOutputWithPast(last_hidden_state=rows[None])
            with _forward(self.decoder, lambda *_, output=output, **__: output):
                logits = self.model(input_ids=wanted[None].to(self.device), use_cache=False).logits[0].float()
            loss = torch.nn.functional.cross_entropy(logits, wanted.to(logits.device), reduction="sum")
            if loss.requires_grad:
                (slopes[first : first + step],) = torch.autograd.grad(loss, rows)
            total += float(loss)
        return total, slopes

    def attend(
        self,
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: object = None,
        scaling: float | None = None,
        sliding_window: int | None = None,
        softcap: float | None = None,
        s_aux: torch.Tensor | None = None,
        **_others: Any,
    ) -> tuple[torch.Tensor, None]:
        """What transformers calls: query [1, H, n, D], key and value [1, G, m, D] -> output [1, n, H, D]."""
        if attention_mask is not None:
            raise InputError("the model brings its own attention mask, which kvprofile cannot score under")
        layer, start = int(module.layer_idx), self.recorder.query_start  # type: ignore[arg-type]
        self.recorder.layers_seen.add(layer)
        _check_shapes(self.recorder, layer, query, key, sliding_window)
        held = self.cache.layers[layer]
        fresh, held.fresh = held.fresh, None
        scale = scaling if scaling is not None else query.shape[-1] ** -0.5
        group, key_start = query.shape[1] // key.shape[1], start + query.shape[2] - key.shape[2]

        def output(sight: _Sight, heads: torch.Tensor | None = None) -> torch.Tensor:
            """[1, H, n, D], zero for KV heads that are not among ``heads`` [G] (bool; None for all)."""
            if heads is None or heads.all():
                return _attention(query, *fresh, key, value, s_aux, sight, self.recorder)
            found = query.new_zeros(*query.shape[:-1], value.shape[-1])
            if heads.any():
                rows = heads.repeat_interleave(group)
                sinks = None if s_aux is None else s_aux[rows]
                some = (query[:, rows], None, None, key[:, heads], value[:, heads])
                found[:, rows] = _attention(*some, sinks, sight, self.recorder)
            return found

        full = _Sight(start, key_start, scale, softcap)
        if layer not in self.recorder.profiled:
            return output(replace(full, window=sliding_window)).transpose(1, 2), None
        if self._gates is None:
            return output(full).transpose(1, 2), None
        gates = self._gates[self.geometry.profiled_layers.index(layer)].to(query.device)
        trimmed = replace(full, sink_end=self.rule.sink_end, window=self.rule.recent_tokens)
        outputs = (output(sight, None if gates.requires_grad else gates != closed) for sight, closed in ((trimmed, 1), (full, 0)))
        by_row = gates.float().repeat_interleave(group)[None, :, None, None]
        return torch.lerp(*(x.float() for x in outputs), by_row).to(query.dtype).transpose(1, 2), None


@contextmanager
def gating(model, geometry, rule, frame, *, checkpointing=True, **options) -> Iterator[GatedModel]:
    """..."""


