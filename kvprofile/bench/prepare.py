"""From options to a plan: the defaults, each with its reason, and what a plan needs and would cost before it runs."""

from __future__ import annotations

import hashlib
import importlib.util
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from kvprofile.bench import documents, providers
from kvprofile.bench.bench_options import BenchOptions
from kvprofile.bench.scenario import SEED_RETENTIONS, BenchPlan, local_legs, remote_legs
from kvprofile.bench.verifiers import choose
from kvprofile.budget import probe, servable, store
from kvprofile.budget.dtypes import PLAIN
from kvprofile.budget.model_shape import find_shape
from kvprofile.budget.profile import Profile
from kvprofile.budget.trim import GRADED, WHOLE
from kvprofile.errors import InputError, plain
from kvprofile.files import bundled_model

PRESETS = ("seed",)
SEED_PROVIDER = "moonshot"
SEED_REPETITIONS = 2
CHARACTERS_PER_TOKEN = 3.7
"""Of the bundled documents, as benchmarks/documents/README.md counts; for estimates before anything is tokenised."""

ROOM_TOKENS = 12_000
"""Positions that the bundled documents need with an opening, a question and an answer, roughly rounded up."""


@dataclass(frozen=True)
class Prepared:
    """A plan, and the reason of every choice that was not asked for."""

    plan: BenchPlan
    reasons: tuple[str, ...]


def prepare(asked: BenchOptions) -> Prepared:
    """The plan that options stand for. Raises InputError where there is none."""
    if asked.preset not in (None, *PRESETS):
        raise InputError(f"no preset {asked.preset!r}; there is {', '.join(PRESETS)}")
    asked = replace(asked, model=str(bundled_model(asked.model) or asked.model))
    reasons = []
    if asked.preset is not None:
        reasons.append(
            f"preset {asked.preset}: baseline, retentions 0.9, 0.7 and 0.5, and a provider, as far as not given"
        )
    # remote legs: the providers asked for, else the preset's
    name = _model_name(asked.model)
    chosen = asked.providers or ((SEED_PROVIDER,) if asked.preset else ())
    remote = remote_legs([providers.choose(each, asked.providers_file) for each in chosen])
    for each in (leg.provider for leg in remote if leg.provider is not None):
        if each.base_url is not None:
            key = f", with {each.key_env}" if each.key_env else ""
            reasons.append(f"provider {each.name}: {each.base_url}{key}")
    # local legs, and the budget file that those with a retention are served with
    retentions = asked.retentions or SEED_RETENTIONS
    profile = asked.profile
    if profile is None and store.is_file(store.default_path(name)):
        profile = store.default_path(name)
        reasons.append(f"budget file: {profile}")
    if profile is not None and not store.is_file(profile):
        raise InputError(f"no budget file {profile}; run 'kvprofile score {asked.model}' first")
    kinds, caches = asked.kinds or (_default_kind(profile),), asked.kv_cache_dtypes or (PLAIN,)
    local = local_legs(retentions, asked.baseline, kinds, caches) if asked.local else ()
    if profile is not None and any(leg.heads == GRADED for leg in local):
        _require_probe(profile)
    # what is asked: documents that the model can read, verifiers that exist
    references, reason = _documents(asked)
    reasons += [reason] if reason else []
    choose(asked.verifiers)
    plan = BenchPlan(
        model=asked.model,
        model_name=name,
        legs=(*local, *remote),
        documents=tuple(documents.load(references)),
        load=asked.load,
        engine=asked.engine,
        profile=None if profile is None else str(profile),
        profile_sha256=None if profile is None else hashlib.sha256(profile.read_bytes()).hexdigest(),
        provider_model=asked.provider_model,
        repetitions=_repetitions(asked),
        seed=asked.seed,
        attention_pass=asked.attention_pass,
        verifiers=asked.verifiers,
        preset=asked.preset,
        name=f"{name} bench",
    )
    return Prepared(plan, tuple(reasons))


def _default_kind(path: Path | None) -> str:
    return WHOLE if path is None else servable.default_kind(servable.read(path))


def _require_probe(path: Path) -> None:
    """Raise InputError where a file has no graded budgets, or no probe next to it."""
    found = servable.read(path)
    if not isinstance(found, Profile):
        raise InputError(f"{path} is a runtime file, which holds whole heads; give a budget file, or leave out --kind")
    probe.read(probe.path_of(path), found)


