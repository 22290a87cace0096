"""What the trimmed view of a batch costs the CPU in each step: `python benchmarks/view_cost.py --against FOLDER`.

FOLDER is another version of this repository, such as a git worktree of it. Both make in turns, each in a process of its
own, all that the cache groups of Qwen2.5-14B with half of its heads full need in one step of 64 rows: block tables of
2,048 columns and lengths of requests of 2,000 to 9,000 tokens, that all decode. Counted are calls of the view, torch
operations and microseconds, on the CPU, where an operation takes about what launching it takes on a GPU. No model runs.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]
BUDGET = ROOT / "models" / "kv_budget" / "Qwen--Qwen2.5-14B-Instruct-1M.json"
RETENTION = 0.5
ROWS, COLUMNS, BLOCK = 64, 2048, 16
SINKS, WINDOW = 128, 256
SHORTEST, LONGEST = 2000, 9000
STEPS = 300


def widths(heads: list[list[float]]) -> list[list[int]]:
    """Of every cache group of trimmed heads, the different widths of its parts; each has a metadata builder."""
    from kvprofile.runtime.packing import Piece, pack

    whole = 2048 // BLOCK
    pieces = []
    for layer, row in enumerate(heads):
        for kind, blocks in (("full", whole), ("trimmed", (SINKS + WINDOW) // BLOCK)):
            count = sum(value == (kind == "full") for value in row)
            if count:
                pieces.append(Piece(f"{layer}.{kind}", kind, count, blocks, whole))
    trimmed = [group for group in pack(pieces).groups if group[0].kind == "trimmed"]
    return [sorted({piece.block_bytes for piece in group}) for group in trimmed]


def step(heads: list[list[float]]) -> tuple[Callable[[], None], int]:
    """All that a step asks of the view, and how often it is called in it."""
    import numpy as np
    import torch
    from vllm.v1.attention.backend import CommonAttentionMetadata

    from kvprofile.budget.trim import TrimRule
    from kvprofile.runtime import backend

    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(SHORTEST, LONGEST, (ROWS,), generator=generator, dtype=torch.int32)
    starts = torch.arange(ROWS + 1, dtype=torch.int32)
    rule = TrimRule(SINKS, WINDOW, BLOCK)
    groups = widths(heads)
    tables = [torch.randint(0, 9999, (ROWS, COLUMNS), generator=generator, dtype=torch.int32) for _ in groups]
    views = [[backend.TrimmedView(rule, ROWS, torch.device("cpu")) for _ in group] for group in groups]
    if hasattr(backend, "note_rows"):
        backend.note_rows(backend.Rows(lengths.numpy().astype(np.int32) - 20))
    once: Any = getattr(backend, "once", lambda view, metadata: view.of(metadata))
    calls = 0
    stock = backend.TrimmedView.of

    def counted(self: Any, metadata: Any) -> Any:
        nonlocal calls
        calls += 1
        return stock(self, metadata)

    def run() -> None:
        for table, group in zip(tables, views, strict=True):
            metadata = CommonAttentionMetadata(
                query_start_loc=starts, query_start_loc_cpu=starts, seq_lens=lengths, seq_lens_cpu_upper_bound=lengths,
                num_reqs=ROWS, num_actual_tokens=ROWS, max_query_len=1, max_seq_len=COLUMNS * BLOCK,
                block_table_tensor=table, slot_mapping=starts, is_prefilling=torch.zeros(ROWS, dtype=torch.bool),
            )  # fmt: skip
            for view in group:
                once(view, metadata)

    setattr(backend.TrimmedView, "of", counted)  # noqa: B010
    run()
    setattr(backend.TrimmedView, "of", stock)  # noqa: B010
    return run, calls


def child() -> None:
    """One turn, as JSON."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    torch.set_num_threads(1)

    class Counting(TorchDispatchMode):
        operations = 0

        def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            del types
            Counting.operations += 1
            return operation(*args, **(kwargs or {}))

    run, calls = step(json.loads(sys.stdin.read()))
    with Counting():
        run()
    seconds = []
    for _ in range(STEPS):
        started = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - started)
    print(json.dumps({"calls": calls, "operations": Counting.operations, "microseconds": 1e6 * min(seconds)}))


def turn(folder: Path, heads: list[list[float]]) -> dict[str, float]:
    """A child process that runs the code of ``folder``."""
    found = subprocess.run(
        [sys.executable, __file__, "--child"], input=json.dumps(heads), env={**os.environ, "PYTHONPATH": str(folder)},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    measured: dict[str, float] = json.loads(found.stdout.splitlines()[-1])
    return measured


def main() -> None:
    parser = argparse.ArgumentParser(description="The trimmed view's cost in each step, this version against another.")
    parser.add_argument("--against", type=Path, required=True, help="folder of the other version")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    if "--child" in sys.argv:
        child()
        return
    arguments = parser.parse_args()
    from kvprofile.budget import servable, store
    from kvprofile.budget.trim import WHOLE

    budget = servable.of_profile(store.load(BUDGET), RETENTION, kind=WHOLE)
    heads = [[value or 0.0 for value in row] for row in budget.heads]
    turns = [[turn(folder.resolve(), heads) for folder in (arguments.against, ROOT)] for _ in range(arguments.rounds)]
    ratios = [new["microseconds"] / old["microseconds"] for old, new in turns]
    table = Table("build", "calls", "torch operations", "microseconds", title=f"{ROWS} rows, {COLUMNS} columns")
    for number, name in enumerate(("the other", "this")):
        found = [each[number] for each in turns]
        median = statistics.median(each["microseconds"] for each in found)
        table.add_row(name, f"{found[0]['calls']}", f"{found[0]['operations']}", f"{median:,.0f}")
    console = Console()
    console.print(table)
    old, new = turns[0]
    console.print(
        f"operations: {new['operations'] / old['operations']:.3f}; microseconds: {statistics.median(ratios):.3f} "
        f"({min(ratios):.3f} to {max(ratios):.3f})"
    )


if __name__ == "__main__":
    main()
