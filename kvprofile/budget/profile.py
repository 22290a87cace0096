"""The profile: what a budget file holds, as one pydantic model, and nothing about how it is made or stored.

A matrix is a list of L rows (layers, input to output) of G columns (KV heads). ``None`` marks a layer that is not
profiled (sliding-window layers, and layers without a cache): such a row holds only ``None``.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator
from typing import Annotated, Any, Literal, Self, TypeAlias

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)

WHOLE_VERSION, GRADED_VERSION = 1, 2
SCHEMA_VERSIONS = (WHOLE_VERSION, GRADED_VERSION)
"""1: budgets of whole heads, or fractions that came from elsewhere. 2: graded budgets, and the probe they need."""

PRESETS: tuple[float, ...] = (0.9, 0.7, 0.5, 0.3)
"""Retentions whose budgets every profile carries."""

GRADED_PRESETS: tuple[float, ...] = (*PRESETS, 0.2, 0.15)
"""Retentions whose graded budgets a profile with a probe carries: few enough bytes for whole heads to fail."""

DEFAULT_SINK_TOKENS = 128
DEFAULT_RECENT_TOKENS = 256
"""Sinks and window of DuoAttention (arXiv 2410.10819, section 3)."""

FULL_ATTENTION = "full_attention"
SLIDING_ATTENTION = "sliding_attention"
NO_CACHE = "no_cache"
"""A layer without a cache of the text of its own: linear attention, a state-space or convolution layer, cross-attention
to images, or one that reads another layer's cache."""

LAYER_TYPES = (FULL_ATTENTION, SLIDING_ATTENTION, NO_CACHE)

Row: TypeAlias = list[float | None]
Matrix: TypeAlias = list[Row]


def _printable(text: str) -> str:
    if not text.isprintable():
        raise ValueError("holds characters that a terminal cannot print")
    return text


Printable = Annotated[str, AfterValidator(_printable)]
"""Text that is shown to people: no control characters, so no file can command a terminal."""

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
CommitSha = Annotated[str, Field(pattern=r"^[0-9a-f]{7,64}$")]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


def cached_values(kv_heads: int, key_size: int, value_size: int) -> int:
    """Values that one token adds to a layer's cache: a key and a value for every KV head."""
    return kv_heads * (key_size + value_size)


class Geometry(_Part):
    """The shape that budgets depend on; everything that must agree between a file and the model it is used with.

    Heads are those of the full-attention layers, which are the layers that have budgets.
    """

    layers: int = Field(ge=1, le=4096, description="L, decoder layers")
    attention_heads: int = Field(ge=1, le=65536, description="H, query heads of a layer")
    kv_heads: int = Field(ge=1, le=65536, description="G, key-value heads of a layer")
    head_size: int = Field(ge=1, le=65536, description="D, dimensions of a key")
    layer_types: list[str] = Field(description="full_attention, sliding_attention or no_cache, one for each layer")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if len(self.layer_types) != self.layers:
            raise ValueError(f"layer_types has {len(self.layer_types)} entries for {self.layers} layers")
        unknown = sorted(set(self.layer_types) - set(LAYER_TYPES))
        if unknown:
            raise ValueError(f"unknown layer type {unknown[0]!r}; known: {', '.join(LAYER_TYPES)}")
        if self.attention_heads % self.kv_heads:
            raise ValueError(f"{self.attention_heads} query heads do not divide into {self.kv_heads} KV heads")
        return self

    @property
    def profiled_layers(self) -> tuple[int, ...]:
        """Indices of the layers whose heads have scores and budgets."""
        return tuple(i for i, kind in enumerate(self.layer_types) if kind == FULL_ATTENTION)

    @property
    def cached_layers(self) -> tuple[int, ...]:
        """Indices of the layers that keep a cache of the text."""
        return tuple(i for i, kind in enumerate(self.layer_types) if kind != NO_CACHE)

    @property
    def values_per_token(self) -> int:
        """Values that one token adds to the caches of all layers, where sliding layers have the same heads."""
        return len(self.cached_layers) * cached_values(self.kv_heads, self.head_size, self.head_size)

    def sha256(self) -> str:
        """Hash of the normalised geometry: equal for a model and its fine-tunes, quantisations and longer RoPEs."""
        return hashlib.sha256(json.dumps(self.model_dump(), sort_keys=True).encode()).hexdigest()

    def describe(self) -> str:
        """One phrase for messages: '48 layers x 8 KV heads (40 query heads, head size 128)'."""
        parts = [f"{self.attention_heads} query heads", f"head size {self.head_size}"]
        for kind, phrase in ((SLIDING_ATTENTION, "sliding"), (NO_CACHE, "without a cache")):
            if kind in self.layer_types:
                parts.append(f"{self.layer_types.count(kind)} {phrase}")
        return f"{self.layers} layers x {self.kv_heads} KV heads ({', '.join(parts)})"


