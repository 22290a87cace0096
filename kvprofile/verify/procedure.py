"""The verification: which engines are started, in which order, and what is compared with what.

Stock vLLM comes first. Then, for each kind of budget, the plugin twice: with a window as long as the longest request,
so that layers are split as they will be served and nothing may differ; and as it will serve, against the simulation.
"""

from __future__ import annotations

import datetime
import importlib.util
import os
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from kvprofile import checkpoint
from kvprofile.budget import probe as probes
from kvprofile.budget import servable
from kvprofile.budget.choice import require_kind
from kvprofile.budget.dtypes import MODEL_DTYPES, value_bytes
from kvprofile.budget.probe import Probe
from kvprofile.budget.profile import Profile
from kvprofile.budget.trim import GRADED, TrimRule
from kvprofile.checkpoint import Description
from kvprofile.corpus.sources import bundled_names, load_corpus
from kvprofile.environment import PREFIX
from kvprofile.errors import InputError
from kvprofile.files import require_writable
from kvprofile.runtime import attestation
from kvprofile.runtime.attestation import Attestation
from kvprofile.runtime.engine_budget import EngineBudget
from kvprofile.runtime.find import Served, file_of, find, kind_of
from kvprofile.runtime.settings import Settings, from_environment
from kvprofile.scoring.prompts import encode
from kvprofile.verify import comparison
from kvprofile.verify.child_process import EngineFailedError, EngineRun, run_engine
from kvprofile.verify.comparison import Compared, Returned
from kvprofile.verify.request_plan import STEADY, RequestPlan, plan_requests
from kvprofile.verify.verify_options import VerifyOptions

DEFAULT_RETENTION = 0.5
SEATS = 16
"""Most requests of a batch in one step."""

SIMULATION, ALONE = "simulation", "alone"
"""What budgets are compared with: the simulation or, where there is none, the same engine one request at a time."""


@dataclass(frozen=True)
class Finding:
    """One check of one kind of budget: what was compared, and where it does not hold."""

    name: str
    detail: str
    problems: tuple[str, ...] = ()

    @property
    def good(self) -> bool:
        """Whether it holds."""
        return not self.problems


@dataclass
class KindResult:
    """What was found of one kind of budget. ``seconds`` for each token of an answer, stock's and the plugin's.

    The plugin's hold the filling of freed blocks where they were ``poisoned``.
    """

    kind: str
    origin: str
    findings: list[Finding] = field(default_factory=list)
    seconds: dict[str, float | None] = field(default_factory=dict)
    key: Mapping[str, str | int] | None = None
    poisoned: bool = False

    @property
    def good(self) -> bool:
        """Whether every check holds."""
        return all(each.good for each in self.findings)


@dataclass(frozen=True)
class Verification:
    """All kinds, and the file of attestations; ``attested`` says whether it holds one for each of them now."""

    results: tuple[KindResult, ...]
    path: Path

    @property
    def attested(self) -> bool:
        """Whether everything holds."""
        return all(each.good for each in self.results)


@dataclass(frozen=True)
class _Budget:
    """One kind of budget as the plugin reads it."""

    kind: str
    settings: Settings
    heads: EngineBudget
    origin: str
    probe: Probe | None

    @property
    def variables(self) -> dict[str, str]:
        """The plugin's variables that make an engine serve it."""
        asked = self.settings
        found = {"BUDGET": str(asked.budget.resolve() if asked.budget else ""), "KIND": self.kind}
        found |= {"WINDOW": asked.window, "SINK": str(self.heads.sink_tokens), "RECENT": str(self.heads.recent_tokens)}
        if asked.retention is not None:
            found["RETENTION"] = f"{asked.retention:g}"
        found["ALLOW_UNTESTED"] = ",".join(sorted(asked.allow_untested | {"platform"}))
        return {PREFIX + name: value for name, value in found.items()}


