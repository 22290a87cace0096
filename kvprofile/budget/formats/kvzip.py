"""KVzip's head scores: ``utils/head_score/<model>-<document>.pt`` of github.com/snu-mllab/KVzip.

Each file is one bare tensor, saved with torch.save: [L, G] after squeeze, float16 or bfloat16, often tagged CUDA. Of a
model with other layers than full attention, as Gemma 3, it has a row for each full-attention layer alone.
KVzip merges the files of a model by elementwise maximum. Only tensors are ever read from a file: no pickle code runs.
"""

from __future__ import annotations

import io
import statistics
import warnings
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path

from kvprofile.budget.formats.base import (
    Export,
    ForeignScores,
    Format,
    require_geometry,
    require_matrix,
)
from kvprofile.budget.profile import Geometry, Matrix
from kvprofile.errors import InputError
from kvprofile.files import MAX_FILE_BYTES, read_bytes, write_atomically

_MAX_ENTRIES = 64
_RULE_CONTEXT_TOKENS = 10_000


class KVzip(Format):
    """Scores [L, G]; several files are merged by elementwise maximum, their spread is kept."""

    name = "kvzip"
    holds = "scores"

    def read(self, paths: Sequence[Path], geometry: Geometry | None) -> ForeignScores:
        """Read all files of one model, [L, G] each. Raises InputError."""
        shape = require_geometry(geometry)
        if not paths:
            raise InputError("no kvzip file given; give one or more .pt files of one model")
        read = [_read_file(path, shape) for path in paths]
        matrices = [matrix for matrix, _ in read]
        return ForeignScores(
            method="kvzip",
            scores=_elementwise(max, matrices),
            spread=_elementwise(statistics.pstdev, matrices) if len(matrices) > 1 else None,
            dtype=", ".join(dict.fromkeys(dtype for _, dtype in read)),
            files=tuple(paths),
            notes=f"elementwise maximum over {len(paths)} files" if len(paths) > 1 else None,
        )

    def write(self, export: Export, path: Path) -> None:
        """Write one float32 tensor [L, G], as KVzip's own loader takes it."""
        import torch

        stream = io.BytesIO()  # torch writes the name of a file it opens into the archive; the bytes are to be stable
        torch.save(torch.tensor(export.dense_scores(self.name), dtype=torch.float32), stream)
        write_atomically(path, stream.getvalue())

    def advice(self, export: Export) -> str | None:
        """What KVzip's own threshold rule makes of the asked retention: ties can cost it most of the heads."""
        if export.retention is None:
            return None
        scores = export.dense_scores(self.name)
        heads, kept = len(scores) * len(scores[0]), rule_keeps(scores, export.retention, _RULE_CONTEXT_TOKENS)
        return (
            f"at ratio {export.retention:g} KVzip's own rule keeps {kept} of {heads} heads, "
            f"kvprofile {export.whole(export.retention).allocation.full_heads}"
        )


def rule_keeps(scores: Sequence[Sequence[float]], ratio: float, context_tokens: int = 1) -> int:
    """Heads that KVzip keeps at a ratio: those with scores strictly above the n-th (KVScore._threshold).

    KVzip repeats the head scores for every token of the context and counts n there, which puts it up to one head
    later than counting heads (``context_tokens=1``) does. Heads that tie with the n-th are all lost either way.
    """
    ranked = sorted((value for row in scores for value in row), reverse=True)
    if ratio >= 1.0:
        return len(ranked)
    threshold = ranked[max(int(len(ranked) * context_tokens * ratio) - 1, 0) // context_tokens]
    return sum(value > threshold for value in ranked)


def _elementwise(combine: Callable[[Sequence[float]], float], matrices: Sequence[Matrix]) -> Matrix:
    def cell(values: Sequence[float | None]) -> float | None:
        known = [value for value in values if value is not None]
        return combine(known) if known else None

    return [[cell(values) for values in zip(*rows, strict=True)] for rows in zip(*matrices, strict=True)]


def _read_file(path: Path, geometry: Geometry) -> tuple[Matrix, str]:
    """[L, G] in [0, 1], null in layers without scores, and the name of its dtype."""
    import torch

    content = read_bytes(path)
    _check_archive(path, content)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            loaded = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises whatever its parsers raise
        raise InputError(f"{path}: not a file with one tensor, nothing in it was run ({_why(error)})") from error
    if not isinstance(loaded, torch.Tensor):
        raise InputError(f"{path}: holds a {type(loaded).__name__}, a KVzip file is one bare tensor")
    if loaded.layout != torch.strided or loaded.device.type != "cpu" or not loaded.is_floating_point():
        raise InputError(f"{path}: holds a tensor of {loaded.dtype}, a KVzip file has plain floating-point numbers")
    scored = geometry.profiled_layers
    expected = (len(scored), geometry.kv_heads)
    if _squeezed(loaded.shape) != _squeezed(expected):
        full = f", {len(scored)} of them with full attention," if len(scored) < geometry.layers else ""
        raise InputError(
            f"{path}: shape {' x '.join(map(str, loaded.shape)) or 'scalar'}, "
            f"the model is {geometry.layers} layers{full} x {geometry.kv_heads} KV heads"
        )
    rows = dict(zip(scored, loaded.detach().reshape(expected).double().tolist(), strict=True))
    matrix: Matrix = [rows.get(layer, [None] * geometry.kv_heads) for layer in range(geometry.layers)]
    require_matrix(path, matrix, geometry)
    return matrix, str(loaded.dtype).removeprefix("torch.")


def _check_archive(path: Path, content: bytes) -> None:
    """Look at the zip directory before anything is unpacked: torch stores a few small entries, uncompressed."""
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            entries = archive.infolist()
    except Exception as error:  # zipfile raises several kinds for broken directories
        raise InputError(f"{path}: truncated, or not written by torch.save ({_why(error)})") from error
    if len(entries) > _MAX_ENTRIES or sum(entry.file_size for entry in entries) > MAX_FILE_BYTES:
        raise InputError(f"{path}: unpacks to more than any head scores need; refused unread")
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise InputError(f"{path}: has compressed entries, which torch.save never writes; refused unread")


def _squeezed(shape: Sequence[int]) -> tuple[int, ...]:
    return tuple(size for size in shape if size != 1)


def _why(error: Exception) -> str:
    """The kind of an error; torch's texts are long and advise to load unsafely."""
    return type(error).__name__
