"""How many questions a minute `kvprofile evaluate` asks: `python benchmarks/evaluate_speed.py --against FOLDER`.

FOLDER is another version of this repository, such as a git worktree of it. Both evaluate one budget file on the same
contexts, in turns, each in a process of its own; loading the model is counted. Needs `make real-model`, or --model.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from kvprofile.budget import store
from kvprofile.budget.choice import choose
from kvprofile.budget.profile import retention_key
from kvprofile.budget.trim import WHOLE

ROOT = Path(__file__).resolve().parents[1]
NAME = "SmolLM2-135M-Instruct"
MODEL, BUDGET = ROOT / "runs" / "real" / NAME, ROOT / "models" / "kv_budget" / f"{NAME}.json"
RETENTION = 0.5


def first_schema(budget: Path, folder: Path) -> Path:
    """A budget file's whole heads in one of schema version 1, which every version reads."""
    raw = json.loads(budget.read_text())
    whole = choose(store.load(budget), RETENTION, kind=WHOLE).allocation.budgets
    raw |= {"schema_version": 1, "budgets": {retention_key(RETENTION): whole.model_dump(mode="json")}}
    raw.pop("probe", None)
    path = folder / budget.name
    path.write_text(json.dumps(raw))
    return path


def asked(tree: Path, arguments: argparse.Namespace, budget: Path, folder: Path) -> dict[str, Any]:
    """Seconds of one evaluation by the code of ``tree``, its questions, and how many budgets they were asked under."""
    command = [
        sys.executable, "-m", "kvprofile", "evaluate", str(arguments.model.resolve()), "--profile", str(budget),
        "--retention", str(RETENTION), "--tasks", arguments.task, "--context-tokens", str(arguments.context_tokens),
        "--contexts", str(arguments.contexts), "--questions", str(arguments.questions), "--random-seeds", "2",
        "--dtype", "float32", "--device", "cpu", "--output", str(folder), "--json",
    ]  # fmt: skip
    env = {**os.environ, "PYTHONPATH": str(tree), "HF_HUB_OFFLINE": "1"}
    began = time.perf_counter()
    run = subprocess.run(command, cwd=tree, env=env, check=True, capture_output=True)
    found = json.loads(run.stdout)
    return {"seconds": time.perf_counter() - began, "questions": found["questions"], "rows": len(found["rows"])}


def main() -> None:
    parser = argparse.ArgumentParser(description="Questions a minute, against another version of the code.")
    parser.add_argument("--against", type=Path, required=True, help="the root of the other version")
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--budget", type=Path, default=BUDGET)
    parser.add_argument("--task", default="needle")
    parser.add_argument("--context-tokens", type=int, default=1500)
    parser.add_argument("--contexts", type=int, default=3)
    parser.add_argument("--questions", type=int, default=8)
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    trees = {"other": arguments.against.resolve(), "this": ROOT}
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in trees}
    with tempfile.TemporaryDirectory() as place:
        budget = first_schema(arguments.budget, Path(place))
        for turn in range(arguments.turns):
            for name, tree in trees.items():
                found[name].append(asked(tree, arguments, budget, Path(place) / f"{name}-{turn}"))
    rows = [
        {
            "code": name,
            "questions": turns[0]["questions"],
            "rows": turns[0]["rows"],
            "questions_per_minute": statistics.median(60 * each["questions"] / each["seconds"] for each in turns),
        }
        for name, turns in found.items()
    ]
    pairs = zip(found["other"], found["this"], strict=True)
    ratios = [other["seconds"] / other["questions"] / (this["seconds"] / this["questions"]) for other, this in pairs]
    document = {"rows": rows, "times": statistics.median(ratios), "range": [min(ratios), max(ratios)]}
    if arguments.json:
        print(json.dumps(document, indent=2))
        return
    table = Table("code", "questions", "rows", "questions a minute")
    for row in rows:
        table.add_row(row["code"], str(row["questions"]), str(row["rows"]), f"{row['questions_per_minute']:.1f}")
    console = Console()
    console.print(table)
    console.print(f"this asks {document['times']:.2f} times as many ({min(ratios):.2f} to {max(ratios):.2f})")


if __name__ == "__main__":
    main()