@dataclass(frozen=True)
class Prepared:
    """A verification that could start: everything wrong with the input was refused before."""

    options: VerifyOptions
    description: Description
    budgets: tuple[_Budget, ...]
    plan: RequestPlan
    path: Path
    arguments: Mapping[str, Any]

    @property
    def without_simulation(self) -> str | None:
        """Why a simulation cannot be compared with; None where it can."""
        if self.options.engine.tensor_parallel_size > 1:
            return "tensor-parallel engines"
        if self.description.quantisation is not None:
            return f"weights quantised by {self.description.quantisation.method}"
        return None


def prepare(options: VerifyOptions) -> Prepared:
    """Read model, budgets and texts. Raises InputError for whatever is wrong with them."""
    settings = _settings(options)
    source = checkpoint.locate(options.model, options.revision, options.trust_remote_code)
    if source.gguf:
        raise InputError(f"{source.path}: vLLM does not serve a .gguf file here; give a folder of safetensors")
    description = checkpoint.describe(source, options.trust_remote_code)
    geometry = description.geometry
    served = Served(
        names=(str(description.source.folder), description.source.name),
        layers=geometry.layers,
        attention_heads=geometry.attention_heads,
        kv_heads=geometry.kv_heads,
        head_size=geometry.head_size,
        tensor_parallel_size=options.engine.tensor_parallel_size,
    )
    engine = options.engine.arguments()
    try:
        path = file_of(settings, served)
        if settings.retention is None and isinstance(servable.read(path), Profile):
            settings = replace(settings, retention=DEFAULT_RETENTION)
        settings = replace(settings, budget=path)
        kinds = options.kind or (kind_of(settings, servable.read(path)),)
        budgets = tuple(_budget(kind, settings, served) for kind in dict.fromkeys(kinds))
    except ValueError as error:
        raise InputError(str(error)) from error
    output = options.output or attestation.path_of(path)
    require_writable(output)
    tokenizer = checkpoint.load_tokenizer(description.source, options.trust_remote_code)
    texts = [
        token for name in bundled_names() for text in load_corpus(name).texts for token in encode(tokenizer, text.text)
    ]
    heads = budgets[0].heads
    plan = plan_requests(
        texts, heads.sink_tokens, heads.recent_tokens, options.engine.block_size, options.engine.max_model_len,
        options.seed,
    )  # fmt: skip
    if plan.max_model_len > description.max_positions:
        raise InputError(
            f"requests of {plan.max_model_len} tokens are tried, but {description.position_reason}; pass a smaller "
            "--max-model-len"
        )
    return Prepared(options, description, budgets, plan, output, _arguments(options, description, plan, engine))


def verify(prepared: Prepared, say: Callable[[str], None]) -> Verification:
    """Start the engines, compare, and write or withdraw attestations.

    Raises InputError where an engine cannot be started so.
    """
    plan, model = prepared.plan, prepared.budgets[0]
    if importlib.util.find_spec("vllm") is None:
        raise InputError("vLLM is not installed here, and verify starts its engines; run it where vLLM serves")
    with tempfile.TemporaryDirectory(prefix="kvprofile-verify-") as place:
        folder, name = Path(place), _model_name(model)

        def run(what: str, variables: Mapping[str, str] | None, **changes: Any) -> EngineRun:
            say(f"engine: {what}")
            arguments = {**prepared.arguments, **changes}
            return run_engine(folder, what, name, arguments, plan, variables)

        try:
            stock = run("stock vLLM", None)
        except EngineFailedError as error:
            raise InputError(f"stock vLLM fails at these requests: {error}") from error
        poisoned = stock.facts["platform"] == "cpu" and stock.facts["model_runner"] == "V1"
        results = []
        served: dict[str, EngineRun] = {}
        checks: dict[str, dict[str, Any]] = {}
        for budget in prepared.budgets:
            result = KindResult(budget.kind, budget.origin, poisoned=poisoned)
            results.append(result)
            checks[budget.kind] = _engines(prepared, budget, stock, poisoned, run, result, served)
        _simulate(prepared, served, results, checks, say)
        for result in results:
            _keep(prepared.path, result, checks[result.kind])
    return Verification(tuple(results), prepared.path)


