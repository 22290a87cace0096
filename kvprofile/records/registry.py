"""The tools whose result files are read, each by one module."""

from __future__ import annotations

from typing import Any

from kvprofile.records import aiperf, guidellm, sglang_serving, vllm_serve
from kvprofile.records.foreign import ResultFormat

FORMATS: tuple[ResultFormat, ...] = (vllm_serve.FORMAT, sglang_serving.FORMAT, guidellm.FORMAT, aiperf.FORMAT)


def format_of(raw: Any) -> ResultFormat | None:
    """The format of parsed JSON; None where it is not a known tool's."""
    return next((each for each in FORMATS if each.recognises(raw)), None)


def tools() -> str:
    """The tools in words: '`vllm bench serve`, ... or `aiperf`'."""
    names = [f"`{each.tool}`" for each in FORMATS]
    return f"{', '.join(names[:-1])} or {names[-1]}"
