"""The runtime file: what vLLM needs to know of a budget, and no more. Standard library only.

``kvprofile export --format vllm`` writes it, ``kvprofile.runtime`` reads it inside vLLM's processes. It holds the
identity of the model, the full heads of each layer, sinks and window, and where the choice came from.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from kvprofile.errors import InputError
from kvprofile.files import parse_json, read_json

FORMAT = "kvprofile-runtime"
VERSION = 1
MAX_FILE_BYTES = 16 * 1024 * 1024
MAX_LAYERS, MAX_HEADS = 4096, 65536

_FULL, _SLIDING = "full_attention", "sliding_attention"


@dataclass(frozen=True)
class RuntimeModel:
    """The model a runtime file is for. Hashes and revision are None where they were not known."""

    name: str
    revision: str | None
    architecture: str
    layers: int
    attention_heads: int
    kv_heads: int
    head_size: int
    layer_types: tuple[str, ...]
    geometry_sha256: str
    tokenizer_sha256: str | None
    weights_sha256: str | None

    def geometry_hash(self) -> str:
        """Hash of the normalised geometry; equal to ``kvprofile.budget.profile.Geometry.sha256`` (a test says so)."""
        geometry = {name: getattr(self, name) for name in _GEOMETRY}
        return hashlib.sha256(json.dumps(geometry, sort_keys=True).encode()).hexdigest()


_GEOMETRY = ("layers", "attention_heads", "kv_heads", "head_size", "layer_types")


@dataclass(frozen=True)
class RuntimeProvenance:
    """Where the choice of heads came from: enough to make it again from the budget file."""

    kvprofile_version: str
    profile_sha256: str
    method: str
    statistic: str
    imported_from: str | None
    retention_asked: float
    retention_realised: float
    reason: str | None
    floor: int
    tensor_parallel_size: int
    pipeline_stages: tuple[int, ...]


@dataclass(frozen=True)
class RuntimeFile:
    """The heads that keep the whole context, by layer; all others keep ``sink_tokens`` and ``recent_tokens``.

    full_heads: one entry for each layer, KV heads in rising order; None where the layer slides and stays as it is.
    kv_head_order: by layer, the KV head to put at each position before heads are dealt to tensor-parallel ranks;
        None for the model's own order. ``full_heads`` counts in the model's own order either way.
    """

    model: RuntimeModel
    full_heads: tuple[tuple[int, ...] | None, ...]
    kv_head_order: tuple[tuple[int, ...] | None, ...] | None
    sink_tokens: int
    recent_tokens: int
    provenance: RuntimeProvenance

    def budgets(self) -> list[list[float | None]]:
        """Budgets [L][G]: 1.0 for full heads, 0.0 for trimmed ones, None in layers that slide."""
        heads = range(self.model.kv_heads)
        return [[None] * len(heads) if full is None else [float(h in full) for h in heads] for full in self.full_heads]

    def to_bytes(self) -> bytes:
        """The file's bytes, equal for equal content: sorted keys, one line for each layer."""
        document = {"format": FORMAT, "version": VERSION, **asdict(self)}
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
    found = list(_problems(raw))
    if found:
        raise InputError(f"{name}: {'; '.join(found)}")
    return _build(raw)


def _build(raw: Mapping[str, Any]) -> RuntimeFile:
    model, provenance = raw["model"], raw["provenance"]
    return RuntimeFile(
        model=RuntimeModel(**{**model, "layer_types": tuple(model["layer_types"])}),
        full_heads=_frozen(raw["full_heads"]),
        kv_head_order=None if raw["kv_head_order"] is None else _frozen(raw["kv_head_order"]),
        sink_tokens=raw["sink_tokens"],
        recent_tokens=raw["recent_tokens"],
        provenance=RuntimeProvenance(**{**provenance, "pipeline_stages": tuple(provenance["pipeline_stages"])}),
    )


def _frozen(rows: list[list[int] | None]) -> tuple[tuple[int, ...] | None, ...]:
    return tuple(None if row is None else tuple(row) for row in rows)


def _problems(raw: Mapping[str, Any]) -> Iterator[str]:
    yield from _key_problems("", raw, {"format", "version", *(field.name for field in fields(RuntimeFile))})
    yield from _int_problem("sink_tokens", raw.get("sink_tokens"), 0, 1_000_000)
    yield from _int_problem("recent_tokens", raw.get("recent_tokens"), 1, 10_000_000)
    yield from _provenance_problems(raw.get("provenance"))
    model = raw.get("model")
    model_problems = list(_model_problems(model))
    yield from model_problems
    if isinstance(model, dict) and not model_problems:
        yield from _rows_problems("full_heads", raw.get("full_heads"), model, whole=False)
        if raw.get("kv_head_order") is not None:
            yield from _rows_problems("kv_head_order", raw["kv_head_order"], model, whole=True)


