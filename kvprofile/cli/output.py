"""What the commands print: logs on stderr, the result on stdout, and profiles drawn for a terminal."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from rich.console import Console

from kvprofile.budget import store
from kvprofile.budget.profile import Profile
from kvprofile.errors import InputError


def say(message: str) -> None:
    """One line for the person at the terminal; never part of a result."""
    print(message, file=sys.stderr, flush=True)


def print_json(document: dict[str, Any]) -> None:
    """The result of a command with --json: one document on stdout."""
    print(json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False))


def stdout_console() -> Console:
    """A console for results. It keeps to 80 columns when stdout is not a terminal."""
    return Console(highlight=False, soft_wrap=False, width=None if sys.stdout.isatty() else 80)


def resolve_profile(reference: str) -> Path:
    """The budget file a user means: a path, or a model name looked up in models/kv_budget.

    Raises InputError where neither exists.
    """
    path = Path(reference)
    if store.is_file(path):
        return path
    named = store.default_path(reference)
    if store.is_file(named):
        return named
    raise InputError(f"no budget file {reference} (looked for {named} too); run 'kvprofile score {reference}' first")


def load_profile(reference: str) -> Profile:
    """Load the budget file a user means. Raises InputError where it is missing or broken."""
    return store.load(resolve_profile(reference))


def percent(share: float | None) -> str:
    """Percent with one digit after the point; a share that is not whole never reads as 100 or 0."""
    if share is None:
        return "-"
    text = f"{100 * share:.1f}"
    if share < 1 and text == "100.0":
        return "99.9"
    if share > 0 and text == "0.0":
        return "0.1"
    return text.removesuffix(".0") if share in (0.0, 1.0) else text
