"""The runtime's semantics on any Hugging Face decoder: full prefill, one trim, then decoding on what is left.

This is the oracle for the vLLM runtime and the engine of ``kvprofile evaluate``. Trimmed heads really drop their keys
and values; no mask stands in for memory. A prefilled context is kept once and shared: every branch (a question, or
several asked side by side) adds its own tokens after it, so the next question starts from the same trimmed context
without reading it again. Branches of several budgets run side by side too: what heads keep of a context is the same for
all budgets that treat them alike, so the model's large products are made once for all rows.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AttentionInterface, PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin

from kvprofile.budget.profile import Geometry, Matrix
from kvprofile.budget.trim import TrimRule
from kvprofile.errors import InputError
from kvprofile.evaluate.held import Growing, Span, joined
from kvprofile.scoring import kernels
from kvprofile.scoring.attention import routed
from kvprofile.scoring.kernels import Visible
from kvprofile.scoring.reconstruction_cache import cache_argument

NAME = "kvprofile_budgeted"
PREFILL_SLICE_TOKENS = 1024
MASKED_TOKENS = 256
"""Tokens of its own up to which a branch masks what a row cannot see, which costs less than two parts to merge."""

_DENSE = 0.8
"""Rows that have ended are dropped where no more than this share of the rows still writes."""


@dataclass
class HeldHeads:
    """KV heads of one layer that live under one rule, and what they hold of the context: spans shared by all branches.

    ``index`` and ``queries`` are their numbers and those of their query heads. ``sees`` None stands for plain causal
    attention. ``budgets`` are the numbers of those, of several side by side,
    under which the heads live so; None for all.
    """

    index: torch.Tensor
    queries: torch.Tensor
    sees: Visible | None
    context: list[Span]
    budgets: tuple[int, ...] | None = None


class _Collecting(CacheLayerMixin):  # type: ignore[misc]
    """Hands new keys and values to the attention function unchanged; what is kept is the simulation's business."""

    is_sliding = False
    is_croppable = False

    def __init__(self, owner: Simulation) -> None:
        super().__init__()
        self.owner = owner

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Nothing is allocated here."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_args: Any, **_kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The new keys and values."""
        return key_states, value_states

    def get_seq_length(self) -> int:
        """Tokens before the current ones."""
        return self.owner.length

    def get_max_length(self) -> int:
        """No bound of its own."""
        return -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(number of keys, position of the first); masks are never built from it."""
        return self.owner.length + query_length, 0


_current: list[Simulation] = []


class Simulation:
    """A model whose KV heads keep what a budget gives them. Use inside :func:`simulating`.

    ``heads`` is a budget [L][G]: 1.0 keeps the whole context, 0.0 sinks and window, None a layer that slides anyway.
    """

    def __init__(self, model: PreTrainedModel, geometry: Geometry, heads: Matrix, rule: TrimRule) -> None:
        self.model, self.geometry, self.rule = model, geometry, rule
        self.window = getattr(model.config, "sliding_window", None)
        self.device = model.get_input_embeddings().weight.device
        self.plain_attention = AttentionInterface()["sdpa"]
        self.cache = Cache(layers=[_Collecting(self) for _ in range(geometry.layers)])
        self.cache_argument = cache_argument(model)
        self.length = 0
        self.branch: Branch | None = None
        self.fused: dict[tuple[torch.device, torch.dtype, int, int], kernels.Fused | None] = {}
        self.prefilled: list[list[Span]] = []
        self.layers: list[list[HeldHeads]] = []
        self.budgets = 1
        self.set_heads(heads)

    def set_heads(self, heads: Matrix) -> None:
        """Use another budget [L][G] from the next :meth:`trim` on.

        Raises ValueError for another shape, InputError for budgets other than 0, 1 and None.
        """
        self._check(heads)
        self.heads = heads

    def _check(self, heads: Matrix) -> None:
        geometry = self.geometry
        if len(heads) != geometry.layers or any(len(row) != geometry.kv_heads for row in heads):
            raise ValueError(f"the budget is not {geometry.layers} x {geometry.kv_heads}")
        graded = [value for row in heads for value in row if value not in (0.0, 1.0, None)]
        if graded:
            raise InputError(f"a head has budget {graded[0]:g}; the runtime knows 1 (full) and 0 (sinks and window)")

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
        logits = torch.empty(0)
        for start in range(0, len(ids), PREFILL_SLICE_TOKENS):
            piece = torch.tensor([ids[start : start + PREFILL_SLICE_TOKENS]])
            positions = torch.arange(start, start + piece.shape[1])[None]
            logits = self._forward(piece, positions, logits_to_keep=1)
            self.length += piece.shape[1]
        return logits[0, -1].float()

    def trim(self, heads: Matrix | None = None) -> None:
        """Keep what the budget gives every head of the prefilled context, and free the rest.

        With ``heads`` the budget changes first; the untrimmed context stays until :meth:`forget_context`, so several
        budgets can be tried on one prefill. Raises ValueError where none is held.
        """
        if heads is not None:
            self.set_heads(heads)
        self.trim_each([self.heads])

    def trim_each(self, budgets: Sequence[Matrix]) -> None:
        """Keep what each of several budgets gives every head, for branches that run under all of them side by side.

        Raises ValueError where no context is held, and as :meth:`set_heads`.
        """
        for heads in budgets:
            self._check(heads)
        if not self.prefilled:
            raise ValueError("nothing is prefilled")
        self.budgets = len(budgets)
        self.layers = [
            self._trimmed(layer, [heads[layer] for heads in budgets]) for layer in range(self.geometry.layers)
        ]

    def forget_context(self) -> None:
        """Free the untrimmed context: from here on only what the budget keeps is held."""
        self.prefilled = []

    def _trimmed(self, layer: int, rows: Sequence[Sequence[float | None]]) -> list[HeldHeads]:
        """What a layer's heads keep, ``rows`` being what each budget gives them."""
        whole = joined(self.prefilled[layer])
        # layers that slide keep their own window in every head
        if rows[0][0] is None or self._slides(layer):
            every = list(range(self.geometry.kv_heads))
            first = max(0, self.length - (self.window or self.length) + 1)
            return [HeldHeads(*self._numbers(every), self._sliding, [whole.cut(first, self.length)])]
        # in the others, heads that are full under the same budgets stay together: first as full heads, then as trimmed
        alike: dict[tuple[bool, ...], list[int]] = {}
        for head in range(self.geometry.kv_heads):
            alike.setdefault(tuple(row[head] == 1.0 for row in rows), []).append(head)
        groups = []
        for full in (True, False):
            for pattern, heads in alike.items():
                budgets = tuple(number for number, is_full in enumerate(pattern) if is_full == full)
                if budgets:
                    index, queries = self._numbers(heads)
                    sees, under = None if full else self._trim_rule, None if len(budgets) == len(rows) else budgets
                    groups.append(HeldHeads(index, queries, sees, self._kept(whole, index, full), under))
        return groups

    def _numbers(self, heads: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """The numbers of KV heads and of their query heads, on the model's device."""
        group = self.geometry.attention_heads // self.geometry.kv_heads
        index = torch.tensor(heads, dtype=torch.long)
        queries = (index[:, None] * group + torch.arange(group)).flatten()
        return index.to(self.device), queries.to(self.device)

    def _kept(self, whole: Span, heads: torch.Tensor, full: bool) -> list[Span]:
        """What heads keep of a context: every token or, copied, sinks and window."""
        if full and len(heads) == self.geometry.kv_heads:
            return [whole]
        mine = Span(whole.keys[:, heads], whole.values[:, heads], 0)
        if full:
            return [mine]
        sink_end = min(self.rule.sink_end, self.length)
        start = max(sink_end, min(self.rule.window_start(self.length), self.length))
        return [span for span in (mine.cut(0, sink_end), mine.cut(start, self.length)) if span.count]

    def nbytes(self, budget: int = 0) -> int:
        """Bytes of keys and values that the trimmed context holds under a budget, by its number."""
        return sum(
            span.nbytes()
            for layer in self.layers
            for heads in layer
            if heads.budgets is None or budget in heads.budgets
            for span in heads.context
        )

    def start(self, count: int = 1, whole: bool = False) -> Branch:
        """``count`` conversations side by side after the trimmed context; earlier branches end.

        Of several budgets each has ``count`` rows, the first budget's first. ``whole`` branches keep tokens that no
        window holds any more, so that :meth:`Branch.fork` can go back.
        """
        if not self.layers:
            self.trim()
        self.branch = Branch(self, torch.arange(self.budgets).repeat_interleave(count), whole)
        return self.branch

    def _slides(self, layer: int) -> bool:
        return layer not in self.geometry.profiled_layers

    def _sliding(self, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        return (key <= query) & (key > query - int(self.window or 0))

    def _trim_rule(self, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        rule = self.rule
        start = torch.div(query + 1 - rule.recent_tokens, rule.block_tokens, rounding_mode="floor") * rule.block_tokens
        return (key <= query) & ((key < rule.sink_end) | (key >= start))

    def _forward(self, ids: torch.Tensor, positions: torch.Tensor, logits_to_keep: int = 0) -> torch.Tensor:
        self.positions = positions.to(self.device)
        self.lowest, self.stop = int(positions.min()), int(positions.max()) + 1
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
            return self._merged(query, spans, sees, options, options.sinks, self.positions)
        # decoding: each group of heads sees what it kept of the context and its rows' own tokens
        if not self.layers[layer]:
            raise ValueError(f"layer {layer} has no heads")
        output = torch.empty(0)
        for heads, own in zip(self.layers[layer], self.branch.own[layer], strict=True):
            rows = self.branch.rows(heads.budgets)
            every = rows is None and len(heads.index) == key.shape[1]
            if rows is not None and not len(rows):
                continue
            # of new keys, values and queries those of the group's rows and heads
            index, mine = heads.index.to(query.device), heads.queries.to(query.device)
            new_keys, new_values = (key, value) if every else (_picked(key, rows, index), _picked(value, rows, index))
            asking = query if every else _picked(query, rows, mine)
            positions = self.positions if rows is None else self.positions[rows]
            own.write(new_keys, new_values, positions, self.stop)
            apart = self.lowest if self.stop - self.length > MASKED_TOKENS else self.length
            spans = [*heads.context, *own.spans(apart, self.stop)]
            if every and self.branch.count == 1 and _is_plain(heads.sees, options):
                return self._attend_plainly(module, query, joined(spans), options.scale)
            sinks = options.sinks[mine] if options.sinks is not None else None
            found = self._merged(asking, spans, heads.sees, options, sinks, positions)
            if every:
                return found
            output = output if output.numel() else torch.empty_like(query)
            if rows is None:
                output[:, mine] = found
            else:
                output[rows[:, None], mine] = found
        return output

    def _merged(
        self,
        query: torch.Tensor,
        spans: Sequence[Span],
        sees: Visible | None,
        options: _Options,
        sinks: torch.Tensor | None,
        positions: torch.Tensor,
    ) -> torch.Tensor:
        """Attention of query [B, H, n, D] at positions [B, n] to spans of keys, merged by log-sum-exp, -> [B, H, n, D].

        Shared spans that every row sees whole go through torch's fused kernel where there is one.
        """
        parts = []
        for span in spans:
            is_sinks = sees == self._trim_rule and span.first + span.count <= min(self.rule.sink_end, self.lowest)
            visible = None if is_sinks else sees
            past = visible is None and span.first + span.count <= self.lowest and span.keys.shape[0] == 1
            fused = self._fused(query, span) if past and options.softcap is None else None
            if fused is not None:
                parts.append(_side_by_side(fused, query, span, options.scale))
                continue
            parts += kernels.over_keys(
                query, span.keys, span.values, options.scale, positions, span.first, self.lowest, visible,
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
    """Conversations after a trimmed context, each row with its own tokens, under the budget of that number."""

    def __init__(self, simulation: Simulation, budget_of: torch.Tensor, whole: bool = False) -> None:
        self.simulation, self.budget_of, self.whole = simulation, budget_of, whole
        self.lengths = torch.full((len(budget_of),), simulation.length)
        self.own = [[Growing(simulation.length) for _ in layer] for layer in simulation.layers]
        self._rows: dict[tuple[int, ...], torch.Tensor] = {}

    @property
    def count(self) -> int:
        """Rows."""
        return len(self.budget_of)

    def rows(self, budgets: tuple[int, ...] | None) -> torch.Tensor | None:
        """The rows under one of the budgets; None for all."""
        if budgets is None:
            return None
        if budgets not in self._rows:
            found = torch.isin(self.budget_of, torch.tensor(budgets)).nonzero().flatten()
            self._rows[budgets] = found.to(self.simulation.device)
        return self._rows[budgets]

    def fork(self, rows: Sequence[int], lengths: Sequence[int]) -> Branch:
        """A branch that goes on from some rows, each as it was at a length; this one ends, and can be forked again.

        Raises ValueError unless the branch is ``whole``.
        """
        if not self.whole:
            raise ValueError("a branch that frees tokens cannot go back")
        other = copy.copy(self)
        other.whole = False
        other._keep(rows)
        other.lengths = torch.tensor(lengths)
        self.simulation.branch = other
        return other

    def _keep(self, rows: Sequence[int]) -> None:
        """Go on with these rows alone, in this order; a row may be there several times."""
        picked = torch.tensor(rows)
        held = []
        for layer, groups in zip(self.simulation.layers, self.own, strict=True):
            mine = []
            for heads, own in zip(layer, groups, strict=True):
                old = self.rows(heads.budgets)
                place = torch.arange(self.count)
                chosen = picked
                if old is not None:  # a group holds the rows of its budgets alone
                    place[old.cpu()] = torch.arange(len(old))
                    chosen = picked[torch.isin(picked, old.cpu())]
                mine.append(own.taken(place[chosen]))
            held.append(mine)
        self.own, self._rows = held, {}
        self.budget_of, self.lengths = self.budget_of[picked], self.lengths[picked]

    @torch.inference_mode()
    def read(self, ids: Sequence[Sequence[int]], logits: bool = True) -> list[torch.Tensor]:
        """Read tokens as decoding steps, ``ids[b]`` of any length for row b; gives logits [len(ids[b]), V] for each.

        An empty row reads nothing. Without ``logits`` none are given, and hardly any computed. Raises ValueError where
        all rows are empty, or another branch was started since.
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
        found = simulation._forward(padded, positions, logits_to_keep=0 if logits else 1)
        self.lengths = self.lengths + torch.tensor(counts)
        self._free()
        return [found[row, :count].float() for row, count in enumerate(counts)] if logits else []

    def generate(
        self, ids: Sequence[Sequence[int]], most: int | Sequence[int], stop: frozenset[int]
    ) -> list[list[int]]:
        """Greedy answers to ``ids``, at most ``most`` tokens each, ending before an id of ``stop``.

        ``most`` may be a number for each. Rows that have ended are dropped on the way, so the branch ends too.
        """
        answers: list[list[int]] = [[] for _ in ids]
        limits = [most] * len(ids) if isinstance(most, int) else most
        pending: list[Sequence[int]] = [row if limit > 0 else () for row, limit in zip(ids, limits, strict=True)]
        going = list(range(len(ids)))  # the answer that each row writes
        while any(pending):
            found = self.read(pending)
            for row, number in enumerate(going):
                if not pending[row]:
                    continue
                token = int(found[row][-1].argmax())
                pending[row] = ()
                if token not in stop:
                    answers[number].append(token)
                    pending[row] = (token,) if len(answers[number]) < limits[number] else ()
            alive = [row for row, tokens in enumerate(pending) if tokens]
            if alive and len(alive) <= _DENSE * len(going):
                self._keep(alive)
                pending, going = [pending[row] for row in alive], [going[row] for row in alive]
        return answers

    def nbytes(self) -> int:
        """Bytes that the rows hold in addition to the shared context."""
        return sum(own.nbytes() for layer in self.own for own in layer)

    def _free(self) -> None:
        """Drop own tokens that have left every row's window; where the context is shorter than the sinks, keep them."""
        simulation = self.simulation
        if self.whole or simulation.length < simulation.rule.sink_end:
            return
        lowest = int(self.lengths.min())
        for layer, groups in zip(simulation.layers, self.own, strict=True):
            for heads, own in zip(layer, groups, strict=True):
                if heads.sees == simulation._trim_rule:
                    own.drop_below(simulation.rule.window_start(lowest))
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


def _picked(tensor: torch.Tensor, rows: torch.Tensor | None, heads: torch.Tensor) -> torch.Tensor:
    """[B, heads, n, D] of some rows (None: all) and heads."""
    return tensor[:, heads] if rows is None else tensor[rows[:, None], heads]


def _is_plain(sees: Visible | None, options: _Options) -> bool:
    return sees is None and options.softcap is None and options.sinks is None


def _side_by_side(fused: kernels.Fused, query: torch.Tensor, span: Span, scale: float) -> kernels.Part:
    """All of a span for all branches: their rows [B, H, n, D] become rows of one sequence."""
    batch, heads, count, size = query.shape
    flat = query.transpose(0, 1).reshape(1, heads, batch * count, size)
    part = fused(flat, span.keys, span.values, scale, False)
    output = part.output.view(heads, batch, count, -1).transpose(0, 1)
    return kernels.Part(output, part.lse.view(heads, batch, count).transpose(0, 1))
