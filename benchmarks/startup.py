"""How soon commands that load no model answer: `make bench-profile`. Bars: --help 0.3 s, show and validate 0.5 s.

Commands take turns, each in a process of its own; the first turn, which fills the disk cache, is not counted.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]
COMMANDS = {"--help": 0.3, "score --help": 0.3, "show pocket": 0.5, "validate": 0.5}
TURNS = 11


def seconds(command: str) -> float:
    """From start to end of one command."""
    started = time.perf_counter()
    subprocess.run([sys.executable, "-m", "kvprofile", *command.split()], cwd=ROOT, check=True, capture_output=True)
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description="Start-up of light commands.")
    parser.add_argument("--turns", type=int, default=TURNS)
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args()
    taken: dict[str, list[float]] = {command: [] for command in COMMANDS}
    for turn in range(asked.turns + 1):
        for command in COMMANDS:
            found = seconds(command)
            if turn:
                taken[command].append(found)
    rows: list[dict[str, Any]] = [
        {"command": command, "median_s": statistics.median(found), "worst_s": max(found), "bar_s": COMMANDS[command]}
        for command, found in taken.items()
    ]
    if asked.json:
        print(json.dumps({"turns": asked.turns, "cores": os.cpu_count(), "rows": rows}, indent=2))
        return
    table = Table("kvprofile", "median, s", "worst, s", "bar, s", "")
    for row in rows:
        verdict = "within" if row["median_s"] < row["bar_s"] else "OVER"
        table.add_row(row["command"], *(f"{row[key]:.3f}" for key in ("median_s", "worst_s", "bar_s")), verdict)
    Console().print(table)


if __name__ == "__main__":
    main()
