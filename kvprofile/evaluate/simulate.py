"""The runtime's semantics on any Hugging Face decoder: full prefill, one trim, then decoding on what is left.

This is the oracle for the vLLM runtime and the engine of ``kvprofile evaluate``. Trimmed heads really drop their keys
and values; no mask stands in for memory. A prefilled context is kept once and shared: every branch (a question, or
several asked side by side) adds its own tokens after it, so the next question starts from the same trimmed context
without reading it again. Branches of several budgets run side by side too: what heads keep of a context is the same for
all budgets that treat them alike, so the model's large products are made once for all rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AttentionInterface, PreTrainedModel

from kvprofile.budget.float8 import Float8
from kvprofile.budget.profile import Geometry, Matrix
from kvprofile.budget.trim import TrimRule
from kvprofile.checkpoint.rehearsal import cache_argument
from kvprofile.checkpoint.states import states_of
from kvprofile.errors import InputError
from kvprofile.evaluate.branch import Branch
from kvprofile.evaluate.collecting import CollectingCache
from kvprofile.evaluate.held import HeldHeads, Span, joined
from kvprofile.evaluate.keeping import Keeping, Sight
from kvprofile.evaluate.token_choice import TokenChoice
from kvprofile.scoring import kernels
from kvprofile.scoring.attention import routed
from kvprofile.scoring.kernels import Visible

NAME = "kvprofile_budgeted"
PREFILL_SLICE_TOKENS = 1024
MASKED_TOKENS = 256
"""Tokens of its own up to which a branch masks what a row cannot see, which costs less than two parts to merge."""


_current: list[Simulation] = []


class Simulation:
    """A model whose KV heads keep what a budget gives them. Use inside :func:`simulating`.

    ``heads`` is a budget [L][G]: 1.0 keeps the whole context, 0.0 sinks and window, a share between them so much of
    what is between sinks and window, the tokens that ``choice`` scores highest; None a layer without a budget: one that
    slides anyway, or has no cache. Where ``float8`` is given, keys and values are rounded to it before anything reads
    them, as where a cache of such numbers is served.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        geometry: Geometry,
        heads: Matrix,
        rule: TrimRule,
        choice: TokenChoice | None = None,
        float8: Float8 | None = None,
    ) -> None:
        self.model, self.geometry, self.rule, self.float8 = model, geometry, rule, float8
        self.window = getattr(model.config, "sliding_window", None)
        self.device = model.get_input_embeddings().weight.device
        self.plain_attention = AttentionInterface()["sdpa"]
        self.cache = CollectingCache(geometry.layer_types, states_of(model.config), lambda: self.length)
        self.cache_argument = cache_argument(model)
        self.length = self.prompt_tokens = 0
        self.sight = Sight(rule, self.window, 0)
        self.branch: Branch | None = None
        self.fused: dict[tuple[torch.device, torch.dtype, int, int], kernels.Fused | None] = {}
        self.prefilled: list[list[Span]] = []
        self.layers: list[list[HeldHeads]] = []
        self.budgets = 1
        self.set_heads(heads, choice)

    def set_heads(self, heads: Matrix, choice: TokenChoice | None = None) -> None:
        """Use another budget [L][G] from the next :meth:`trim` on.

        Raises ValueError for another shape, InputError for a share of a head without a choice of tokens, or under a
        window that slides.
        """
        self._check(heads, choice)
        self.heads, self.choice = heads, choice

    def _check(self, heads: Matrix, choice: TokenChoice | None) -> None:
        geometry = self.geometry
        if len(heads) != geometry.layers or any(len(row) != geometry.kv_heads for row in heads):
            raise ValueError(f"the budget is not {geometry.layers} x {geometry.kv_heads}")
        graded = [value for row in heads for value in row if value not in (0.0, 1.0, None)]
        if graded and choice is None:
            raise InputError(f"a head has budget {graded[0]:g}, and nothing says which tokens those are")
        if graded and not self.rule.anchored:
            raise InputError("graded budgets need a window that stays: leave out --window sliding")

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
            logits = self.forward(piece, positions, logits_to_keep=1)
            self.length += piece.shape[1]
        self.cache.keep_states()
        return logits[0, -1].float()

    def trim(
        self, heads: Matrix | None = None, prompt_tokens: int | None = None, choice: TokenChoice | None = None
    ) -> None:
        """Keep what the budget gives every head of the prefilled context, and free the rest.

        With ``heads`` budget and choice change first; the untrimmed context stays until :meth:`forget_context`, so
        several budgets can be tried on one prefill. ``prompt_tokens`` and errors as for :meth:`trim_each`.
        """
        if heads is not None:
            self.set_heads(heads, choice)
        self.trim_each([self.heads], prompt_tokens, [self.choice])

    def trim_each(
        self,
        budgets: Sequence[Matrix],
        prompt_tokens: int | None = None,
        choices: Sequence[TokenChoice | None] | None = None,
    ) -> None:
        """Keep what each of several budgets gives every head, for branches that run under all of them side by side.

        ``choices`` say, for each budget, which tokens those heads keep that keep some. ``prompt_tokens`` is where the
        prompt ended, if generated tokens were read with it, as those of a preempted request are. Raises ValueError
        where no context is held, and as :meth:`set_heads`.
        """
        choices = choices or [None] * len(budgets)
        for heads, choice in zip(budgets, choices, strict=True):
            self._check(heads, choice)
        if not self.prefilled:
            raise ValueError("nothing is prefilled")
        self.budgets = len(budgets)
        self.prompt_tokens = self.length if prompt_tokens is None else prompt_tokens
        self.sight = Sight(self.rule, self.window, self.prompt_tokens)
        keeping = Keeping(self.geometry, self.sight, self.length, self.prompt_tokens, self.device)
        self.layers = []
        for layer, spans in enumerate(self.prefilled):
            rows = [heads[layer] for heads in budgets]
            if not spans:  # the layer has no cache
                self.layers.append([])
            elif rows[0][0] is None or self._slides(layer):  # its heads keep their own window
                self.layers.append(keeping.window_of_layer(joined(spans)))
            else:
                self.layers.append(keeping.heads(layer, joined(spans), rows, choices))

    def beside(self, float8: Float8 | None) -> Simulation:
        """Another simulation of the same model, which holds a context of its own in a cache of another kind.

        The two take turns at reading, as long as the block of :func:`simulating` lasts.
        """
        made = Simulation(self.model, self.geometry, self.heads, self.rule, self.choice, float8)
        made.fused = self.fused
        return made

    def forget(self) -> None:
        """Free everything: the context, and what is left of it."""
        self.prefilled, self.layers, self.branch = [], [], None

    def forget_context(self) -> None:
        """Free the untrimmed context: from here on only what the budget keeps is held."""
        self.prefilled = []

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
        self.cache.start(self.branch.count)
        return self.branch

    def _slides(self, layer: int) -> bool:
        return layer not in self.geometry.profiled_layers

    def forward(self, ids: torch.Tensor, positions: torch.Tensor, logits_to_keep: int = 0) -> torch.Tensor:
        """Logits [B, n, V] of ids [B, n] at positions [B, n]; of the last ``logits_to_keep`` tokens unless 0."""
        self.positions = positions.to(self.device)
        self.lowest, self.stop = int(positions.min()), int(positions.max()) + 1
        self.cache.past_tokens = self.lowest
        _current[:] = [self]
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
        if self.float8 is not None:
            key, value = self.float8.rounded(key), self.float8.rounded(value)
        # prefill: every head sees everything, and what it held is kept for the trim
        if self.branch is None:
            spans = self.prefilled[layer]
            spans.append(Span(key, value, self.length))
            sees = self.sight.sliding if self._slides(layer) and self.window else None
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
            is_sinks = sees == self.sight.trimmed and span.first + span.count <= min(self.rule.sink_end, self.lowest)
            visible = None if is_sinks or sees == self.sight.everything_held else sees
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


@dataclass(frozen=True)
class _Options:
    """What a layer asks of attention besides queries, keys and values."""

    scale: float
    softcap: float | None
    sinks: torch.Tensor | None


@contextmanager
def simulating(
    model: PreTrainedModel,
    geometry: Geometry,
    heads: Matrix,
    rule: TrimRule,
    choice: TokenChoice | None = None,
    float8: Float8 | None = None,
) -> Iterator[Simulation]:
    """Route a model's attention through a simulation, and put everything back afterwards.

    Not re-entrant, and one model at a time, because transformers' registry is global: raises RuntimeError for another.
    """
    if _current:
        raise RuntimeError("a model is being simulated already in this process")
    simulation = Simulation(model, geometry, heads, rule, choice, float8)
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