def _model_problems(model: object) -> Iterator[str]:
    if not isinstance(model, dict):
        yield "model is missing"
        return
    found = list(_key_problems("model.", model, {field.name for field in fields(RuntimeModel)}))
    for key in ("name", "architecture"):
        found += _text_problem(f"model.{key}", model.get(key))
    for key in ("revision", "tokenizer_sha256", "weights_sha256"):
        found += _text_problem(f"model.{key}", model.get(key), optional=True)
    for key, most in (
        ("layers", MAX_LAYERS),
        ("attention_heads", MAX_HEADS),
        ("kv_heads", MAX_HEADS),
        ("head_size", MAX_HEADS),
    ):
        found += _int_problem(f"model.{key}", model.get(key), 1, most)
    types = model.get("layer_types")
    if not isinstance(types, list) or any(kind not in (_FULL, _SLIDING) for kind in types):
        found.append(f"model.layer_types is not a list of {_FULL} and {_SLIDING}")
    yield from found
    if found:
        return
    if len(model["layer_types"]) != model["layers"]:
        yield f"model.layer_types has {len(model['layer_types'])} entries for {model['layers']} layers"
    if RuntimeModel(**model).geometry_hash() != model["geometry_sha256"]:
        yield "model.geometry_sha256 does not match the geometry; the file was edited by hand"


def _provenance_problems(provenance: object) -> Iterator[str]:
    if not isinstance(provenance, dict):
        yield "provenance is missing"
        return
    yield from _key_problems("provenance.", provenance, {field.name for field in fields(RuntimeProvenance)})
    for key in ("kvprofile_version", "profile_sha256", "method", "statistic"):
        yield from _text_problem(f"provenance.{key}", provenance.get(key))
    for key in ("imported_from", "reason"):
        yield from _text_problem(f"provenance.{key}", provenance.get(key), optional=True)
    for key in ("retention_asked", "retention_realised"):
        value = provenance.get(key)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0.0 <= value <= 1.0:
            yield f"provenance.{key} is {_short(value)}, not a share in [0, 1]"
    yield from _int_problem("provenance.floor", provenance.get("floor"), 0, MAX_HEADS)
    yield from _int_problem("provenance.tensor_parallel_size", provenance.get("tensor_parallel_size"), 1, MAX_HEADS)
    stages = provenance.get("pipeline_stages")
    if not isinstance(stages, list) or any(type(size) is not int or size < 1 for size in stages):
        yield f"provenance.pipeline_stages is {_short(stages)}, not a list of layers per stage"


def _rows_problems(name: str, rows: object, model: Mapping[str, Any], *, whole: bool) -> Iterator[str]:
    """Problems of a list with one entry for each layer: distinct KV heads, all of them where ``whole``."""
    if not isinstance(rows, list) or len(rows) != model["layers"]:
        yield f"{name} has {len(rows) if isinstance(rows, list) else 'no'} entries for {model['layers']} layers"
        return
    for layer, row in enumerate(rows):
        if model["layer_types"][layer] == _SLIDING:
            if row is not None:
                yield f"{name} layer {layer} slides and must be null"
        elif not isinstance(row, list) or any(type(h) is not int or not 0 <= h < model["kv_heads"] for h in row):
            yield f"{name} layer {layer} is {_short(row)}, not a list of KV heads below {model['kv_heads']}"
        elif len(set(row)) != len(row) or (whole and len(row) != model["kv_heads"]):
            yield f"{name} layer {layer} {'does not hold every KV head once' if whole else 'names a KV head twice'}"
        elif not whole and row != sorted(row):
            yield f"{name} layer {layer} is not in rising order"


def _key_problems(place: str, found: Mapping[str, Any], expected: set[str]) -> Iterator[str]:
    for key in sorted(expected - found.keys()):
        yield f"{place}{key} is missing"
    for key in sorted(found.keys() - expected):
        yield f"{place}{key[:40]} is not known"


def _int_problem(name: str, value: object, least: int, most: int) -> Iterator[str]:
    if type(value) is not int or not least <= value <= most:
        yield f"{name} is {_short(value)}, not a whole number in {least} to {most}"


def _text_problem(name: str, value: object, *, optional: bool = False) -> Iterator[str]:
    is_text = isinstance(value, str) and 0 < len(value) <= 1000 and value.isprintable()
    if not is_text and not (optional and value is None):
        yield f"{name} is {_short(value)}, not a printable text"


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


def _render(value: Any) -> str:
    if isinstance(value, dict):
        return "{\n" + ",\n".join(f"    {json.dumps(key)}: {_line(value[key])}" for key in sorted(value)) + "\n  }"
    if isinstance(value, (list, tuple)):
        return "[\n" + ",\n".join(f"    {_line(row)}" for row in value) + "\n  ]"
    return _line(value)


def _line(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False)