def _engines(
    prepared: Prepared,
    budget: _Budget,
    stock: EngineRun,
    poisoned: bool,
    run: Callable[..., EngineRun],
    result: KindResult,
    served: dict[str, EngineRun],
) -> dict[str, Any]:
    """The engines of one kind, and what can be said without the simulation. Gives the checks of an attestation."""
    plan, dtype = prepared.plan, comparison.rounding_of(stock.facts)
    checks: dict[str, Any] = {}
    longer = budget.variables | {f"{PREFIX}RECENT": str(plan.max_model_len)}
    poison = {f"{PREFIX}POISON": "1"} if poisoned else {}
    try:
        same = run(f"{budget.kind} heads, nothing trimmed", longer | poison)
        compared = comparison.answers(plan, stock, same, dtype)
        result.findings.append(_told("like stock", compared, "split layers, a window as long as the longest request"))
        checks["stock"] = compared.as_check()
        own = run(f"{budget.kind} heads", budget.variables | poison)
        served[budget.kind] = own
        result.key = own.facts["key"]
        returned = comparison.blocks(plan, own, _rule(budget, own))
        result.findings.append(_given_back(returned))
        checks["blocks"] = {"requests": returned.requests, "given_back": returned.given_back}
        checks["load"] = comparison.load_of(plan, own, poisoned)
        result.findings.append(_went_through(checks["load"]))
        result.seconds = {
            "stock": comparison.seconds_per_token(stock, STEADY),
            "plugin": comparison.seconds_per_token(own, STEADY),
        }
        if prepared.without_simulation:
            alone = run(
                f"{budget.kind} heads, one request at a time", budget.variables | poison, max_num_seqs=1,
                max_num_batched_tokens=plan.max_model_len, enable_prefix_caching=False,
                kv_cache_memory_bytes=2 * prepared.arguments["kv_cache_memory_bytes"],
            )  # fmt: skip
            compared = comparison.answers(plan, alone, own, dtype, first_life=True)
            why = f"weaker: the same engine, one request at a time; no simulation of {prepared.without_simulation}"
            result.findings.append(_told("like alone", compared, why))
            checks["reference"] = {"against": ALONE, **compared.as_check()}
    except EngineFailedError as error:
        result.findings.append(Finding("engine", "it ended while it answered", (str(error),)))
        if result.key is None and error.key is not None:  # of the budget with its own window
            from kvprofile.runtime import metrics  # needs a package that comes with vLLM

            result.key = {**error.key, "budget": metrics.identity(budget.heads)}
    return checks


def _simulate(
    prepared: Prepared,
    served: Mapping[str, EngineRun],
    results: list[KindResult],
    checks: dict[str, dict[str, Any]],
    say: Callable[[str], None],
) -> None:
    """Every served token against the simulation, the engines being gone and their memory free."""
    if prepared.without_simulation or not served:
        return
    say("simulation: reading what the engines wrote")
    from kvprofile.verify.teacher_forcing import SimulatedModel

    facts = next(iter(served.values())).facts
    model = SimulatedModel(prepared.description, str(facts["dtype"]), str(facts["platform"]), prepared.plan)
    for budget, result in zip(prepared.budgets, results, strict=True):
        if budget.kind not in served:
            continue
        own = served[budget.kind]
        shares = budget.heads.shares
        empty = [None] * prepared.description.geometry.kv_heads
        heads = [empty if row is None else list(row) for row in shares]
        compared = model.compare(prepared.plan, own, heads, _rule(budget, own), budget.probe)
        result.findings.append(_told("like simulated", compared, "every served token, the budget as it is"))
        checks[budget.kind]["reference"] = {"against": SIMULATION, **compared.as_check()}


def _keep(path: Path, result: KindResult, checks: dict[str, Any]) -> None:
    """Attest a kind that holds; withdraw what was attested of one that does not."""
    if result.key is None:
        return
    new = None
    if result.good:
        measured = {"date": datetime.datetime.now(datetime.UTC).date().isoformat(), "seconds_per_token": result.seconds}
        new = Attestation(result.key, checks, measured)
    if new is not None or path.is_file():
        attestation.save(path, attestation.with_one_more(path, result.key, new))


