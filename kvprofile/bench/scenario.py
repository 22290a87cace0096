"""What a benchmark does, before it does anything: legs, load, documents and engine options, checked and printable."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from kvprofile.bench.bench_options import EngineOptions, LoadPlan
from kvprofile.bench.documents import BenchDocument
from kvprofile.bench.providers import Provider
from kvprofile.budget.allocate import require_retention
from kvprofile.budget.choice import require_kind
from kvprofile.budget.dtypes import PLAIN, require_kv_cache_dtype
from kvprofile.budget.trim import WHOLE
from kvprofile.errors import InputError
from kvprofile.files import sha256_of

BASELINE = "baseline"
SEED_RETENTIONS = (0.9, 0.7, 0.5)
"""The retentions of the experiment plan that the project began with."""


@dataclass(frozen=True)
class LegPlan:
    """One leg: local with a retention (None: without budgets) of whole or graded ``heads``, or at a provider.

    ``cache`` is vLLM's ``kv_cache_dtype``.
    """

    name: str
    retention: float | None = None
    provider: Provider | None = None
    heads: str = WHOLE
    cache: str = PLAIN

    @property
    def kind(self) -> Literal["local", "remote"]:
        """Where the model runs."""
        return "local" if self.provider is None else "remote"


@dataclass(frozen=True)
class BenchPlan:
    """Everything a run depends on. ``model_name`` is what records call the model: never a path."""

    model: str
    model_name: str
    legs: tuple[LegPlan, ...]
    documents: tuple[BenchDocument, ...]
    load: LoadPlan = field(default_factory=LoadPlan)
    engine: EngineOptions = field(default_factory=EngineOptions)
    profile: str | None = None
    profile_sha256: str | None = None
    provider_model: str | None = None
    repetitions: int = 1
    seed: int = 0
    attention_pass: bool = True
    verifiers: tuple[str, ...] = ()
    preset: str | None = None
    name: str = "bench"

    def __post_init__(self) -> None:
        names = [leg.name for leg in self.legs]
        if not self.legs:
            raise InputError("nothing to run: every leg was left out")
        if len(set(names)) != len(names):
            raise InputError(f"legs share a name: {', '.join(names)}")
        if not 1 <= self.repetitions <= 1000:
            raise InputError(f"--repetitions must lie between 1 and 1000, not {self.repetitions}")
        if any(leg.kind == "local" and leg.retention is not None for leg in self.legs) and self.profile is None:
            raise InputError(f"no budget file for {self.model_name}; run 'kvprofile score' first or give --profile")

    @property
    def requests(self) -> int:
        """Requests of one leg, warm-up excluded: every question once unless another number is asked for."""
        return self.load.requests or sum(len(document.questions) for document in self.documents)

    @property
    def schedule(self) -> list[tuple[LegPlan, int]]:
        """(leg, repetition) in the order they run: every other repetition backwards, so that drift shows as such."""
        return [
            (leg, repetition)
            for repetition in range(self.repetitions)
            for leg in (self.legs if repetition % 2 == 0 else self.legs[::-1])
        ]

    def seed_of(self, repetition: int) -> int:
        """The seed of all legs of a repetition."""
        return self.seed + repetition

    def run_key(self) -> str:
        """Hash over what legs depend on; how they are judged is left out, and how often, so both may change later."""
        left_out = {"legs", "documents", "verifiers", "preset", "name", "repetitions", "attention_pass"}
        content = {name: value for name, value in asdict(self).items() if name not in left_out}
        documents = [document.model_dump(mode="json") for document in self.documents]
        return sha256_of(json.dumps([content, documents], sort_keys=True, default=str).encode())

    def leg_key(self, leg: LegPlan, repetition: int) -> str:
        """Hash over what one leg depends on."""
        provider = None if leg.provider is None else leg.provider.model_dump(mode="json", exclude={"prices"})
        other = [value for value, usual in ((leg.heads, WHOLE), (leg.cache, PLAIN)) if value != usual]
        content = json.dumps([self.run_key(), leg.name, leg.retention, provider, repetition, *other], sort_keys=True)
        return sha256_of(content.encode())

    def settings(self) -> dict[str, Any]:
        """The options as a run record keeps them: numbers, words and flat lists, no paths."""
        load, engine = asdict(self.load), asdict(self.engine)
        del engine["start_timeout_s"]
        return {
            **{f"load_{name}": value for name, value in load.items()},
            **{f"engine_{name}": list(value) if isinstance(value, tuple) else value for name, value in engine.items()},
            "retentions": [leg.retention for leg in self.legs if leg.kind == "local" and leg.retention is not None],
            "repetitions": self.repetitions,
            "seed": self.seed,
            "verifiers": list(self.verifiers),
        }


def local_legs(
    retentions: Sequence[float],
    baseline: bool = True,
    kinds: Sequence[str] = (WHOLE,),
    caches: Sequence[str] = (PLAIN,),
) -> tuple[LegPlan, ...]:
    """The baseline and one leg for each retention and kind of heads, named '0.5' or 'graded 0.5'.

    There are as many again for each other dtype of the cache, named 'baseline fp8' or '0.5 fp8'.
    """
    for retention in retentions:
        require_retention(retention)
    for cache in caches:
        require_kv_cache_dtype(cache)
    legs = [LegPlan(BASELINE)] if baseline else []
    for retention in dict.fromkeys(retentions):
        for kind in dict.fromkeys(kinds):
            name = f"{retention:g}" if require_kind(kind) == WHOLE else f"{kind} {retention:g}"
            legs.append(LegPlan(name, retention, heads=kind))
    return tuple(
        leg if cache == PLAIN else replace(leg, name=f"{leg.name} {cache}", cache=cache)
        for cache in dict.fromkeys(caches)
        for leg in legs
    )


def remote_legs(providers: Sequence[Provider]) -> tuple[LegPlan, ...]:
    """One leg for each provider: 'remote', or 'remote-NAME' where there are several."""
    if len(providers) == 1:
        return (LegPlan("remote", provider=providers[0]),)
    return tuple(LegPlan(f"remote-{provider.name}", provider=provider) for provider in providers)
