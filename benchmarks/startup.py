"""How soon commands that load no model answer, and what vLLM's processes pay for a plugin that is switched off.

`make bench-profile`. Bars: --help 0.3 s, show and validate 0.5 s, the plugin 5 ms. All take turns, each in a process of
its own; the first turn, which fills the disk cache, is not counted.
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
GATE, GATE_BAR = "the plugin, off", 0.005
GATE_CODE = """
import collections.abc, importlib.metadata, logging, time
began = time.perf_counter()
from kvprofile.runtime import gate
gate.register()
print(time.perf_counter() - began)
"""
"""Import and call, in a process that has what every process of vLLM has."""


def seconds(command: str) -> float:
    """From start to end of one command."""
    started = time.perf_counter()
    subprocess.run([sys.executable, "-m", "kvprofile", *command.split()], cwd=ROOT, check=True, capture_output=True)
    return time.perf_counter() - started


def gate_seconds() -> float:
    """What the plugin's entry point takes where it is not switched on."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("LLM_KVZIP_")}
    run = subprocess.run([sys.executable, "-c", GATE_CODE], cwd=ROOT, env=env, check=True, capture_output=True)
    return float(run.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description="Start-up of light commands.")
    parser.add_argument("--turns", type=int, default=TURNS)
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args()
    bars = {**COMMANDS, GATE: GATE_BAR}
    taken: dict[str, list[float]] = {name: [] for name in bars}
    for turn in range(asked.turns + 1):
        for name in bars:
            found = gate_seconds() if name == GATE else seconds(name)
            if turn:
                taken[name].append(found)
    rows: list[dict[str, Any]] = [
        {"command": command, "median_s": statistics.median(found), "worst_s": max(found), "bar_s": bars[command]}
        for command, found in taken.items()
    ]
    if asked.json:
        print(json.dumps({"turns": asked.turns, "cores": os.cpu_count(), "rows": rows}, indent=2))
        return
    table = Table("kvprofile", "median, s", "worst, s", "bar, s", "")
    for row in rows:
        verdict = "within" if row["median_s"] < row["bar_s"] else "OVER"
        table.add_row(row["command"], *(f"{row[key]:.4f}" for key in ("median_s", "worst_s", "bar_s")), verdict)
    Console().print(table)


if __name__ == "__main__":
    main()
