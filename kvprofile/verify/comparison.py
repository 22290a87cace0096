"""Comparing what engines answered: with each other, and what they gave back with the rule.

Numbers are log-probabilities in nats. Engines add in different orders, so equal is not to be had: differences may be as
large as the margins for the dtype. Where two tokens are nearer to each other than that, either may come first, and what
follows is another text: it is not compared.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from kvprofile.budget.dtypes import FLOAT8_NAMES
from kvprofile.budget.trim import GRADED, WHOLE, TrimRule
from kvprofile.verify.child_process import EngineRun
from kvprofile.verify.request_plan import RequestPlan


@dataclass(frozen=True)
class Margins:
    """How far log-probabilities of a token may lie apart, and the mean of all.

    ``far_share`` of the tokens may lie further apart, where a dtype rounds so coarsely that one now and then does.
    """

    most: float
    most_mean: float
    far_share: float = 0.0


def rounding_of(facts: Mapping[str, Any]) -> str:
    """The dtype by whose margins an engine is judged: a cache of 8-bit floats rounds as coarsely as bfloat16."""
    return "bfloat16" if facts["kv_cache_dtype"] in FLOAT8_NAMES else str(facts["dtype"])


BETWEEN_ENGINES = {
    "float32": Margins(1e-3, 1e-4),
    "float16": Margins(0.1, 0.01, 0.002),
    "bfloat16": Margins(0.5, 0.04, 0.002),
}
"""By ``rounding_of``. The same kernels, in batches of other requests."""

TO_SIMULATION = {
    WHOLE: {
        "float32": Margins(1e-3, 1e-4),
        "float16": Margins(0.25, 0.02, 0.005),
        "bfloat16": Margins(0.5, 0.05, 0.005),
    },
    GRADED: {
        "float32": Margins(0.02, 1e-3, 0.005),
        "float16": Margins(0.25, 0.02, 0.01),
        "bfloat16": Margins(0.5, 0.05, 0.01),
    },
}
"""By kind and ``rounding_of``. Other kernels, and other places where a model is rounded.

