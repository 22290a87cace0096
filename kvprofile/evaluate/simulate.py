"""The runtime's semantics on any Hugging Face decoder: full prefill, one trim, then decoding on what is left.

This is the oracle for the vLLM runtime and the engine of ``kvprofile evaluate``. Trimmed heads really drop their keys
and values; no mask stands in for memory. A prefilled context is kept once and shared: every branch (a question, or
several asked side by side) adds its own tokens after it, so the next question starts from the same trimmed context
without reading it again.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AttentionInterface, PreTrainedModel

from kvprofile.budget.profile import Geometry, Matrix
from kvprofile.budget.trim import TrimRule
from kvprofile.checkpoint.states import states_of
from kvprofile.errors import InputError
from kvprofile.evaluate.collecting import CollectingCache
from kvprofile.evaluate.held import Growing, Span, joined
from kvprofile.scoring import kernels
from kvprofile.scoring.attention import routed
from kvprofile.scoring.kernels import Visible
from kvprofile.scoring.reconstruction_cache import cache_argument

NAME = "kvprofile_budgeted"
PREFILL_SLICE_TOKENS = 1024


@dataclass
class HeldHeads:
    """KV heads of one layer that live under one rule, and what they hold of the context: spans shared by all branches.

    ``sees`` None stands for plain causal attention.
    """

    index: torch.Tensor
    sees: Visible | None
    context: list[Span]


_current: list[Simulation] = []


class Simulation:
    """A model whose KV heads keep what a budget gives them. Use inside :func:`simulating`.

    ``heads`` is a budget [L][G]: 1.0 keeps the whole context, 0.0 sinks and window, None a layer without a budget: one
    that slides anyway, or has no cache.
    """

    def __init__(self, model: PreTrainedModel, geometry: Geometry, heads: Matrix, rule: TrimRule) -> None:
        self.model, self.geometry, self.rule = model, geometry, rule
        self.window = getattr(model.config, "sliding_window", None)
        self.device = model.get_input_embeddings().weight.device
        self.plain_attention = AttentionInterface()["sdpa"]
        self.cache = CollectingCache(geometry.layer_types, states_of(model.config), lambda: self.length)
        self.cache_argument = cache_argument(model)
        self.length = self.prompt_tokens = 0
        self.branch: Branch | None = None
        self.fused: dict[tuple[torch.device, torch.dtype, int, int], kernels.Fused | None] = {}
        self.prefilled: list[list[Span]] = []
        self.layers: list[list[HeldHeads]] = []
        self.set_heads(heads)

    def set_heads(self, heads: Matrix) -> None:
        """Use another budget [L][G] from the next :meth:`trim` on.

        Raises ValueError for another shape, InputError for budgets other than 0, 1 and None.
        """
        geometry = self.geometry
        if len(heads) != geometry.layers or any(len(row) != geometry.kv_heads for row in heads):
            raise ValueError(f"the budget is not {geometry.layers} x {geometry.kv_heads}")
        graded = [value for row in heads for value in row if value not in (0.0, 1.0, None)]
        if graded:
            raise InputError(f"a head has budget {graded[0]:g}; the runtime knows 1 (full) and 0 (sinks and window)")
        self.heads = heads

    @torch.inference_mode()
    def prefill(self, ids: Sequence[int]) -> torch.Tensor:
        """Read a context with full attention in every head, and forget the one before. Gives its last logits [V].

        Raises ValueError for an empty one.
        """
        if not ids:
            raise ValueError("an empty context cannot be read")
        self.length, self.branch = 0, None
        self.prefilled = [[] for _ in range(self.geometry.layers)]
        self.layers = []
        self.cache.forget_states()
        logits = torch.empty(0)
        for start in range(0, len(ids), PREFILL_SLICE_TOKENS):
            piece = torch.tensor([ids[start : start + PREFILL_SLICE_TOKENS]])
            positions = torch.arange(start, start + piece.shape[1])[None]
            logits = self._forward(piece, positions, logits_to_keep=1)
            self.length += piece.shape[1]
        self.cache.keep_states()
        return logits[0, -1].float()

    def trim(self, heads: Matrix | None = None, prompt_tokens: int | None = None) -> None:
        """Keep what the budget gives every head of the prefilled context, and free the rest.

        With ``heads`` the budget changes first; the untrimmed context stays until :meth:`forget_context`, so several
        budgets can be tried on one prefill. ``prompt_tokens`` is where the prompt ended, if generated tokens were read
        with it, as those of a preempted request are. Raises ValueError where no context is held.
        """
        self.prompt_tokens = self.length if prompt_tokens is None else prompt_tokens
        if heads is not None:
            self.set_heads(heads)
        if not self.prefilled:
            raise ValueError("nothing is prefilled")
        self.layers = [self._trimmed(layer) for layer in range(self.geometry.layers)]

    def forget_context(self) -> None:
        """Free the untrimmed context: from here on only what the budget keeps is held."""
        self.prefilled = []

    def _trimmed(self, layer: int) -> list[HeldHeads]:
        spans = self.prefilled[layer]
        row = self.heads[layer]
        if not spans:  # the layer has no cache
            return []
        # layers that slide keep their own window in every head
        if row[0] is None or self._slides(layer):
            every = torch.arange(self.geometry.kv_heads)
            first = max(0, self.length - (self.window or self.length) + 1)
            return [HeldHeads(every, self._sliding, [joined(spans).cut(first, self.length)])]
        # the other layers split into full heads, which keep every token, and trimmed ones: sinks and window are copied
        groups = []
        full = torch.tensor([head for head, value in enumerate(row) if value == 1.0], dtype=torch.long)
        trimmed = torch.tensor([head for head, value in enumerate(row) if value == 0.0], dtype=torch.long)
        whole = joined(spans)
        if len(full):
            keys, values = whole.keys, whole.values
            if len(trimmed):
                keys, values = keys[:, full], values[:, full]
            groups.append(HeldHeads(full, None, [Span(keys, values, 0)]))
        if len(trimmed):
            mine = Span(whole.keys[:, trimmed], whole.values[:, trimmed], 0)
            sink_end = min(self.rule.sink_end, self.length)
            start = max(sink_end, min(self.rule.window_start(self.length, self.prompt_tokens), self.length))
            kept = [mine.cut(0, sink_end), mine.cut(start, self.length)]
            sees = self._everything_held if self.rule.anchored else self._trim_rule
            groups.append(HeldHeads(trimmed, sees, [span for span in kept if span.count]))
        return groups

    def nbytes(self) -> int:
        """Bytes of keys and values that the trimmed context holds."""
        return sum(span.nbytes() for layer in self.layers for heads in layer for span in heads.context)

    def start(self, count: int = 1) -> Branch:
        """``count`` conversations side by side after the trimmed context; earlier branches end."""
        if not self.layers:
            self.trim()
        self.branch = Branch(self, count)
        self.cache.start(count)
        return self.branch

    def _slides(self, layer: int) -> bool:
        return layer not in self.geometry.profiled_layers

    def _sliding(self, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        return (key <= query) & (key > query - int(self.window or 0))

    def _everything_held(self, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        return key <= query

    def _trim_rule(self, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        rule = self.rule
        start = torch.div(query + 1 - rule.recent_tokens, rule.block_tokens, rounding_mode="floor") * rule.block_tokens
        return (key <= query) & ((key < rule.sink_end) | (key >= start))

    def _forward(self, ids: torch.Tensor, positions: torch.Tensor, logits_to_keep: int = 0) -> torch.Tensor:
        self.positions = positions.to(self.device)
        self.lowest, self.stop = int(positions.min()), int(positions.max()) + 1
        self.cache.past_tokens = self.lowest
        result = self.model(
            input_ids=ids.to(self.device),
            position_ids=self.positions,
            use_cache=True,
            logits_to_keep=logits_to_keep,
            **{self.cache_argument: self.cache},
        )
        return result.logits  # type: ignore[no-any-return]

    def attend(
        self, module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, options: _Options
    ) -> torch.Tensor:
        """Attention of one layer: query [B, H, n, D], new key and value [B, G, n, D] -> [B, H, n, D]."""
        layer = int(module.layer_idx)  # type: ignore[arg-type]
        # prefill: every head sees everything, and what it held is kept for the trim
        if self.branch is None:
            spans = self.prefilled[layer]
            spans.append(Span(key, value, self.length))
            sees = self._sliding if self._slides(layer) and self.window else None
            if _is_plain(sees, options):
                return self._attend_plainly(module, query, joined(spans), options.scale)
            return self._merged(query, spans, sees, options, options.sinks)
        # decoding: each group of heads sees what it kept of the context and its branch's own tokens
        output: torch.Tensor | None = None
        group = query.shape[1] // key.shape[1]
        for heads, own in zip(self.layers[layer], self.branch.own[layer], strict=True):
            every = len(heads.index) == key.shape[1]
            mine = heads.index[:, None] * group + torch.arange(group)
            rows = slice(None) if every else mine.flatten().to(query.device)
            picked = slice(None) if every else heads.index.to(query.device)
            own.write(key[:, picked], value[:, picked], self.positions, self.stop)
            spans = [*heads.context, *own.spans(self.lowest, self.stop)]
            if every and self.branch.count == 1 and _is_plain(heads.sees, options):
                return self._attend_plainly(module, query, joined(spans), options.scale)
            sinks = options.sinks[rows] if options.sinks is not None else None
            found = self._merged(query[:, rows], spans, heads.sees, options, sinks)
            if every:
                return found
            output = torch.empty_like(query) if output is None else output
            output[:, rows] = found
        if output is None:
            raise ValueError(f"layer {layer} has no heads")
        return output

    def _merged(
        self,
        query: torch.Tensor,
        spans: Sequence[Span],
        sees: Visible | None,
        options: _Options,
        sinks: torch.Tensor | None,
    ) -> torch.Tensor:
        """Attention of query [B, H, n, D] to spans of keys, merged by log-sum-exp, -> [B, H, n, D].

        Shared spans that every row sees whole go through torch's fused kernel where there is one.
        """
        parts = []
        for span in spans:
            all_seen = sees is None or sees == self._everything_held
            past = all_seen and span.first + span.count <= self.lowest and span.keys.shape[0] == 1
            fused = self._fused(query, span) if past and options.softcap is None else None
            if fused is not None:
                parts.append(_side_by_side(fused, query, span, options.scale))
                continue
            parts += kernels.over_keys(
                query, span.keys, span.values, options.scale, self.positions, span.first, self.lowest, sees,
                options.softcap,
            )  # fmt: skip
        return kernels.merge(parts, sinks).output

    def _fused(self, query: torch.Tensor, span: Span) -> kernels.Fused | None:
        """The fused kernel for such tensors, chosen once for each kind."""
        group, size = query.shape[1] // span.keys.shape[1], query.shape[-1]
        what = (query.device, query.dtype, size, group)
        if span.values.shape[-1] != size:
            return None
        if what not in self.fused:
            self.fused[what] = kernels.choose_fused(*what)[0]
        return self.fused[what]

    def _attend_plainly(self, module: torch.nn.Module, query: torch.Tensor, whole: Span, scale: float) -> torch.Tensor:
        """What transformers computes for one conversation whose heads hold everything, bit for bit."""
        mask = None
        if self.lowest and query.shape[2] > 1:
            places = torch.arange(whole.count, device=query.device)
            mask = (places <= self.positions[..., None])[:, None]
        output, _ = self.plain_attention(module, query, whole.keys, whole.values, mask, scaling=scale)
        return output.transpose(1, 2)  # type: ignore[no-any-return]


class Branch:
    """Conversations after a trimmed context, each row with its own tokens."""

    def __init__(self, simulation: Simulation, count: int) -> None:
        self.simulation, self.count = simulation, count
        self.lengths = torch.full((count,), simulation.length)
        self.own = [[Growing(simulation.length) for _ in layer] for layer in simulation.layers]

    @torch.inference_mode()
    def read(self, ids: Sequence[Sequence[int]]) -> list[torch.Tensor]:
        """Read tokens as decoding steps, ``ids[b]`` of any length for row b; gives logits [len(ids[b]), V] for each.

        An empty row reads nothing. Raises ValueError where all rows are empty, or another branch was started since.
        """
        simulation = self.simulation
        if simulation.branch is not self:
            raise ValueError("this branch has ended: another one was started, or another context read")
        counts = [len(row) for row in ids]
        if len(counts) != self.count or not max(counts, default=0):
            raise ValueError(f"{self.count} rows with at least one token are needed")
        padded = torch.zeros(self.count, max(counts), dtype=torch.long)
        for row, tokens in enumerate(ids):
            padded[row, : len(tokens)] = torch.tensor(tokens, dtype=torch.long)
        positions = self.lengths[:, None] + torch.arange(padded.shape[1])
        steps = simulation.cache.steps(counts)
        pieces = [simulation._forward(padded[:, step], positions[:, step]) for step in steps]
        logits = pieces[0] if len(pieces) == 1 else torch.cat(pieces, 1)
        self.lengths = self.lengths + torch.tensor(counts)
        self._free()
        return [logits[row, :count].float() for row, count in enumerate(counts)]

    def generate(self, ids: Sequence[Sequence[int]], most: int, stop: frozenset[int]) -> list[list[int]]:
        """Greedy answers to ``ids``, at most ``most`` tokens each, ending before an id of ``stop``."""
        answers: list[list[int]] = [[] for _ in ids]
        done = [False] * self.count
        pending: list[Sequence[int]] = list(ids)
        for _ in range(most):
            for row, logits in enumerate(self.read(pending)):
                if done[row]:
                    continue
                token = int(logits[-1].argmax())
                done[row] = token in stop
                pending[row] = () if done[row] else (token,)
                if not done[row]:
                    answers[row].append(token)
            if all(done):
                break
        return answers

    def nbytes(self) -> int:
        """Bytes that the rows hold in addition to the shared context."""
        return sum(own.nbytes() for layer in self.own for own in layer)

    def _free(self) -> None:
        """Drop own tokens that have left every row's window; where the context is shorter than the sinks, keep them."""
        simulation = self.simulation
        if simulation.length < simulation.rule.sink_end:
            return
        lowest = int(self.lengths.min())
        for layer, groups in zip(simulation.layers, self.own, strict=True):
            for heads, own in zip(layer, groups, strict=True):
                if heads.sees == simulation._trim_rule:
                    own.drop_below(simulation.rule.window_start(lowest, simulation.prompt_tokens))
                elif heads.sees == simulation._sliding and simulation.window:
                    own.drop_below(lowest - simulation.window + 1)


