"""How much of the corpora a run reads: all of it, exactly, or a part of it, fast. Behind ``score --fast``.

Three shortcuts, each of which can be taken alone. *Sparse rows*: of the context besides prefix and chunk a repeat sees
the last tokens and one in sixteen of the others, in place of all sixteen. *Chunk sampling*: a share of each document's
chunks, spread over it, is repeated. *Early stopping*: the run ends once the budgets have settled
(``scoring.stopping``). What each does to the ranking is measured by ``scripts/fast_agreement.py``.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from itertools import pairwise


@dataclass(frozen=True)
class Effort:
    """Shortcuts of a run; without any it is exact."""

    sparse_rows: bool = False
    chunk_share: float = 1.0
    stop_early: bool = False

    @property
    def exact(self) -> bool:
        """Whether no shortcut is taken."""
        return self == EXACT

    def chunks(self, count: int, seed: int, document: int) -> frozenset[int]:
        """Indices of the chunks to repeat of a document that has ``count``: one at random from each equal stretch."""
        if self.chunk_share >= 1.0:
            return frozenset(range(count))
        rng = random.Random(f"{seed}/{document}")
        stretches = math.ceil(self.chunk_share * count)
        edges = [i * count // stretches for i in range(stretches + 1)]
        return frozenset(rng.randrange(first, stop) for first, stop in pairwise(edges))

    def order(self, documents: int, seed: int) -> list[int]:
        """The order in which documents are read: where the run may stop early, all corpora mixed."""
        order = list(range(documents))
        if self.stop_early:
            random.Random(seed).shuffle(order)
        return order


EXACT = Effort()
FAST = Effort(sparse_rows=True, chunk_share=0.5, stop_early=True)
"""What ``--fast`` takes."""

REST_RECENT_TOKENS, REST_STRIDE = 128, 16


def sparse_rest(prefix: int, chunk: tuple[int, int], length: int) -> tuple[range, range, range]:
    """Context positions that a sparse repeat sees besides prefix and chunk: those at the end, and samples.

    ``chunk`` holds positions [start, stop) and ``length`` counts prefix and context. Returned are samples before the
    chunk and after it, each of which stands for REST_STRIDE tokens, and the last tokens, which stand for themselves.
    """
    first, stop = chunk
    recent = max(stop, length - REST_RECENT_TOKENS)
    middle = REST_STRIDE // 2
    return range(prefix + middle, first, REST_STRIDE), range(stop + middle, recent, REST_STRIDE), range(recent, length)