class ModelIdentity(_Part):
    """Which checkpoint was profiled. What cannot be known (an import made offline) is null."""

    name: Printable = Field(min_length=1, max_length=200, description="hub id or folder name")
    revision: CommitSha | None = Field(description="commit of the hub repository, never a branch")
    architecture: Printable = Field(min_length=1, max_length=200, description="class name in the checkpoint's config")
    geometry: Geometry
    geometry_sha256: Sha256
    tokenizer_sha256: Sha256 | None = Field(description="hash over the sorted vocabulary")
    weights_sha256: Sha256 | None = Field(description="hash over sampled bytes of every tensor")

    @model_validator(mode="after")
    def _hash_agrees(self) -> Self:
        if self.geometry_sha256 != self.geometry.sha256():
            raise ValueError("geometry_sha256 does not match geometry; the file was edited by hand")
        return self


class CorpusRecord(_Part):
    """A corpus that was scored: its name, the hash of the texts read, and how much of it was used."""

    name: Printable = Field(min_length=1)
    sha256: Sha256
    documents: int = Field(ge=1)
    tokens: int = Field(ge=1, description="context tokens scored, all documents together")
    cut_to_tokens: int | None = Field(
        default=None, ge=1, description="what documents too long for the model were cut to; absent: none was"
    )

    @model_serializer(mode="wrap")
    def _without_absent_cut(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Files of whole documents do not mention cuts, so theirs and older ones are byte for byte the same."""
        found: dict[str, Any] = dump(self)
        if self.cut_to_tokens is None:
            found.pop("cut_to_tokens", None)
        return found


class ImportedFrom(_Part):
    """Where imported scores were published."""

    format: Printable
    repository: Printable | None
    file: Printable
    commit: CommitSha | None
    licence: Printable | None
    notes: Printable | None = None


class Shortcuts(_Part):
    """What a fast run left out; an exact run has none."""

    sparse_rows: bool = Field(
        description="repeats saw the end and one in sixteen tokens of the context besides prefix and chunk"
    )
    chunk_share: float = Field(gt=0, le=1, description="share of each document's chunks that was to be repeated")
    stop_early: bool = Field(description="the run was to end once the budgets at the presets had settled")
    stopped_early: bool = Field(description="it did: 95 % of redraws of what was read move at most 2 % of the heads")
    chunks_read: int = Field(ge=1)
    chunks: int = Field(ge=1, description="chunks of all documents")
    documents_read: int = Field(ge=1)

    def describe(self) -> str:
        """One phrase for messages: '21 of 50 chunks, sparse rows'."""
        return f"{self.chunks_read} of {self.chunks} chunks{', sparse rows' if self.sparse_rows else ''}"


class Scoring(_Part):
    """How the scores came to be: enough to repeat the run."""

    method: Printable = Field(min_length=1)
    statistic: Printable = Field(description="the statistic that ranks heads for the budgets")
    chunk_tokens: int | None = Field(ge=1)
    context_tokens: int | None = Field(
        ge=1, description="tokens of a document used, null for whole documents, or what fits"
    )
    prompts_version: int | None
    prefix: str | None = Field(description="text before the context: chat template and system prompt")
    suffix: str | None = Field(description="text between a request and the answer")
    engine: Printable
    attention: Printable = Field(description="attention kernel and why")
    dtype: Printable
    device: Printable
    seed: int | None = Field(description="null for imported scores")
    corpora: list[CorpusRecord]
    imported_from: ImportedFrom | None
    shortcuts: Shortcuts | None = Field(default=None, description="absent: every chunk was scored exactly")

    @model_serializer(mode="wrap")
    def _without_absent_shortcuts(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Files of exact runs do not mention shortcuts, so theirs and older ones are byte for byte the same."""
        found: dict[str, Any] = dump(self)
        if self.shortcuts is None:
            found.pop("shortcuts", None)
        return found


class Scores(_Part):
    """Statistics of each KV head.

    max, mean, p99 and spread are of its token scores, which are softmax weights, so they lie in [0, 1]. ``loss`` is in
    nats and may have any sign.
    """

    significant_digits: int = Field(ge=1, le=17, description="digits the scores are rounded to")
    max: Matrix = Field(description="over positions and documents: KVzip's head score")
    mean: Matrix | None = Field(description="over positions, then over documents")
    p99: Matrix | None = Field(description="0.99 quantile over positions, then the mean over documents")
    spread: Matrix | None = Field(description="standard deviation between documents of a document's maximum")
    loss: Matrix | None = Field(
        default=None, description="rise of the reconstruction loss when the head is trimmed, nats per token"
    )

    def statistics(self) -> dict[str, Matrix]:
        """The statistics present that can rank heads."""
        found = {"max": self.max, "mean": self.mean, "p99": self.p99, "loss": self.loss}
        return {name: matrix for name, matrix in found.items() if matrix is not None}


class HeadBudgets(_Part):
    """Budgets at one retention."""

    heads: Matrix = Field(
        description="share of the context between sinks and window that each KV head keeps: 1.0 all, 0.0 none"
    )
    retention_realised: float = Field(ge=0, le=1, description="mean of the budgets over profiled heads")


class Runtime(_Part):
    """What a trimmed head keeps."""

    sink_tokens: int = Field(ge=0, le=1_000_000)
    recent_tokens: int = Field(ge=1, le=10_000_000)


class ProbeRecord(_Part):
    """The probe that says which tokens graded heads keep: a file of tensors next to the budget file."""

    sha256: Sha256 = Field(description="of the file's bytes")
    features: Printable = Field(min_length=1, description="what of a cached token it looks at")
    target: Printable = Field(min_length=1, description="what it was fitted to")
    tokens: int = Field(ge=1, description="context tokens it was fitted to, for each head")
    r2: list[float | None] = Field(
        description="by layer, mean over heads: share of the target's variance explained in documents left out of the "
        "fit; null where the layer is not profiled or one document was scored"
    )


class Profile(_Part):
    """A budget file: ``models/kv_budget/<model>.json``."""

    schema_version: Literal[1, 2]
    kvprofile_version: Printable
    model: ModelIdentity
    scoring: Scoring
    scores: Scores
    budgets: dict[str, HeadBudgets] = Field(
        min_length=1, description="by retention: '0.9', '0.7', '0.5', '0.3' and, graded, '0.2' and '0.15'"
    )
    probe: ProbeRecord | None = Field(default=None, description="in version 2 only: what graded budgets need")
    runtime: Runtime

    @model_serializer(mode="wrap")
    def _without_absent_probe(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Files of version 1 do not mention a probe, so they are byte for byte what they were."""
        found: dict[str, Any] = dump(self)
        if self.probe is None:
            found.pop("probe", None)
        return found

    @model_validator(mode="after")
    def _complete(self) -> Self:
        problems = list(self._problems())
        if problems:
            raise ValueError("; ".join(problems))
        return self

    def _problems(self) -> Iterator[str]:
        geometry = self.model.geometry
        for name in ("max", "mean", "p99", "spread", "loss"):
            matrix = getattr(self.scores, name)
            if matrix is not None:
                yield from matrix_problems(f"scores.{name}", matrix, geometry, bounded=name != "loss")
        if (self.probe is not None) != (self.schema_version == GRADED_VERSION):
            yield f"schema_version is {self.schema_version} {'with' if self.probe else 'without'} a probe"
        if self.probe is not None and len(self.probe.r2) != geometry.layers:
            yield f"probe.r2 has {len(self.probe.r2)} layers, the model has {geometry.layers}"
        if self.scoring.statistic not in self.scores.statistics():
            yield f"scoring.statistic is {self.scoring.statistic!r}, which the file does not hold"
        for key, budget in self.budgets.items():
            if not _is_retention(key):
                yield f"budgets[{key!r}] is not a retention in (0, 1]"
            found = list(matrix_problems(f"budgets[{key!r}].heads", budget.heads, geometry))
            yield from found
            if not found and abs(mean_budget(budget.heads) - budget.retention_realised) > 1e-6:
                yield (
                    f"budgets[{key!r}].retention_realised is {budget.retention_realised:g}, "
                    f"its heads say {mean_budget(budget.heads):g}"
                )


def matrix_problems(name: str, matrix: Matrix, geometry: Geometry, *, bounded: bool = True) -> Iterator[str]:
    """Every way in which a matrix does not fit the geometry, each as one phrase: shape, nulls, range if bounded."""
    layers, kv_heads = geometry.layers, geometry.kv_heads
    if len(matrix) != layers or any(len(row) != kv_heads for row in matrix):
        widths = sorted({len(row) for row in matrix})
        yield f"{name} is {len(matrix)} x {'/'.join(map(str, widths)) or 0}, the model is {layers} x {kv_heads}"
        return
    for layer, row in enumerate(matrix):
        profiled = geometry.layer_types[layer] == FULL_ATTENTION
        if not profiled and any(value is not None for value in row):
            why = "slides" if geometry.layer_types[layer] == SLIDING_ATTENTION else "has no cache"
            yield f"{name} layer {layer} {why} and must be null"
        if profiled and any(value is None for value in row):
            yield f"{name} layer {layer} has a null"
        bad = [value for value in row if value is not None and not math.isfinite(value)]
        bad += [value for value in row if value is not None and bounded and not 0.0 <= value <= 1.0]
        if bad:
            yield f"{name} layer {layer} has {bad[0]!r}, {'outside [0, 1]' if bounded else 'which is not a number'}"


def mean_budget(heads: Matrix) -> float:
    """Mean over the heads that are profiled: the retention a budget realises in long contexts."""
    kept = [value for row in heads for value in row if value is not None]
    return math.fsum(kept) / len(kept)


def retention_key(retention: float) -> str:
    """The key of a retention in ``budgets``: '0.5', '0.45', '1.0'."""
    return repr(round(float(retention), 6))


def round_significant(value: float, digits: int) -> float:
    """``value`` rounded to significant digits, as written to the file."""
    return float(f"{value:.{digits - 1}e}")


def _is_retention(key: str) -> bool:
    try:
        value = float(key)
    except ValueError:
        return False
    return 0.0 < value <= 1.0 and retention_key(value) == key
