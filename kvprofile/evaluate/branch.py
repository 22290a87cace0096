"""What comes after a trimmed context in a simulation: conversations side by side, read, written and gone back to."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Protocol

import torch

from kvprofile.evaluate.collecting import CollectingCache
from kvprofile.evaluate.held import Growing, HeldHeads

_DENSE = 0.8
"""Rows that have ended are dropped where no more than this share of the rows still writes."""


class Trimmed(Protocol):
    """What a branch needs of the simulation whose context it follows."""

    length: int
    device: torch.device
    layers: list[list[HeldHeads]]
    cache: CollectingCache
    branch: Branch | None

    def forward(self, ids: torch.Tensor, positions: torch.Tensor, logits_to_keep: int = 0) -> torch.Tensor:
        """Logits [B, n, V] of ids [B, n] at positions [B, n]; of the last ``logits_to_keep`` tokens unless 0."""


class Branch:
    """Conversations after a trimmed context, each row with its own tokens, under the budget of that number."""

    def __init__(self, simulation: Trimmed, budget_of: torch.Tensor, whole: bool = False) -> None:
        self.simulation, self.budget_of, self.whole = simulation, budget_of, whole
        self.lengths = torch.full((len(budget_of),), simulation.length)
        self.own = [[Growing(simulation.length) for _ in layer] for layer in simulation.layers]
        self.ids: list[list[int]] = [[] for _ in budget_of]
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

        States cannot go back as keys can, so a model that keeps states reads those rows again. Raises ValueError unless
        the branch is ``whole``.
        """
        if not self.whole:
            raise ValueError("a branch that frees tokens cannot go back")
        if self.simulation.cache.keeps_states:
            return self._read_again(rows, lengths)
        other = copy.copy(self)
        other.whole = False
        other._keep(rows)
        other.lengths = torch.tensor(lengths)
        self.simulation.branch = other
        return other

    def _read_again(self, rows: Sequence[int], lengths: Sequence[int]) -> Branch:
        """The branch of ``fork``, from the context on."""
        simulation = self.simulation
        other = Branch(simulation, self.budget_of[torch.tensor(rows)])
        simulation.branch = other
        simulation.cache.start(other.count)
        ids = [self.ids[row][: length - simulation.length] for row, length in zip(rows, lengths, strict=True)]
        if any(ids):
            other.read(ids, logits=False)
        return other

    def _keep(self, rows: Sequence[int]) -> None:
        """Go on with these rows alone, in this order; a row may be there several times."""
        picked = torch.tensor(rows)
        self.simulation.cache.pick(rows)
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
        if self.whole and simulation.cache.keeps_states:
            for known, tokens in zip(self.ids, ids, strict=True):
                known += tokens
        steps = simulation.cache.steps(counts)
        pieces = [
            simulation.forward(padded[:, step], positions[:, step], logits_to_keep=0 if logits else 1) for step in steps
        ]
        found = pieces[0] if len(pieces) == 1 else torch.cat(pieces, 1)
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
        """Drop own tokens that have left every row's window."""
        simulation = self.simulation
        if self.whole:
            return
        lowest = int(self.lengths.min())
        for layer, groups in zip(simulation.layers, self.own, strict=True):
            for heads, own in zip(layer, groups, strict=True):
                if heads.first_seen is not None:
                    own.drop_below(heads.first_seen(lowest))
