"""When a run may stop: once the budgets at the presets no longer depend on which pieces of the corpora were read.

Pieces are documents or, where there are few, chunks. The pieces read so far are drawn again, with replacement, and
the heads that each redraw would choose at every preset are compared with those chosen now (a bootstrap of the
choice). Looks are few and far between, because every look is another chance to stop by luck.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from kvprofile.budget.allocate import full_head_count
from kvprofile.budget.profile import PRESETS
from kvprofile.scoring.aggregate import HeadStatistics

REDRAWS = 200
CONFIDENCE = 0.95
"""Share of redraws that must choose as the pieces themselves do."""

FEWEST_PIECES = 8
NEXT_LOOK = 1.5
"""Looks are taken at 8 pieces, 12, 18, 27, and so on."""


def heads_allowed(heads: int) -> int:
    """How many heads may change places with others at a preset for a redraw to count as equal: 2 %, at least one."""
    return max(1, heads // 50)


class Stopping:
    """Gathers pieces and says when budgets have settled. ``statistic`` ranks heads: max or mean."""

    def __init__(self, statistic: str, seed: int) -> None:
        self.statistic, self.seed = statistic, seed
        self.maxima: list[npt.NDArray[np.float64]] = []
        self.means: list[npt.NDArray[np.float64]] = []
        self.look_at = float(FEWEST_PIECES)

    def add(self, piece: HeadStatistics) -> bool:
        """Take one more piece; returns whether the run may stop now."""
        self.maxima.append(piece.maximum.double().numpy().ravel())
        self.means.append(piece.mean().numpy().ravel())
        if len(self.maxima) < int(self.look_at):
            return False
        self.look_at *= NEXT_LOOK
        return self.settled()

    def settled(self) -> bool:
        """Whether enough redraws choose the heads that all pieces choose."""
        maxima, means = np.stack(self.maxima), np.stack(self.means)
        pieces, heads = maxima.shape
        now = self._choices(maxima, means)
        rng = np.random.default_rng(self.seed)
        equal = 0
        for _ in range(REDRAWS):
            drawn = rng.integers(pieces, size=pieces)
            moved = (self._choices(maxima[drawn], means[drawn]) & ~now).sum(-1).max()
            equal += bool(moved <= heads_allowed(heads))
        return equal >= CONFIDENCE * REDRAWS

    def _choices(self, maxima: npt.NDArray[np.float64], means: npt.NDArray[np.float64]) -> npt.NDArray[np.bool_]:
        """Full heads [presets, heads] by pieces [n, heads]; ties are broken by the other statistic."""
        largest, average = maxima.max(0), means.mean(0)
        first, second = (largest, average) if self.statistic == "max" else (average, largest)
        order = np.lexsort((-second, -first))
        chosen = np.zeros((len(PRESETS), len(order)), dtype=np.bool_)
        for row, retention in enumerate(PRESETS):
            chosen[row, order[: full_head_count(retention, len(order))]] = True
        return chosen
