"""Another argument of ``vllm.LLM`` on the command line: NAME=VALUE."""

from __future__ import annotations

import json
from collections.abc import Container
from typing import Any

from kvprofile.errors import InputError


def parse(text: str, ours: Container[str], example: str) -> tuple[str, Any]:
    """Name and value, which is JSON where it can be read as JSON.

    Raises InputError for anything else, with an ``example``, and for names among ``ours``, which kvprofile sets itself.
    """
    name, equals, value = text.partition("=")
    name = name.strip().removeprefix("--").replace("-", "_")
    if not equals or not name.isidentifier():
        raise InputError(f"--vllm-arg {text!r}: give NAME=VALUE, like {example}")
    if name in ours:
        raise InputError(f"--vllm-arg {name}: kvprofile sets it itself")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value