Of graded heads rounding may also decide which of two tokens stays that score almost alike.
"""


@dataclass
class Compared:
    """Log-probabilities side by side. ``far`` says where they lie too far apart, ``problems`` what is not allowed."""

    margins: Margins
    tokens: int = 0
    near_ties: int = 0
    largest: float = 0.0
    total: float = 0.0
    far: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    @property
    def mean(self) -> float:
        """Mean difference."""
        return self.total / self.tokens if self.tokens else 0.0

    @property
    def most_far(self) -> int:
        """Tokens that may lie too far apart."""
        return int(self.margins.far_share * self.tokens)

    def note(self, where: str, one: float, other: float) -> bool:
        """Take in a pair; False where it lies too far apart, NaN included."""
        apart = abs(one - other)
        if not math.isfinite(apart):
            self.problems.append(f"{where}: log-probability {one:.4g} against {other:.4g}")
            return False
        self.tokens += 1
        self.total += apart
        self.largest = max(self.largest, apart)
        if apart > self.margins.most:
            self.far.append(f"{where}: log-probabilities {one:.4f} and {other:.4f} are {apart:.3g} apart")
        return apart <= self.margins.most

    def close(self) -> Compared:
        """Judge them all, when all are in."""
        if not self.tokens and not self.far:
            self.problems.append("nothing could be compared")
        if len(self.far) > self.most_far:
            self.problems += self.far
        if self.mean > self.margins.most_mean:
            self.problems.append(f"log-probabilities are {self.mean:.3g} apart in the mean")
        return self

    def as_check(self) -> dict[str, Any]:
        """For the attestation, in two digits."""
        return {
            "tokens": self.tokens,
            "near_ties": self.near_ties,
            "largest": _rounded(self.largest),
            "most": self.margins.most,
            "mean": min(_rounded(self.mean), self.margins.most_mean) if not self.problems else _rounded(self.mean),
            "most_mean": self.margins.most_mean,
            "far": len(self.far),
            "most_far": self.most_far,
        }


def answers(plan: RequestPlan, stock: EngineRun, other: EngineRun, dtype: str, *, first_life: bool = False) -> Compared:
    """Whether two engines gave the same answers, up to near ties.

    With ``first_life`` only tokens before a request was preempted: afterwards heads hold again what they gave up.
    """
    found = Compared(BETWEEN_ENGINES[dtype])
    ours, theirs = stock.outputs(), other.outputs()
    for batch, request in plan.requests:
        one, two = ours[request.name], theirs[request.name]
        for position in range(request.max_tokens):
            at = len(request.prompt) + position
            if first_life and any(at >= life["tokens"] for each in (one, two) for life in each["lives"][1:]):
                break
            where = f"request {request.name} of batch {batch}, token {at}"
            best, token, said = one["best"][position], one["tokens"][position], two["tokens"][position]
            if said != token:
                gap = best[str(token)] - best.get(str(said), -math.inf)
                if gap <= found.margins.most:
                    found.near_ties += 1
                else:
                    found.far.append(f"{where}: token {said}, not {token}, which is {_apart(gap)} more likely")
                break
            if not found.note(where, one["logprobs"][position], two["logprobs"][position]):
                break
    return found.close()


@dataclass
class Returned:
    """Blocks of requests against the rule."""

    requests: int = 0
    given_back: int = 0
    problems: list[str] = field(default_factory=list)


def blocks(plan: RequestPlan, run: EngineRun, rule: TrimRule) -> Returned:
    """Whether each request held what the rule says once it was trimmed, and whether all blocks came back in the end."""
    found = Returned()
    groups = run.found["groups"]
    by_id = {each["id"]: request for request in _asked(plan) for each in [run.outputs()[request.name]]}
    lives = {each["id"]: list(each["lives"]) for each in run.outputs().values()}
    for line in run.statistics:
        if "request_id" not in line:
            continue
        request = by_id[line["request_id"]]
        life = lives[line["request_id"]].pop(0)
        if line["blocks_after_trim"] is None:
            continue
        held, expected = line["blocks_after_trim"], held_blocks(rule, groups, life["tokens"], len(request.prompt))
        found.requests += 1
        found.given_back += line["blocks_after_prefill"] - held
        if held != expected:
            found.problems.append(
                f"request {request.name}, prompt of {len(request.prompt)} tokens: {held} blocks held after the trim, "
                f"the rule says {expected}"
            )
    if run.found["free"] != run.found["blocks"] - 1:  # all but the null block
        found.problems.append(f"{run.found['blocks'] - 1 - run.found['free']} blocks of the pool did not come back")
    if not found.given_back and not found.problems:
        found.problems.append("no request gave blocks back")
    return found


def held_blocks(rule: TrimRule, groups: Iterable[Mapping[str, Any]], processed: int, prompt_tokens: int) -> int:
    """Blocks that a request holds in all groups with budgets once ``processed`` tokens are and it was trimmed."""
    whole = -(-processed // rule.block_tokens)
    middle = rule.middle_tokens(processed, prompt_tokens) // rule.block_tokens
    total = 0
    for group in groups:
        if group["trimmed"]:
            kept = rule.kept_tokens(group["share"], prompt_tokens) if group["share"] else 0
            total += whole - middle + kept // rule.block_tokens
        elif group["full"]:
            total += whole
    return total


def seconds_per_token(run: EngineRun, batch: str) -> float | None:
    """Mean seconds between tokens of a batch's answers."""
    found = [each["seconds"] for each in run.found["batches"][batch] if each["seconds"]]
    return sum(found) / len(found) if found else None


def load_of(plan: RequestPlan, run: EngineRun, poisoned: bool) -> dict[str, Any]:
    """What an engine went through."""
    lives = [life for each in run.outputs().values() for life in each["lives"]]
    return {
        "longest_request": max(len(request.prompt) + request.max_tokens for request in _asked(plan)),
        "preemptions": run.found["preemptions"],
        "prefix_hits": sum(life["hit"] > 0 for life in lives),
        "chunks": sum(len([count for _, count in life["chunks"] if count > 1]) > 1 for life in lives),
        "poisoned": poisoned,
    }


def _asked(plan: RequestPlan) -> list[Any]:
    return [request for _, request in plan.requests]


def _rounded(value: float) -> float:
    """Up to two digits."""
    if value <= 0:
        return 0.0
    unit = 10.0 ** (math.floor(math.log10(value)) - 1)
    return float(f"{math.ceil(value / unit - 1e-9) * unit:.2g}")


def _apart(gap: float) -> str:
    return f"{gap:.3g} nats" if math.isfinite(gap) else "far"
