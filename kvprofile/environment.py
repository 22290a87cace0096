"""The names of the plugin's environment variables, for all who set or read one. Every process of vLLM imports this."""

from __future__ import annotations

from collections.abc import Mapping

PREFIX = "LLM_KVZIP_"
"""Of every variable that the vLLM plugin reads; ``runtime.settings`` lists them."""

ENABLED = PREFIX + "ENABLED"
"""Switches the plugin on."""


def budgets_wanted(environ: Mapping[str, str]) -> bool:
    """Whether the environment asks vLLM to apply budgets; values other than 0 and 1 are refused later, by name."""
    return environ.get(ENABLED, "0") not in ("", "0")
