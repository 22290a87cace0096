"""What KV heads keep of a context when it is trimmed, and what they see from then on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from kvprofile.budget.profile import Geometry
from kvprofile.budget.trim import TrimRule
from kvprofile.evaluate.held import HeldHeads, Span
from kvprofile.evaluate.token_choice import CachedTokens, TokenChoice
from kvprofile.scoring.kernels import Visible

FULL, TRIMMED, SOME = "full", "trimmed", "some"
"""What becomes of the tokens between sinks and window in a head: all, none, or some of them stay."""


@dataclass(frozen=True)
class Sight:
    """Which keys the token at a position sees, positions [.., n, 1] against [m]; ``window`` is that of layers that
    slide anyway, in tokens.
    """

    rule: TrimRule
    window: int | None
    prompt_tokens: int

    def sliding(self, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        """In a layer that slides."""
        return (key <= query) & (key > query - int(self.window or 0))

    def everything_held(self, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        """In a trimmed head whose window stays: all that is left."""
        return key <= query

    def trimmed(self, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        """In a trimmed head whose window slides."""
        rule = self.rule
        start = torch.div(query + 1 - rule.recent_tokens, rule.block_tokens, rounding_mode="floor") * rule.block_tokens
        return (key <= query) & ((key < rule.sink_end) | (key >= start))

    def first_of_window(self, position: int) -> int:
        """First position that the token at one sees in a layer that slides."""
        return position - int(self.window or 0) + 1

    def first_recent(self, position: int) -> int:
        """First position of the window of a trimmed head."""
        return self.rule.window_start(position, self.prompt_tokens)


@dataclass(frozen=True)
class Keeping:
    """The trim of one context of ``length`` tokens on a device."""

    geometry: Geometry
    sight: Sight
    length: int
    prompt_tokens: int
    device: torch.device

    @property
    def rule(self) -> TrimRule:
        """Sinks, window and blocks."""
        return self.sight.rule

    def window_of_layer(self, whole: Span) -> list[HeldHeads]:
        """What the heads of a layer that slides anyway keep: the window of the layer."""
        window = self.sight.window
        held = [whole.cut(max(0, self.length - (window or self.length) + 1), self.length)]
        first_seen = self.sight.first_of_window if window else None
        return [HeldHeads(*self._numbers(range(self.geometry.kv_heads)), self.sight.sliding, held, first_seen)]

    def heads(
        self, layer: int, whole: Span, rows: Sequence[Sequence[float | None]], choices: Sequence[TokenChoice | None]
    ) -> list[HeldHeads]:
        """What a layer's heads keep, ``rows`` being what each budget gives them, and ``choices`` its choice of tokens.

        Heads that live alike are one group: those that are full, or trimmed, under the same budgets, and those that
        keep equally many tokens under one budget.
        """
        kept = [[self.rule.kept_tokens(share or 0.0, self.prompt_tokens) for share in row] for row in rows]
        fates = [
            [FULL if share == 1.0 else SOME if count else TRIMMED for share, count in zip(*pair, strict=True)]
            for pair in zip(rows, kept, strict=True)
        ]
        groups = [group for fate in (FULL, TRIMMED) for group in self._whole_heads(whole, fates, fate)]
        scores: dict[int, torch.Tensor] = {}
        for number, choice in enumerate(choices):
            if choice is None or SOME not in fates[number]:
                continue
            if id(choice) not in scores:  # budgets that choose alike score the tokens once
                scores[id(choice)] = self._scores(layer, whole, choice)
            pairs = zip(rows[number], fates[number], strict=True)
            shares = [share if fate == SOME else None for share, fate in pairs]
            which = None if len(rows) == 1 else (number,)
            groups += self._graded_heads(whole, shares, scores[id(choice)], which)
        return groups

    def _whole_heads(self, whole: Span, fates: Sequence[Sequence[str]], fate: str) -> list[HeldHeads]:
        """The heads that are full, or trimmed, under some budgets."""
        alike: dict[tuple[str, ...], list[int]] = {}
        for head in range(self.geometry.kv_heads):
            alike.setdefault(tuple(row[head] for row in fates), []).append(head)
        groups = []
        for pattern, heads in alike.items():
            budgets = tuple(number for number, mine in enumerate(pattern) if mine == fate)
            if budgets:
                index, queries = self._numbers(heads)
                held = self._kept(whole, index, fate == FULL)
                which = None if len(budgets) == len(fates) else budgets
                groups.append(HeldHeads(index, queries, *self._rule_of(fate == FULL, held), which))
        return groups

    def _scores(self, layer: int, whole: Span, choice: TokenChoice) -> torch.Tensor:
        """Scores [G, M] of the tokens of the middle."""
        first, stop = self._middle
        return choice.scores(CachedTokens(layer, *whole.between(first, stop), first, self.prompt_tokens))

    @property
    def _middle(self) -> tuple[int, int]:
        """Positions [first, stop) between sinks and window."""
        first = self.rule.sink_end
        return first, first + self.rule.middle_tokens(self.length, self.prompt_tokens)

    def _graded_heads(
        self, whole: Span, shares: Sequence[float | None], scores: torch.Tensor, which: tuple[int, ...] | None
    ) -> list[HeldHeads]:
        """The heads that keep ``shares`` of the middle, None for those that live otherwise."""
        first, stop = self._middle
        block = self.rule.block_tokens
        groups = []
        for share in sorted({share for share in shares if share is not None}):
            index, queries = self._numbers([head for head, mine in enumerate(shares) if mine == share])
            # of every span as many of its best as it keeps, and all that is near
            mine, chosen, start = scores[index], [], 0
            for size, kept in self.rule.spans(share, self.prompt_tokens):
                best = mine[:, start : start + size * block].sort(dim=-1, descending=True, stable=True).indices
                chosen.append(first + start + best[:, : kept * block])
                start += size * block
            near = torch.arange(first + start, stop, device=self.device)
            places = torch.cat([*chosen, near.expand(len(index), -1)], -1).sort(-1).values  # in the order of the text
            held = [whole.picked(index, places, first, stop)]
            groups.append(HeldHeads(index, queries, self.sight.everything_held, held, None, which))
        return groups

    def _rule_of(self, full: bool, held: list[Span]) -> tuple[Visible | None, list[Span], Callable[[int], int] | None]:
        """What heads see, what they hold, and the first token after the context that they still see."""
        if full:
            return None, held, None
        if self.rule.anchored:
            return self.sight.everything_held, held, None
        # where the context is shorter than the sinks, what comes after it belongs to them
        first_seen = None if self.length < self.rule.sink_end else self.sight.first_recent
        return self.sight.trimmed, held, first_seen

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
        start = max(sink_end, min(self.rule.window_start(self.length, self.prompt_tokens), self.length))
        return [span for span in (mine.cut(0, sink_end), mine.cut(start, self.length)) if span.count]