@dataclass(frozen=True)
class _Options:
    """What a layer asks of attention besides queries, keys and values."""

    scale: float
    softcap: float | None
    sinks: torch.Tensor | None


@contextmanager
def simulating(model: PreTrainedModel, geometry: Geometry, heads: Matrix, rule: TrimRule) -> Iterator[Simulation]:
    """Route a model's attention through a simulation, and put everything back afterwards.

    Not re-entrant, and one model at a time, because transformers' registry is global: raises RuntimeError for another.
    """
    if _current:
        raise RuntimeError("a model is being simulated already in this process")
    simulation = Simulation(model, geometry, heads, rule)
    _current.append(simulation)
    try:
        with routed(model, NAME, _attention):
            yield simulation
    finally:
        _current.clear()


def _attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: object = None,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **_others: Any,
) -> tuple[torch.Tensor, None]:
    """The signature of transformers' attention functions."""
    if attention_mask is not None:
        raise InputError("the model brings its own attention mask, which kvprofile cannot simulate under")
    options = _Options(scaling if scaling is not None else query.shape[-1] ** -0.5, softcap, s_aux)
    output = _current[0].attend(module, query, key, value, options)
    return output.transpose(1, 2).contiguous(), None


def _is_plain(sees: Visible | None, options: _Options) -> bool:
    return sees is None and options.softcap is None and options.sinks is None


def _side_by_side(fused: kernels.Fused, query: torch.Tensor, span: Span, scale: float) -> kernels.Part:
    """All of a span for all branches: their rows [B, H, n, D] become rows of one sequence."""
    batch, heads, count, size = query.shape
    flat = query.transpose(0, 1).reshape(1, heads, batch * count, size)
    part = fused(flat, span.keys, span.values, scale, False)
    output = part.output.view(heads, batch, count, -1).transpose(0, 1)
    return kernels.Part(output, part.lse.view(heads, batch, count).transpose(0, 1))
