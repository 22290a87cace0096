"""From options to a plan: the defaults, each with its reason, and what a plan needs and would cost before it runs."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from kvprofile.bench import documents, providers
from kvprofile.bench.scenario import SEED_RETENTIONS, BenchPlan, EngineOptions, LoadPlan, local_legs, remote_legs
from kvprofile.bench.verifiers import choose
from kvprofile.budget import store
from kvprofile.budget.model_shape import find_shape
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
class Wish:
    """What a user asked for; None and empty leave the choice to the preset and the defaults."""

    model: str
    profile: Path | None = None
    retentions: tuple[float, ...] = ()
    baseline: bool = True
    local: bool = True
    documents: tuple[str, ...] = ()
    providers: tuple[str, ...] = ()
    providers_file: Path | None = None
    provider_model: str | None = None
    verifiers: tuple[str, ...] = ()
    repetitions: int | None = None
    seed: int = 0
    attention_pass: bool = True
    preset: str | None = None
    load: LoadPlan = field(default_factory=LoadPlan)
    engine: EngineOptions = field(default_factory=EngineOptions)


@dataclass(frozen=True)
class Prepared:
    """A plan, and the reason of every choice that was not asked for."""

    plan: BenchPlan
    reasons: tuple[str, ...]


def prepare(wish: Wish) -> Prepared:
    """The plan that a wish stands for. Raises InputError where there is none."""
    if wish.preset not in (None, *PRESETS):
        raise InputError(f"no preset {wish.preset!r}; there is {', '.join(PRESETS)}")
    wish = replace(wish, model=str(bundled_model(wish.model) or wish.model))
    reasons = []
    if wish.preset is not None:
        reasons.append(
            f"preset {wish.preset}: baseline, retentions 0.9, 0.7 and 0.5, and a provider, as far as not given"
        )
    name = _model_name(wish.model)
    chosen = wish.providers or ((SEED_PROVIDER,) if wish.preset else ())
    remote = remote_legs([providers.choose(each, wish.providers_file) for each in chosen])
    for each in (leg.provider for leg in remote if leg.provider is not None):
        if each.base_url is not None:
            key = f", with {each.key_env}" if each.key_env else ""
            reasons.append(f"provider {each.name}: {each.base_url}{key}")
    retentions = wish.retentions or SEED_RETENTIONS
    local = local_legs(retentions, wish.baseline) if wish.local else ()
    profile = wish.profile
    if profile is None and store.is_file(store.default_path(name)):
        profile = store.default_path(name)
        reasons.append(f"budget file: {profile}")
    if profile is not None and not store.is_file(profile):
        raise InputError(f"no budget file {profile}; run 'kvprofile score {wish.model}' first")
    references, reason = _documents(wish)
    reasons += [reason] if reason else []
    choose(wish.verifiers)
    plan = BenchPlan(
        model=wish.model,
        model_name=name,
        legs=(*local, *remote),
        documents=tuple(documents.load(references)),
        load=wish.load,
        engine=wish.engine,
        profile=None if profile is None else str(profile),
        profile_sha256=None if profile is None else hashlib.sha256(profile.read_bytes()).hexdigest(),
        provider_model=wish.provider_model,
        repetitions=_repetitions(wish),
        seed=wish.seed,
        attention_pass=wish.attention_pass,
        verifiers=wish.verifiers,
        preset=wish.preset,
        name=f"{name} bench",
    )
    return Prepared(plan, tuple(reasons))


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


def parse_size(text: str, option: str) -> int:
    """'64MiB', '4 GB' -> bytes. Raises InputError, which names the option."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]i?b)\s*", text, re.IGNORECASE)
    if found is None:
        raise InputError(f"{option} {text!r} is no size; give a number with its unit, like 64MiB or 4GiB")
    base = 1024 if "i" in found[2].lower() else 1000
    size = int(float(found[1]) * base ** ("kmgt".index(found[2][0].lower()) + 1))
    if not 0 < size < 2**60:
        raise InputError(f"{option} {text!r} must lie between 1 byte and 1 EiB")
    return size


def _repetitions(wish: Wish) -> int:
    if wish.repetitions is not None:
        return wish.repetitions
    return SEED_REPETITIONS if wish.preset else 1


def _model_name(model: str) -> str:
    """What records call a model: a folder's last part, else the hub id itself."""
    path = Path(model).expanduser()
    return plain(path.resolve().name if store.is_dir(path) else model)[:200]


def _documents(wish: Wish) -> tuple[tuple[str, ...], str | None]:
    """The documents asked for, else those that the model can read, with the reason."""
    if wish.documents:
        return wish.documents, None
    try:
        positions = find_shape(wish.model).max_positions
    except InputError:
        positions = None
    if positions is not None and positions < ROOM_TOKENS:
        why = f"documents: pocket:{wish.seed}, short and generated, because the model reads {positions:,} positions"
        return (f"{documents.POCKET}:{wish.seed}",), why
    return (documents.BUNDLED,), "documents: the bundled ones, about 9,000 tokens each"
