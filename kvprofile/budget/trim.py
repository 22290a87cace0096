"""Which tokens a trimmed KV head keeps: one rule, for the simulation and the vLLM runtime alike. Standard library only.

Prefill is full attention for every head. Once the ``prompt_tokens`` of a request are processed, a trimmed head sees
the first ``sink_tokens``, and a window: the last ``recent_tokens`` before and including the token being processed, both
rounded outwards to whole blocks of the paged cache. An *anchored* window begins, for all later tokens, where it began
for the first one after the prompt, so everything that is generated stays; a *sliding* one moves on with every token.
Keys carry their positions already; nothing is renumbered.

Between sinks and window a head keeps the share that its budget says, in whole blocks: all of it (1, a full head), none
(0, a trimmed one), or so many tokens. How many is decided once, where the prompt ends. Some of them are those next to
the window; the others are the best by the probe. Those compete within spans of equal length, so what stays of a span
depends on nothing that comes after it, and prompts that begin alike keep the same of what they share.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from dataclasses import dataclass

SPAN_TOKENS = 256
"""Tokens of a span, rounded down to whole blocks; more where a head keeps less than a block of so many."""

NEAR_OF_KEPT, NEAR_OF_MIDDLE = 1 / 2, 1 / 8
"""About how much of what a head keeps lies next to the window: the smaller of these parts of the tokens that it keeps,
and of all tokens between sinks and window."""

DEFAULT_BLOCK_TOKENS = 16
"""vLLM's block size on GPUs."""

ANCHORED, SLIDING = "anchored", "sliding"
WINDOWS = (ANCHORED, SLIDING)
DEFAULT_WINDOW = ANCHORED

WHOLE, GRADED = "whole", "graded"
KINDS = (WHOLE, GRADED)
"""Of budgets: heads that keep all or nothing between sinks and window, or shares of it."""


@dataclass(frozen=True)
class TrimRule:
    """Sinks, window and block size, in tokens. Raises ValueError for sizes and windows that mean nothing."""

    sink_tokens: int
    recent_tokens: int
    block_tokens: int = DEFAULT_BLOCK_TOKENS
    window: str = DEFAULT_WINDOW

    def __post_init__(self) -> None:
        if self.sink_tokens < 0 or self.recent_tokens < 1 or self.block_tokens < 1:
            raise ValueError(f"sinks must be >= 0, window and block >= 1, not {self}")
        if self.window not in WINDOWS:
            raise ValueError(f"the window is {' or '.join(WINDOWS)}, not {self.window!r}")

    @property
    def sink_blocks(self) -> int:
        """Blocks that hold the sinks."""
        return -(-self.sink_tokens // self.block_tokens)

    @property
    def sink_end(self) -> int:
        """Position after the last sink, rounded up to a block."""
        return self.sink_blocks * self.block_tokens

    @property
    def anchored(self) -> bool:
        """Whether the window stays where it was when the prompt ended."""
        return self.window == ANCHORED

    def first_recent_block(self, position: int, prompt_tokens: int) -> int:
        """First block of the window of the token at ``position``; never before the end of the sinks."""
        at = min(position, prompt_tokens) if self.anchored else position
        return max(self.sink_blocks, (at + 1 - self.recent_tokens) // self.block_tokens)

    def window_start(self, position: int, prompt_tokens: int) -> int:
        """First position of the window of the token at ``position``, rounded down to a block."""
        return self.first_recent_block(position, prompt_tokens) * self.block_tokens

    def sees(self, position: int, key: int, prompt_tokens: int) -> bool:
        """Whether a trimmed head's query at ``position`` sees the key at position ``key``."""
        return key <= position and (key < self.sink_end or key >= self.window_start(position, prompt_tokens))

    def middle_tokens(self, processed: int, prompt_tokens: int) -> int:
        """Tokens between sinks and window, whose fate budgets decide, when the token after ``processed`` comes."""
        return max(0, min(self.window_start(processed, prompt_tokens), processed) - self.sink_end)

    def kept_tokens(self, share: float, prompt_tokens: int) -> int:
        """Tokens between sinks and window that a head of a budget keeps of a prompt: whole blocks, halves rounded up.

        Without rounding where the head is full.
        """
        middle = self.middle_tokens(prompt_tokens, prompt_tokens)
        if share >= 1.0:
            return middle
        return _rounded(share, middle // self.block_tokens) * self.block_tokens

    def span_blocks(self, share: float) -> int:
        """Blocks of a span of a head of a budget."""
        keeping_one = math.ceil(round(1 / _rate(share), 6)) if share else 1
        return max(SPAN_TOKENS // self.block_tokens, keeping_one)

    def near_blocks(self, share: float, prompt_tokens: int) -> int:
        """Blocks next to the window, all of which a head of a budget keeps: those that it keeps of no span."""
        blocks = self.middle_tokens(prompt_tokens, prompt_tokens) // self.block_tokens
        kept = _rounded(share, blocks)
        rate = _rate(share)
        # with each block more that is near, as many blocks are kept as before or one more
        return bisect_left(range(kept), kept, key=lambda near: near + _rounded(rate, blocks - near))

    def spans(self, share: float, prompt_tokens: int) -> list[tuple[int, int]]:
        """Blocks of every span between the sinks and what is near, and how many of them a head of a budget keeps.

        The last span may be shorter. Halves are rounded so that the spans up to any one keep together what their
        blocks at once would, whatever comes after them.
        """
        blocks = self.middle_tokens(prompt_tokens, prompt_tokens) // self.block_tokens
        blocks -= self.near_blocks(share, prompt_tokens)
        rate, length = _rate(share), self.span_blocks(share)
        found = []
        for start in range(0, blocks, length):
            stop = min(start + length, blocks)
            found.append((stop - start, _rounded(rate, stop) - _rounded(rate, start)))
        return found

    def held_tokens(self, processed: int, prompt_tokens: int, share: float = 0.0) -> int:
        """Tokens that a head of a budget holds when ``processed`` tokens are and the next one comes."""
        if share >= 1.0:
            return processed
        kept = self.kept_tokens(share, prompt_tokens) if share else 0
        return processed - self.middle_tokens(processed, prompt_tokens) + kept


def _rate(share: float) -> float:
    """How much of every span a head keeps whose share of the middle this is; the rest of it is near.

    The same for prompts of any length, so what is near grows with the prompt.
    """
    return max((1 - NEAR_OF_KEPT) * share, (share - NEAR_OF_MIDDLE) / (1 - NEAR_OF_MIDDLE))


def _rounded(share: float, blocks: int) -> int:
    """So much of a number of blocks, to the nearest whole one, halves up."""
    return math.floor(round(share * blocks, 6) + 0.5)
