"""The runtime's configuration: environment variables, read in one place. Standard library only."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from kvprofile.budget.trim import DEFAULT_WINDOW, KINDS, WINDOWS
from kvprofile.environment import ENABLED, PREFIX
from kvprofile.files import BUDGET_DIR

SHARED = PREFIX + "SHARED"
"""Set by the runtime itself, for its child processes: the file of ``stats``."""

TESTED_VERSIONS = ("0.30.0", "0.31.0", "0.32.0", "0.33.0")
"""vLLM releases, without build tags."""


STATE_RELEASE = "0.32.0"
"""The release with which models that keep states were compared, and data parallelism was run.

Kernels of 0.31 for a CPU take no float32 states.
"""


class Variable(NamedTuple):
    """What an environment variable means, and what holds where it is not set; the reference is made from these."""

    meaning: str
    default: str


SWITCH = Variable("1 loads the plugin into vLLM; then it serves with budgets or does not start", "0")
UNTESTED = ("release", "platform", "pipeline-parallelism", "data-parallelism", "lora", "modalities", "states")
"""What is refused unless it is allowed by name: it may well work, but has not been tried (docs/compatibility.md)."""

FLAGS = {
    "POISON": Variable("debugging on the CPU: 1 fills freed blocks with NaN, so that reading one shows", "0"),
}
VALUES = {
    "ALLOW_UNTESTED": Variable(
        f"what to serve with although it was not tested, by name, separated by commas: {', '.join(UNTESTED)}; 1 is all "
        "of them",
        "none",
    ),
    "BUDGET": Variable("a budget file or a runtime file", "found in the folder by the served model"),
    "BUDGET_DIR": Variable(
        "where the file of the served model is looked for, by the model named inside", str(BUDGET_DIR)
    ),
    "RETENTION": Variable(
        "share of the tokens between sinks and window that heads keep, or of whole heads that keep all; needed with a "
        "budget file",
        "what a runtime file states",
    ),
    "KIND": Variable(
        "graded: a head keeps a share of what lies between sinks and window, the probe's choice; whole: all or nothing",
        "graded where the file has a probe, else whole",
    ),
    "SINK": Variable("first tokens that a trimmed head keeps", "that of the file"),
    "RECENT": Variable("last tokens that a trimmed head keeps", "that of the file"),
    "WINDOW": Variable(
        "anchored: a trimmed head keeps all that comes after the prompt; sliding: the last RECENT tokens of it only, "
        "which needs whole heads",
        DEFAULT_WINDOW,
    ),
    "STATS": Variable(
        "file to append statistics to, as JSON lines: the pool, at most once a second, and each request that gave its "
        "blocks back",
        "none",
    ),
}
"""By name without the prefix."""

logger = logging.getLogger("vllm.kvprofile")
"""A child of vLLM's logger, so that it is formatted and filtered as vLLM's own lines are."""


@dataclass(frozen=True)
class Settings:
    """What the environment asks for; None where it leaves the choice to the budget file."""

    budget: Path | None
    budget_dir: Path
    retention: float | None
    kind: str | None
    sink_tokens: int | None
    recent_tokens: int | None
    window: str
    stats: Path | None
    allow_untested: frozenset[str]
    poison: bool


def from_environment(environ: Mapping[str, str]) -> Settings:
    """The settings in ``environ``; unknown names are warned about. Raises ValueError for values that make no sense."""
    known = {ENABLED, SHARED, *(PREFIX + name for name in (*FLAGS, *VALUES))}
    for name in sorted(environ):
        if name.startswith(PREFIX) and name not in known:
            logger.warning("%s is not known to kvprofile; known are %s", name, ", ".join(sorted(known - {SHARED})))
    _flag(environ, "ENABLED")
    given = {name: environ.get(PREFIX + name) or None for name in VALUES}
    return Settings(
        budget=_path(given["BUDGET"]),
        budget_dir=_path(given["BUDGET_DIR"]) or BUDGET_DIR,
        retention=_share("RETENTION", given["RETENTION"]),
        kind=_kind(given["KIND"]),
        sink_tokens=_tokens("SINK", given["SINK"], least=0),
        recent_tokens=_tokens("RECENT", given["RECENT"], least=1),
        window=_window(given["WINDOW"]),
        stats=_path(given["STATS"]),
        allow_untested=_untested(given["ALLOW_UNTESTED"]),
        poison=_flag(environ, "POISON"),
    )


def release_of(version: str) -> str:
    """The release of a version: builds of one release ('0.32.0+cpu') are one release."""
    return version.partition("+")[0]


def is_tested(version: str) -> bool:
    """Whether this runtime was tested with a release of vLLM."""
    return release_of(version) in TESTED_VERSIONS


def require_tested(version: str, asked: Settings) -> None:
    """Raise ValueError for a release of vLLM that was not tested, unless that is asked for."""
    if not is_tested(version) and "release" not in asked.allow_untested:
        raise ValueError(
            f"kvprofile was tested with vLLM {', '.join(TESTED_VERSIONS)}, this is {version}; "
            f"{PREFIX}ALLOW_UNTESTED=release serves with it all the same"
        )


def _path(text: str | None) -> Path | None:
    return None if text is None else Path(text)


def _flag(environ: Mapping[str, str], name: str) -> bool:
    text = environ.get(PREFIX + name, "0")
    if text not in ("", "0", "1"):
        raise ValueError(f"{PREFIX}{name} is {text!r}; give 1 or 0")
    return text == "1"


def _untested(text: str | None) -> frozenset[str]:
    if text in (None, "0"):
        return frozenset()
    if text == "1":
        return frozenset(UNTESTED)
    names = frozenset(name.strip() for name in str(text).split(","))
    if not names <= set(UNTESTED):
        raise ValueError(
            f"{PREFIX}ALLOW_UNTESTED is {text!r}; give some of {', '.join(UNTESTED)}, or 1 for all of them"
        )
    return names


def _share(name: str, text: str | None) -> float | None:
    try:
        value = None if text is None else float(text)
    except ValueError:
        value = math.nan
    if value is not None and not 0.0 < value <= 1.0:
        raise ValueError(f"{PREFIX}{name} is {text!r}; give a share above 0 and up to 1, like 0.5")
    return value


def _window(text: str | None) -> str:
    if text is not None and text not in WINDOWS:
        raise ValueError(f"{PREFIX}WINDOW is {text!r}; give {' or '.join(WINDOWS)}")
    return text or DEFAULT_WINDOW


def _kind(text: str | None) -> str | None:
    if text not in (None, *KINDS):
        raise ValueError(f"{PREFIX}KIND is {text!r}; give {' or '.join(KINDS)}")
    return text


def _tokens(name: str, text: str | None, least: int) -> int | None:
    if text is None:
        return None
    if not text.isdecimal() or not least <= int(text) <= 10_000_000:
        raise ValueError(f"{PREFIX}{name} is {text!r}; give a whole number of tokens, at least {least}")
    return int(text)
