"""What a user may choose about an evaluation, checked."""

from __future__ import annotations

from dataclasses import dataclass, field

from kvprofile.budget.allocate import require_retention
from kvprofile.budget.dtypes import PLAIN, require_kv_cache_dtype
from kvprofile.budget.profile import PRESETS
from kvprofile.budget.trim import DEFAULT_BLOCK_TOKENS, DEFAULT_WINDOW, WINDOWS
from kvprofile.errors import InputError
from kvprofile.questions.columns import Columns
from kvprofile.questions.tasks import CONTINUED_TOKENS, DEFAULT_TASKS, TASKS

MOST = 1_000_000
"""Most of anything that is counted."""


@dataclass(frozen=True)
class EvaluationOptions:
    """What a user may choose about an evaluation. Sinks and window are the first profile's unless given.

    Without ``generate`` an answer is right only where greedy decoding writes the reference, so nothing is written.
    """

    retentions: tuple[float, ...] = PRESETS
    tasks: tuple[str, ...] = DEFAULT_TASKS
    context_tokens: tuple[int, ...] = (1000,)
    contexts: int = 5
    questions: int = 8
    sink_tokens: int | None = None
    recent_tokens: int | None = None
    block_tokens: int = DEFAULT_BLOCK_TOKENS
    window: str = DEFAULT_WINDOW
    random_seeds: int = 3
    controls: bool = True
    only_outside: bool = False
    seed: int = 0
    batch: int = 64
    generate: bool = False
    own_scores: bool = False
    continued_tokens: int = CONTINUED_TOKENS
    columns: Columns = field(default_factory=Columns)
    kv_cache_dtypes: tuple[str, ...] = (PLAIN,)

    def __post_init__(self) -> None:
        for retention in self.retentions:
            require_retention(retention)
        least = {"contexts": 1, "questions": 1, "block_tokens": 1, "batch": 1, "sink_tokens": 0, "recent_tokens": 1}
        for name, bound in {**least, "continued_tokens": 1, "random_seeds": 0, "seed": 0}.items():
            value = getattr(self, name)
            if value is not None and not bound <= value <= MOST:
                flag = f"--{name.replace('_', '-')}"
                raise InputError(f"{flag} must lie between {bound} and {MOST:,}, not {value}")
        if self.window not in WINDOWS:
            raise InputError(f"--window is {' or '.join(WINDOWS)}, not {self.window!r}")
        for dtype in self.kv_cache_dtypes:
            require_kv_cache_dtype(dtype)
        for tokens in self.context_tokens:
            if not 1 <= tokens <= MOST:
                raise InputError(f"--context-tokens must lie between 1 and {MOST:,}, not {tokens}")
        if not (self.retentions and self.tasks and self.context_tokens):
            raise InputError("give at least one retention, task and number of context tokens")
        if self.columns != Columns() and set(self.tasks) <= set(TASKS):
            raise InputError("--columns is for questions that you bring; add --tasks FILE.jsonl or datasets:ID_OR_PATH")
