"""Which tokens graded heads keep: the probe's, and the controls and the ceiling that it is compared with.

A choice scores the tokens between sinks and window; of every span a head keeps those with the highest scores.
"""

from __future__ import annotations

import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from kvprofile.budget.probe import Probe

PROBE, REVERSED, ANY_TOKENS, KEY_NORMS, OWN_SCORES = "probe", "reversed", "any tokens", "key norms", "own scores"
CHOICES = (PROBE, REVERSED, ANY_TOKENS, KEY_NORMS, OWN_SCORES)


@dataclass(frozen=True)
class CachedTokens:
    """Keys and values [G, m, D] of a layer, as its cache holds them, of tokens at positions ``first``.. of a prompt."""

    layer: int
    keys: torch.Tensor
    values: torch.Tensor
    first: int
    prompt_tokens: int


class TokenChoice(ABC):
    """Scores cached tokens."""

    reads_context = False
    """Whether :meth:`read` is to be called with each context before the model reads it to be trimmed."""

    @abstractmethod
    def scores(self, tokens: CachedTokens) -> torch.Tensor:
        """Scores [G, m], the highest of which are kept."""

    def read(self, ids: tuple[int, ...]) -> None:
        """Get ready for a context."""
        raise NotImplementedError


@dataclass
class ByProbe(TokenChoice):
    """The probe's scores or, ``reversed``, the tokens that it thinks least of."""

    probe: Probe
    reversed: bool = False

    def scores(self, tokens: CachedTokens) -> torch.Tensor:
        """As ``TokenChoice.scores``."""
        found = self.probe.scores(tokens.layer, tokens.keys, tokens.values)
        return -found if self.reversed else found


@dataclass
class AtRandom(TokenChoice):
    """Random tokens of every head, drawn anew for every context: the same ones for the same context and seed."""

    seed: int = 0
    reads_context = True
    _context: int = 0

    def read(self, ids: tuple[int, ...]) -> None:
        """Draw for this context from now on."""
        self._context = zlib.crc32(repr(ids).encode())

    def scores(self, tokens: CachedTokens) -> torch.Tensor:
        """As ``TokenChoice.scores``."""
        generator = torch.Generator().manual_seed((self.seed << 48) + (tokens.layer << 32) + self._context)
        return torch.rand(tokens.keys.shape[:2], generator=generator).to(tokens.keys.device)


@dataclass
class ByKeyNorm(TokenChoice):
    """Tokens with the smallest keys, which tend to be attended most (Devoto et al., arXiv 2406.11430)."""

    def scores(self, tokens: CachedTokens) -> torch.Tensor:
        """As ``TokenChoice.scores``."""
        return tokens.keys.float().square().sum(-1).neg()


@dataclass
class ByOwnScores(TokenChoice):
    """KVzip's scores of the very context that is trimmed: what a perfect probe would know.

    ``score`` gives ``start`` and token scores [L', G, n] of the tokens of a context from position ``start`` on;
    ``layers`` are the L' profiled ones.
    """

    score: Callable[[tuple[int, ...]], tuple[int, torch.Tensor]]
    layers: tuple[int, ...]
    reads_context = True
    _found: tuple[int, torch.Tensor] = field(default_factory=lambda: (0, torch.empty(0)))

    def read(self, ids: tuple[int, ...]) -> None:
        """Score a context by reconstruction."""
        self._found = self.score(ids)

    def scores(self, tokens: CachedTokens) -> torch.Tensor:
        """As ``TokenChoice.scores``. Tokens before the context, those of a system prompt, count as the best."""
        start, found = self._found
        count, first = tokens.keys.shape[1], tokens.first
        mine = found[self.layers.index(tokens.layer)].to(tokens.keys.device)
        before = mine.new_full((mine.shape[0], max(0, start - first)), torch.inf)
        skipped = max(0, first - start)
        return torch.cat([before, mine[:, skipped : skipped + count - before.shape[1]]], -1)
