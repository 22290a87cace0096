"""What the engines are asked: seeded prompts of the bundled corpora that take a cache through all that changes it.

Prompts of one token, around a block's border, of chunks, as long as a request may be; some begin alike, and together
they are more than the pool holds, so that requests wait and are preempted. All answers are greedy.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from kvprofile.budget.trim import SPAN_TOKENS
from kvprofile.errors import InputError

LIKELY_BLOCK_TOKENS = 128
"""Taken for a block's size where vLLM chooses it: its largest default."""

LOAD, AGAIN, STEADY = "load", "again", "steady"
"""Batches, in their order: all at once; a prompt that comes back with more; a few alike, whose tokens are timed."""

MIDDLE_SIZED = 8
_SHARE, _SHARED, _WRITTEN = 0.4, 0.25, 0.12
_POOL = 1.4
"""Of the longest request: what most prompts have, what some of these share, how much most answers have, and what the
pool holds. Where the next prompt no longer fits, those before it grow by more than what is left, so that some are
preempted.
"""


@dataclass(frozen=True)
class Request:
    """A prompt of ids, and how many tokens are generated, whatever they are."""

    name: str
    prompt: tuple[int, ...]
    max_tokens: int


@dataclass(frozen=True)
class RequestPlan:
    """Batches of requests, and how large the engine is made for them: sizes in tokens."""

    batches: dict[str, tuple[Request, ...]]
    max_model_len: int
    pool_tokens: int
    chunk_tokens: int

    @property
    def requests(self) -> list[tuple[str, Request]]:
        """All of them, each with its batch."""
        return [(name, request) for name, batch in self.batches.items() for request in batch]


def least_length(sink_tokens: int, recent_tokens: int, block_tokens: int) -> int:
    """The shortest longest request of which a trim frees blocks in several places."""
    return sink_tokens + recent_tokens + 6 * block_tokens


def plan_requests(
    texts: Sequence[int], sink_tokens: int, recent_tokens: int, block_size: int | None, longest: int | None, seed: int
) -> RequestPlan:
    """Requests with words of ``texts`` (ids), for heads that keep so many tokens.

    ``longest`` is the longest request; None takes one so long that most requests give up a span of graded heads. Raises
    InputError where that is too short for a trim.
    """
    block = block_size or LIKELY_BLOCK_TOKENS
    least = least_length(sink_tokens, recent_tokens, block)
    written = max(24, block + block // 4)
    if longest is not None and longest < least:
        raise InputError(
            f"--max-model-len {longest}: heads keep {sink_tokens} sinks and a window of {recent_tokens}, so nothing "
            f"would be trimmed; give at least {least}"
        )
    trimmed = sink_tokens + recent_tokens + 2 * block
    whole = longest or -(-round((trimmed + SPAN_TOKENS) / _SHARE) // 64) * 64
    written = min(max(written, round(_WRITTEN * whole)), whole // 4)
    rng = random.Random(f"verify:{seed}")
    usual = min(max(round(_SHARE * whole), trimmed), whole - written - 16)
    shared = _words(texts, round(_SHARED * whole), rng)

    def ask(name: str, tokens: int, most: int, begin: tuple[int, ...] = ()) -> Request:
        return Request(name, begin + _words(texts, max(1, tokens - len(begin)), rng), most)

    load = [ask("longest", whole - written, written)]
    for number in range(MIDDLE_SIZED):
        tokens = max(1, usual + rng.randrange(-8, 9))
        load.append(ask(f"usual-{number}", tokens, written - 2 * number, shared if number % 3 == 0 else ()))
        load.append(ask(f"growing-{number}", block // 2 + number, written - number))
    lengths = (1, block - 1, block, block + 1, sink_tokens + recent_tokens)
    short = sorted({tokens for tokens in lengths if tokens})
    load += [ask(f"short-{tokens}", tokens, 3 + 2 * number) for number, tokens in enumerate(short)]
    load.append(ask("one-token-answer", usual // 2, 1))
    again = Request("again", load[1].prompt + _words(texts, 5, rng), 12)
    steady = [ask(f"steady-{number}", usual // 2, 32) for number in range(3)]
    return RequestPlan(
        batches={LOAD: tuple(load), AGAIN: (again,), STEADY: tuple(steady)},
        max_model_len=whole,
        pool_tokens=round(_POOL * whole),
        chunk_tokens=max(64, whole // 3),
    )


def _words(texts: Sequence[int], count: int, rng: random.Random) -> tuple[int, ...]:
    """So many ids from some place on, from the start again where they end."""
    start = rng.randrange(len(texts))
    found: list[int] = []
    while len(found) < count:
        found += texts[start : start + count - len(found)]
        start = 0
    return tuple(found)
