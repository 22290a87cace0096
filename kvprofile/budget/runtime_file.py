"""The runtime file: what vLLM needs to know of a budget at one retention, and no more, as pydantic models.

``kvprofile export --format vllm`` writes it, ``kvprofile.runtime`` reads it. It holds the identity of the model, the
full heads of each layer, sinks and window, and where the choice came from.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from kvprofile.budget.profile import (
    FULL_ATTENTION,
    CommitSha,
    Geometry,
    Matrix,
    ModelIdentity,
    Printable,
    Sha256,
)
from kvprofile.budget.store import phrases
from kvprofile.errors import InputError
from kvprofile.files import parse_json, read_json

FORMAT = "kvprofile-runtime"
VERSION = 1
MAX_FILE_BYTES = 16 * 1024 * 1024

Text = Annotated[Printable, Field(min_length=1, max_length=1000)]
Count = Annotated[int, Field(ge=1, le=65536)]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class RuntimeModel(_Part):
    """The model a runtime file is for. Hashes and revision are null where they were not known."""

    name: Annotated[Printable, Field(min_length=1, max_length=200)]
    revision: CommitSha | None
    architecture: Annotated[Printable, Field(min_length=1, max_length=200)]
    layers: Annotated[int, Field(ge=1, le=4096)]
    attention_heads: Count
    kv_heads: Count
    head_size: Count
    layer_types: list[str]
    geometry_sha256: Sha256
    tokenizer_sha256: Sha256 | None
    weights_sha256: Sha256 | None

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        try:
            self.identity()
        except ValidationError as error:
            raise ValueError("; ".join(phrases(error))) from error
        return self

    @classmethod
    def of(cls, model: ModelIdentity) -> RuntimeModel:
        """The same model as a runtime file states it: its geometry laid flat."""
        identity = model.model_dump()
        return cls(**identity.pop("geometry"), **identity)

    def identity(self) -> ModelIdentity:
        """The same model as a budget file states it. Raises ValidationError where the geometry is inconsistent."""
        flat = self.model_dump()
        geometry = Geometry(**{name: flat.pop(name) for name in Geometry.model_fields})
        return ModelIdentity(**flat, geometry=geometry)


class RuntimeProvenance(_Part):
    """Where the choice of heads came from: enough to make it again from the budget file."""

    kvprofile_version: Text
    profile_sha256: Text
    method: Text
    statistic: Text
    imported_from: Text | None
    retention_asked: Annotated[float, Field(ge=0, le=1)]
    retention_realised: Annotated[float, Field(ge=0, le=1)]
    reason: Text | None
    floor: Annotated[int, Field(ge=0, le=65536)]
    tensor_parallel_size: Count
    pipeline_stages: list[Annotated[int, Field(ge=1)]]


def _no_order(value: object) -> object:
    if value is not None:
        raise ValueError("KV heads dealt to ranks in another order cannot be served; export the budget file again")
    return value


class RuntimeFile(_Part):
    """Budgets of one model at one retention: for each layer its full heads, null where the layer has no budgets."""

    model: RuntimeModel
    full_heads: list[list[int] | None] = Field(description="full KV heads of each layer in rising order")
    kv_head_order: Annotated[None, BeforeValidator(_no_order)] = Field(description="always null")
    sink_tokens: int = Field(ge=0, le=1_000_000)
    recent_tokens: int = Field(ge=1, le=10_000_000)
    provenance: RuntimeProvenance

    @model_validator(mode="after")
    def _rows_fit(self) -> Self:
        problems = list(self._row_problems())
        if problems:
            raise ValueError("; ".join(problems))
        return self

    def _row_problems(self) -> Iterator[str]:
        model = self.model
        if len(self.full_heads) != model.layers:
            yield f"full_heads has {len(self.full_heads)} entries for {model.layers} layers"
            return
        for layer, (row, kind) in enumerate(zip(self.full_heads, model.layer_types, strict=True)):
            where = f"full_heads layer {layer}"
            if kind != FULL_ATTENTION:
                if row is not None:
                    yield f"{where} has no full attention and must be null"
            elif row is None:
                yield f"{where} is null, not a list of KV heads"
            elif any(not 0 <= head < model.kv_heads for head in row):
                yield f"{where} is {row!r:.40}, not a list of KV heads below {model.kv_heads}"
            elif len(set(row)) != len(row):
                yield f"{where} names a KV head twice"
            elif row != sorted(row):
                yield f"{where} is not in rising order"

    def budgets(self) -> Matrix:
        """Budgets [L][G]: 1.0 for full heads, 0.0 for trimmed ones, null in layers without budgets."""
        heads = range(self.model.kv_heads)
        return [[None] * len(heads) if full is None else [float(h in full) for h in heads] for full in self.full_heads]

    def to_bytes(self) -> bytes:
        """The file's bytes, equal for equal content: sorted keys, one line for each layer."""
        document = {"format": FORMAT, "version": VERSION, **self.model_dump(mode="json")}
        lines = [f"  {json.dumps(key)}: {_render(document[key])}" for key in sorted(document)]
        return ("{\n" + ",\n".join(lines) + "\n}\n").encode()


def load(path: Path) -> RuntimeFile:
    """Read a runtime file. Raises InputError with every problem of the file in one line."""
    try:
        raw = read_json(path, MAX_FILE_BYTES, "runtime file")
    except ValueError as error:
        raise InputError(f"{path}: {error}") from error
    return _checked(raw, str(path))


def parse(content: bytes, name: str) -> RuntimeFile:
    """The runtime file in ``content``. Raises InputError, which calls the file ``name``."""
    try:
        raw = parse_json(content, "runtime file")
    except ValueError as error:
        raise InputError(f"{name}: {error}") from error
    return _checked(raw, name)


def _checked(raw: Any, name: str) -> RuntimeFile:
    if not isinstance(raw, dict) or raw.get("format") != FORMAT:
        raise InputError(f"{name}: not a runtime file; write one with 'kvprofile export --format vllm'")
    version = raw.get("version")
    if type(version) is not int or version != VERSION:
        raise InputError(f"{name}: version is {version!r:.40}, this kvprofile reads {VERSION}")
    content = {key: value for key, value in raw.items() if key not in ("format", "version")}
    try:
        return RuntimeFile.model_validate(content)
    except ValidationError as error:
        raise InputError(f"{name}: {'; '.join(phrases(error))}") from error


def _render(value: Any) -> str:
    if isinstance(value, dict):
        return "{\n" + ",\n".join(f"    {json.dumps(key)}: {_line(value[key])}" for key in sorted(value)) + "\n  }"
    if isinstance(value, list):
        return "[\n" + ",\n".join(f"    {_line(row)}" for row in value) + "\n  ]"
    return _line(value)


def _line(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False)