def default_folder(plan: BenchPlan) -> Path:
    """runs/bench/<model>/<settings>: the same settings find their folder again."""
    model = store.file_name(plan.model_name).removesuffix(".json")
    return Path("runs/bench") / model / plan.run_key()[:12]


def missing(plan: BenchPlan, environ: Mapping[str, str] = os.environ) -> list[str]:
    """What is not here and would make legs fail, one line each: libraries, then keys."""
    found = _missing_libraries(plan)
    for leg in plan.legs:
        if leg.provider is not None:
            try:
                leg.provider.key(environ)
            except InputError as error:
                found.append(str(error))
    return found


def require_installed(plan: BenchPlan) -> None:
    """Raise InputError where a library that every leg needs is missing. Missing keys fail their own leg only."""
    for line in _missing_libraries(plan):
        raise InputError(line)


def _missing_libraries(plan: BenchPlan) -> list[str]:
    found = []
    serves = any(leg.kind == "local" or (leg.provider is not None and leg.provider.serve) for leg in plan.legs)
    if serves and importlib.util.find_spec("vllm") is None:
        found.append("vLLM is not installed here: pip install vllm, or 'make install-vllm' in a checkout")
    extra = [
        name for name in ("openai", "sacrebleu", "rouge_score", "jsonschema") if importlib.util.find_spec(name) is None
    ]
    if extra:
        found.append(f"{', '.join(extra)} not installed: pip install 'kvprofile[bench]'")
    return found


def estimate(plan: BenchPlan) -> dict[str, Any]:
    """What a run would send and cost, before anything is tokenised: lengths are guesses from characters."""
    characters = [len(document.text) for document in plan.documents]
    mean_tokens = sum(characters) / len(characters) / CHARACTERS_PER_TOKEN
    requests = plan.requests + plan.load.warmup_requests
    read = round(requests * mean_tokens)
    written = requests * plan.load.max_output_tokens
    costs: dict[str, Any] = {}
    for leg in plan.legs:
        if leg.provider is not None:
            prices = leg.provider.prices
            amount = None if prices is None else prices.amount(read, 0, written) * plan.repetitions
            costs[leg.name] = {"amount": amount, "currency": None if prices is None else prices.currency}
    return {
        "requests_per_leg": requests,
        "input_tokens_per_leg": read,
        "output_tokens_per_leg_at_most": written,
        "runs_of_legs": len(plan.schedule),
        "cost_at_most": costs,
    }


def described(plan: BenchPlan, reasons: Sequence[str]) -> dict[str, Any]:
    """A plan as --dry-run --json prints it."""
    return {
        "model": plan.model_name,
        "preset": plan.preset,
        "legs": [
            {
                "name": leg.name,
                "kind": leg.kind,
                "retention": leg.retention,
                "heads": leg.heads if leg.retention is not None else None,
                "provider": None if leg.provider is None else leg.provider.name,
            }
            for leg in plan.legs
        ],
        "repetitions": plan.repetitions,
        "schedule": [[leg.name, repetition] for leg, repetition in plan.schedule],
        "documents": [
            {
                "name": document.name,
                "sha256": document.sha256,
                "characters": len(document.text),
                "tokens_estimate": round(len(document.text) / CHARACTERS_PER_TOKEN),
                "questions": len(document.questions),
            }
            for document in plan.documents
        ],
        "profile": plan.profile,
        "settings": plan.settings(),
        "estimate": estimate(plan),
        "missing": missing(plan),
        "reasons": list(reasons),
    }


def _repetitions(asked: BenchOptions) -> int:
    if asked.repetitions is not None:
        return asked.repetitions
    return SEED_REPETITIONS if asked.preset else 1


def _model_name(model: str) -> str:
    """What records call a model: a folder's last part, else the hub id itself."""
    path = Path(model).expanduser()
    return plain(path.resolve().name if store.is_dir(path) else model)[:200]


def _documents(asked: BenchOptions) -> tuple[tuple[str, ...], str | None]:
    """The documents asked for, else those that the model can read, with the reason."""
    if asked.documents:
        return asked.documents, None
    try:
        positions = find_shape(asked.model).max_positions
    except InputError:
        positions = None
    if positions is not None and positions < ROOM_TOKENS:
        why = f"documents: pocket:{asked.seed}, short and generated, because the model reads {positions:,} positions"
        return (f"{documents.POCKET}:{asked.seed}",), why
    return (documents.BUNDLED,), "documents: the bundled ones, about 9,000 tokens each"