def _told(name: str, compared: Compared, what: str) -> Finding:
    found = compared.as_check()
    detail = (
        f"{what}: {found['tokens']} tokens, {found['near_ties']} near ties; largest difference {found['largest']:g} of "
        f"{found['most']:g} nats, mean {found['mean']:g} of {found['most_mean']:g}"
    )
    if compared.margins.far_share:
        detail += f", {found['far']} of {found['most_far']} further apart"
    return Finding(name, detail, tuple(compared.problems))


def _given_back(returned: Returned) -> Finding:
    detail = f"{returned.given_back} by {returned.requests} requests, each as the rule says; the pool is whole again"
    return Finding("blocks given back", detail, tuple(returned.problems))


def _went_through(load: Mapping[str, Any]) -> Finding:
    freed = (
        "freed blocks were filled with NaN" if load["poisoned"] else "freed blocks could not be filled with NaN here"
    )
    detail = (
        f"{load['preemptions']} preemptions, {load['prefix_hits']} prefix hits, {load['chunks']} prompts in chunks, up "
        f"to {load['longest_request']} tokens; {freed}"
    )
    missing = [name for name in ("preemptions", "chunks") if not load[name]]
    problems = tuple(f"no {name}: try another --seed or --max-model-len" for name in missing)
    return Finding("load", detail, problems)


def _rule(budget: _Budget, run: EngineRun) -> TrimRule:
    return TrimRule(
        budget.heads.sink_tokens, budget.heads.recent_tokens, int(run.facts["key"]["block_size"]), budget.heads.window
    )


def _settings(options: VerifyOptions) -> Settings:
    """The plugin's settings: of the environment, and of options where they are given."""
    given = {"BUDGET": options.profile, "RETENTION": options.retention}
    named = {PREFIX + name: str(value) for name, value in given.items() if value is not None}
    for kind in options.kind:
        require_kind(kind)
    if options.profile is not None and options.retention is None:
        named[PREFIX + "RETENTION"] = ""  # the environment's is for another file
    try:
        return from_environment({**os.environ, **named})
    except ValueError as error:
        raise InputError(str(error)) from error


def _budget(kind: str, settings: Settings, served: Served) -> _Budget:
    asked = replace(settings, kind=kind)
    heads, origin = find(asked, served)
    if heads.full == heads.heads:
        raise InputError(f"{origin}: every head is full, so there is nothing to verify; ask for a smaller --retention")
    probe = None
    if kind == GRADED and asked.budget is not None:
        found = servable.read(asked.budget)
        probe = probes.load(probes.path_of(asked.budget), found) if isinstance(found, Profile) else None
    return _Budget(kind, asked, heads, origin, probe)


def _model_name(budget: _Budget) -> str:
    from kvprofile.runtime.find import model_name

    return model_name(budget.settings.budget) or "" if budget.settings.budget else ""


def _arguments(
    options: VerifyOptions, description: Description, plan: RequestPlan, engine: Mapping[str, Any]
) -> dict[str, Any]:
    """Arguments of ``vllm.LLM`` for all engines but for what some change."""
    own = str(getattr(description.config, "dtype", None) or "bfloat16").removeprefix("torch.")
    dtype = engine["dtype"] if engine["dtype"] in MODEL_DTYPES else own
    ranks = min(options.engine.tensor_parallel_size, description.geometry.kv_heads)
    token_bytes = description.geometry.values_per_token * value_bytes(engine["kv_cache_dtype"], dtype) // ranks
    return {
        "model": str(description.source.folder),
        "served_model_name": [description.source.name],
        "skip_tokenizer_init": True,
        "trust_remote_code": options.trust_remote_code,
        "max_model_len": plan.max_model_len,
        "max_num_seqs": SEATS,
        "max_num_batched_tokens": plan.chunk_tokens,
        "enable_prefix_caching": not description.keeps_states,
        "kv_cache_memory_bytes": token_bytes * plan.pool_tokens,
        "disable_log_stats": False,
        **engine,
    }
