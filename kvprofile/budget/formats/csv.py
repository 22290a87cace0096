"""A table for spreadsheets and scripts: ``layer,kv_head,score,budget``, one row for each profiled KV head.

The budget is the share of the context kept at the exported retention, or empty where none was asked for. Sliding
layers have no rows.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path

from kvprofile.budget.formats.base import (
    Export,
    ForeignScores,
    Format,
    require_geometry,
    require_matrix,
    single,
)
from kvprofile.budget.profile import Geometry, Matrix, mean_budget, retention_key
from kvprofile.errors import InputError
from kvprofile.files import read_bytes, write_atomically

HEADER = ["layer", "kv_head", "score", "budget"]


class CSV(Format):
    """Scores, and budgets at one retention."""

    name = "csv"
    holds = "budgets"
    holds_fractions = True

    def read(self, paths: Sequence[Path], geometry: Geometry | None) -> ForeignScores:
        """Read one table. A budget column adds a budget at the retention it realises."""
        shape = require_geometry(geometry)
        path = single(paths, self.name)
        scores, heads = _read_table(path, shape)
        require_matrix(path, scores, shape)
        budgets: dict[str, Matrix] = {}
        if any(value is not None for row in heads for value in row):
            require_matrix(path, heads, shape)
            realised = mean_budget(heads)
            if realised > 0.0:
                budgets[retention_key(realised)] = heads
        return ForeignScores(method="csv", scores=scores, dtype="text", files=(path,), budgets=budgets)

    def write(self, export: Export, path: Path) -> None:
        """Write the table, layers and heads in order."""
        heads = export.choice(export.retention).heads if export.retention is not None else None
        stream = io.StringIO()
        rows = csv.writer(stream, lineterminator="\n")
        rows.writerow(HEADER)
        for layer, row in enumerate(export.unit_scores):
            for head, score in enumerate(row):
                if score is not None:
                    rows.writerow([layer, head, repr(score), "" if heads is None else repr(heads[layer][head])])
        write_atomically(path, stream.getvalue().encode())


def _read_table(path: Path, geometry: Geometry) -> tuple[Matrix, Matrix]:
    """Scores and budgets [L][G], null where the table has no row or an empty cell."""
    try:
        text = read_bytes(path).decode("utf-8-sig")
        lines = list(csv.reader(io.StringIO(text, newline="")))
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 at byte {error.start}; not a CSV file") from error
    except csv.Error as error:
        raise InputError(f"{path}: not CSV ({error})") from error
    if not lines or [cell.strip() for cell in lines[0]] != HEADER:
        raise InputError(f"{path}: the first line must be {','.join(HEADER)}")
    scores: Matrix = [[None] * geometry.kv_heads for _ in range(geometry.layers)]
    budgets: Matrix = [[None] * geometry.kv_heads for _ in range(geometry.layers)]
    for number, cells in enumerate(lines[1:], start=2):
        if not cells:
            continue
        try:
            layer, head, score, budget = int(cells[0]), int(cells[1]), float(cells[2]), cells[3].strip()
            kept = float(budget) if budget else None
        except (ValueError, IndexError) as error:
            raise InputError(f"{path}: line {number} is not layer,kv_head,score,budget in numbers") from error
        if len(cells) > len(HEADER) or not (0 <= layer < geometry.layers and 0 <= head < geometry.kv_heads):
            raise InputError(
                f"{path}: line {number} has layer {layer}, KV head {head}; the model is {geometry.describe()}"
            )
        if scores[layer][head] is not None:
            raise InputError(f"{path}: line {number} repeats layer {layer}, KV head {head}")
        scores[layer][head], budgets[layer][head] = score, kept
    return scores, budgets
