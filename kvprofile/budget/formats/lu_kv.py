"""LU-KV's tables (arXiv 2602.08585): one ``.npy`` array [99, L, G] of the share of each head's cache to prune.

Slice i is for the compression ratio (i + 1) / 100, that is for retention 1 - ratio. Shares may be fractions.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kvprofile.budget.formats.base import (
    Export,
    ForeignScores,
    Format,
    require_geometry,
    require_matrix,
    single,
)
from kvprofile.budget.profile import Geometry, Matrix, retention_key
from kvprofile.errors import InputError
from kvprofile.files import read_bytes, write_atomically

RATIOS = 99


class LUKV(Format):
    """Budgets at 99 ratios. A head's score is the mean share it keeps over all of them."""

    name = "lu-kv"
    holds = "budgets"
    holds_fractions = True

    def read(self, paths: Sequence[Path], geometry: Geometry | None) -> ForeignScores:
        """Read one table: the budgets at all 99 retentions, unrounded, so that export writes the same table."""
        shape = require_geometry(geometry)
        path = single(paths, self.name)
        pruned, dtype = _read_table(path, shape)
        for matrix in pruned:
            require_matrix(path, matrix, shape)
        kept: list[Matrix] = [[[1.0 - (value or 0.0) for value in row] for row in matrix] for matrix in pruned]
        scores: Matrix = [
            [math.fsum(kept[i][layer][head] or 0.0 for i in range(RATIOS)) / RATIOS for head in range(shape.kv_heads)]
            for layer in range(shape.layers)
        ]
        return ForeignScores(
            method="lu-kv",
            scores=scores,
            dtype=dtype,
            files=(path,),
            budgets={retention_key(retention_of(at)): heads for at, heads in enumerate(kept)},
            ranks_presets=False,
            notes="a score is the mean share kept over the 99 compression ratios",
        )

    def write(self, export: Export, path: Path) -> None:
        """Write float32 [99, L, G]: the shares to prune at each ratio, 0 for full heads."""
        import numpy as np

        export.dense_scores(self.name)
        budgets = [export.choice(retention_of(at)).heads for at in range(RATIOS)]
        stream = io.BytesIO()
        np.save(stream, (1.0 - np.array(budgets, dtype=np.float64)).astype(np.float32), allow_pickle=False)
        write_atomically(path, stream.getvalue())

    def advice(self, export: Export) -> str | None:
        """Where the asked retention is in the table."""
        if export.retention is None:
            return None
        at = slice_of(1.0 - export.retention)
        if not 0 <= at < RATIOS:
            return "the table holds compression ratios 0.01 to 0.99"
        return f"retention {export.retention:g} is slice {at} of {RATIOS}"


def slice_of(ratio: float) -> int:
    """Index of a compression ratio in the table: round(ratio * 100) - 1."""
    return round(ratio * 100) - 1


def retention_of(at: int) -> float:
    """The retention of a slice: 1 - ratio."""
    return 1.0 - (at + 1) / 100


def _read_table(path: Path, geometry: Geometry) -> tuple[list[Matrix], str]:
    """The array as lists. Shape, type and size are checked in the header, before numbers are read."""
    import numpy as np

    content = read_bytes(path)
    stream = io.BytesIO(content)
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    try:
        version = np.lib.format.read_magic(stream)  # type: ignore[no-untyped-call]
        read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = read_header(stream)  # type: ignore[no-untyped-call]
    except Exception as error:  # the header is parsed as Python literals, which can fail in many ways
        raise InputError(f"{path}: truncated, or not a .npy file ({type(error).__name__})") from error
    expected = (RATIOS, geometry.layers, geometry.kv_heads)
    if shape != expected:
        raise InputError(
            f"{path}: shape {' x '.join(map(str, shape))[:80] or 'scalar'}, "
            f"expected {' x '.join(map(str, expected))} (ratios x layers x KV heads)"
        )
    if dtype.kind != "f":
        raise InputError(f"{path}: holds {str(dtype)[:40]}, not floating-point shares")
    if len(content) - stream.tell() != math.prod(expected) * dtype.itemsize:
        raise InputError(f"{path}: truncated or padded; its header promises another number of bytes")
    table = np.load(io.BytesIO(content), allow_pickle=False)
    matrices: list[Matrix] = table.astype(np.float64).tolist()
    return matrices, str(dtype)
