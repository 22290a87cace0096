"""Profiles made up for tests: any shape, any scores, always valid, the same for the same arguments."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

from kvprofile import __version__
from kvprofile.budget.allocate import preset_budgets
from kvprofile.budget.probe import FEATURES
from kvprofile.budget.profile import (
    DEFAULT_RECENT_TOKENS,
    DEFAULT_SINK_TOKENS,
    FULL_ATTENTION,
    GRADED_PRESETS,
    GRADED_VERSION,
    NO_CACHE,
    SLIDING_ATTENTION,
    WHOLE_VERSION,
    CorpusRecord,
    Geometry,
    HeadBudgets,
    ImportedFrom,
    Matrix,
    ModelIdentity,
    ProbeRecord,
    Profile,
    Runtime,
    Scores,
    Scoring,
    mean_budget,
    retention_key,
)
from kvprofile.budget.runtime_file import RuntimeFile, RuntimeModel, RuntimeProvenance


def make_geometry(
    layers: int = 6,
    kv_heads: int = 4,
    *,
    query_groups: int = 2,
    head_size: int = 64,
    sliding: Sequence[int] = (),
    stateful: Sequence[int] = (),
) -> Geometry:
    """A geometry; ``sliding`` names the layers with a sliding window, ``stateful`` those with a state and no cache."""
    kinds = dict.fromkeys(sliding, SLIDING_ATTENTION) | dict.fromkeys(stateful, NO_CACHE)
    return Geometry(
        layers=layers,
        attention_heads=kv_heads * query_groups,
        kv_heads=kv_heads,
        head_size=head_size,
        layer_types=[kinds.get(layer, FULL_ATTENTION) for layer in range(layers)],
    )


def random_scores(geometry: Geometry, seed: int = 0, ceiling: float = 1.3) -> Matrix:
    """Scores [L][G] in [0, 1]; values above 1 are cut to 1.0, so that a part of the heads ties as in KVzip's files."""
    generator = random.Random(seed)
    return [
        [round(min(1.0, generator.uniform(0.02, ceiling)), 4) for _ in range(geometry.kv_heads)]
        if kind == FULL_ATTENTION
        else [None] * geometry.kv_heads
        for kind in geometry.layer_types
    ]


def make_profile(
    layers: int = 6,
    kv_heads: int = 4,
    *,
    name: str = "example/model",
    query_groups: int = 2,
    head_size: int = 64,
    sliding: Sequence[int] = (),
    stateful: Sequence[int] = (),
    scores: Matrix | None = None,
    mean: Matrix | None = None,
    seed: int = 0,
    method: str = "kvzip",
    statistic: str = "max",
    chunk_tokens: int | None = 2000,
    corpus_sha256: str = "c" * 64,
    weights_sha256: str | None = "a" * 64,
    tokenizer_sha256: str | None = "b" * 64,
    imported: bool = False,
    sink_tokens: int = DEFAULT_SINK_TOKENS,
    recent_tokens: int = DEFAULT_RECENT_TOKENS,
) -> Profile:
    """A valid profile. ``imported`` gives one without corpora, weights, tokenizer and chunk length."""
    geometry = make_geometry(
        layers, kv_heads, query_groups=query_groups, head_size=head_size, sliding=sliding, stateful=stateful
    )
    matrix = random_scores(geometry, seed) if scores is None else scores
    statistics = Scores(significant_digits=6, max=matrix, mean=mean, p99=None, spread=None)
    source = ImportedFrom(
        format="kvzip",
        repository="https://github.com/snu-mllab/KVzip",
        file="utils/head_score/example.pt",
        commit="5d84729",
        licence="MIT",
    )
    corpora = [CorpusRecord(name="prose", sha256=corpus_sha256, documents=3, tokens=12_000)]
    return Profile(
        schema_version=WHOLE_VERSION,
        kvprofile_version=__version__,
        model=ModelIdentity(
            name=name,
            revision=None,
            architecture="LlamaForCausalLM",
            geometry=geometry,
            geometry_sha256=geometry.sha256(),
            tokenizer_sha256=None if imported else tokenizer_sha256,
            weights_sha256=None if imported else weights_sha256,
        ),
        scoring=Scoring(
            method=method,
            statistic=statistic,
            chunk_tokens=None if imported else chunk_tokens,
            context_tokens=None,
            prompts_version=None if imported else 1,
            prefix=None,
            suffix=None,
            engine="unknown" if imported else "hf",
            attention="unknown" if imported else "eager: a test",
            dtype="unknown" if imported else "float32",
            device="unknown" if imported else "cpu",
            seed=0,
            corpora=[] if imported else corpora,
            imported_from=source if imported else None,
        ),
        scores=statistics,
        budgets=preset_budgets(statistics, statistic),
        runtime=Runtime(sink_tokens=sink_tokens, recent_tokens=recent_tokens),
    )


def save_runtime_file(
    path: Path,
    geometry: Geometry,
    name: str,
    full_heads: Sequence[Sequence[int] | None],
    *,
    sink_tokens: int,
    recent_tokens: int,
) -> Path:
    """A runtime file at retention 0.5 that keeps these heads of each layer full, written to ``path``."""
    model = ModelIdentity(
        name=name,
        revision=None,
        architecture="test",
        geometry=geometry,
        geometry_sha256=geometry.sha256(),
        tokenizer_sha256=None,
        weights_sha256=None,
    )
    heads = len(geometry.profiled_layers) * geometry.kv_heads
    provenance = RuntimeProvenance(
        kvprofile_version="test",
        profile_sha256="none",
        method="test",
        statistic="test",
        imported_from=None,
        retention_asked=0.5,
        retention_realised=sum(len(row) for row in full_heads if row is not None) / heads,
        reason=None,
        floor=0,
        tensor_parallel_size=1,
        pipeline_stages=[],
    )
    found = RuntimeFile(
        model=RuntimeModel.of(model),
        full_heads=[None if row is None else list(row) for row in full_heads],
        kv_head_order=None,
        sink_tokens=sink_tokens,
        recent_tokens=recent_tokens,
        provenance=provenance,
    )
    path.write_bytes(found.to_bytes())
    return path


def make_graded(*, seed: int = 0, probe_sha256: str = "0" * 64, **changes) -> Profile:
    """A profile whose budgets are graded: random shares that rise with the retention, and a record of a probe."""
    base = make_profile(seed=seed, **changes)
    geometry = base.model.geometry
    rng = random.Random(seed)
    draws = [[rng.random() for _ in range(geometry.kv_heads)] for _ in range(geometry.layers)]
    budgets = {}
    for retention in GRADED_PRESETS:
        mean = sum(map(sum, draws)) / (geometry.layers * geometry.kv_heads)
        scale = min(retention / mean, (1.0 - retention) / max(1e-9, max(map(max, draws)) - mean))
        heads = [
            [
                round(retention + scale * (value - mean), 6) if layer in geometry.profiled_layers else None
                for value in row
            ]
            for layer, row in enumerate(draws)
        ]
        budgets[retention_key(retention)] = HeadBudgets(heads=heads, retention_realised=mean_budget(heads))
    record = ProbeRecord(
        sha256=probe_sha256, features=FEATURES, target="log(KVzip score + 0.0001)", tokens=1000,
        r2=[0.5 if layer in geometry.profiled_layers else None for layer in range(geometry.layers)],
    )  # fmt: skip
    return base.model_copy(update={"schema_version": GRADED_VERSION, "budgets": budgets, "probe": record})
