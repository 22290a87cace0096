"""What shortcuts in scoring do to the ranking of heads: `python scripts/fast_agreement.py models/pocket`.

Every model is scored exactly and with each shortcut alone and all together, over the bundled corpora. Printed are the
rank correlation of the head scores with the exact ones and how many heads change places with others at each preset.
Trained models count for the rule (0.98); `--random LAYERSxHEADSxWIDTH` adds a random one, whose heads have no roles.
Profiles stay in `--output`, so that `kvprofile evaluate --profile EXACT --profile FAST` can compare answers.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from kvprofile.budget.choice import choose_whole
from kvprofile.budget.config_file import quiet_transformers
from kvprofile.budget.profile import PRESETS, Matrix, Profile, retention_key
from kvprofile.checkpoint import describe, load_tokenizer, locate, place
from kvprofile.corpus.sources import bundled_names, load_corpus
from kvprofile.progress import Silent
from kvprofile.scoring import plan, run
from kvprofile.scoring.effort import EXACT, FAST, Effort
from kvprofile.scoring.hf_engine import HfEngine
from kvprofile.scoring.methods import METHODS

LEAST = 0.98
"""Rank correlation with the exact scores from which shortcuts are offered, by the statistic that `--fast` ranks by."""

EFFORTS = {
    "exact": EXACT,
    "sparse": Effort(sparse_rows=True),
    "half": Effort(chunk_share=0.5),
    "stop": Effort(stop_early=True),
    "fast": FAST,
}
METHOD = "kvzip-mean"
STATISTIC = METHODS[METHOD].statistic
SEEDS = (0, 1, 2)
"""Chunk sampling and the order of documents depend on the seed; the worst seed is what counts."""


def write_random(shape: str, folder: Path, tokenizer_of: Path) -> Path:
    """A random Llama of LAYERSxKV_HEADSxWIDTH, sharp enough that its attention is not uniform."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    quiet_transformers()
    layers, kv_heads, width = map(int, shape.split("x"))
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_of)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=2 * kv_heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=8192,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "q_proj" in name or "k_proj" in name:
                parameter.mul_(4.0)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def profile(model: str, effort: Effort, seed: int, asked: argparse.Namespace, file: Path) -> tuple[Profile, float]:
    """A profile of a model with an effort, written to ``file``, and the seconds that it took."""
    description = describe(locate(model))
    options = plan.ScoringOptions(METHOD, asked.chunk_tokens, asked.context_tokens, seed, effort=effort)
    corpora = [load_corpus(name, asked.documents) for name in bundled_names()]
    planned = plan.plan(description, load_tokenizer(description.source), corpora, options)
    file.parent.mkdir(parents=True, exist_ok=True)
    placement = place(description, "float32", "cpu", planned.positions)
    started = time.monotonic()
    made = run.profile(planned, HfEngine(placement), file, Silent())
    return made, time.monotonic() - started


def flat(matrix: Matrix | None) -> list[float]:
    return [value for row in matrix or [] for value in row if value is not None]


def compare(exact: Profile, other: Profile) -> dict[str, Any]:
    """How near one profile is to the exact one: rank correlations, and heads chosen otherwise at each preset."""
    from scipy.stats import spearmanr

    moved = {}
    for key in map(retention_key, PRESETS):
        pairs = zip(*(flat(choose_whole(each, float(key)).heads) for each in (exact, other)), strict=True)
        moved[key] = sum(mine != theirs for mine, theirs in pairs) // 2
    shortcuts = other.scoring.shortcuts
    return {
        "max": float(spearmanr(flat(exact.scores.max), flat(other.scores.max)).statistic),
        "mean": float(spearmanr(flat(exact.scores.mean), flat(other.scores.mean)).statistic),
        "moved": moved,
        "read": shortcuts.chunks_read / shortcuts.chunks if shortcuts else 1.0,
    }


def examine(model: str, trained: bool, asked: argparse.Namespace) -> dict[str, Any]:
    """All shortcuts on one model; of several seeds the worst correlation and the most heads moved."""
    name = Path(model).name
    rows: dict[str, Any] = {}
    exact = None
    for label, effort in EFFORTS.items():
        by_seed = [0] if effort.chunk_share == 1.0 and not effort.stop_early else asked.seed or SEEDS
        found = []
        for seed in by_seed:
            file = asked.output / name / f"{label}-{seed}.json"
            made, seconds = profile(model, effort, seed, asked, file)
            exact = exact or made
            found.append({**compare(exact, made), "seconds": seconds, "file": str(file)})
        rows[label] = {
            "max": min(each["max"] for each in found),
            "mean": min(each["mean"] for each in found),
            "moved": {key: max(each["moved"][key] for each in found) for key in found[0]["moved"]},
            "read": sum(each["read"] for each in found) / len(found),
            "files": [each["file"] for each in found],
        }
    return {"model": name, "trained": trained, "heads": len(flat(exact.scores.max)) if exact else 0, "rows": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description="Agreement of fast scores with exact ones.")
    parser.add_argument("models", nargs="+", help="trained checkpoints; the first gives random ones its tokenizer")
    parser.add_argument("--random", action="append", default=[], help="LAYERSxKV_HEADSxWIDTH, like 16x8x512")
    parser.add_argument("--context-tokens", type=int, default=960)
    parser.add_argument("--chunk-tokens", type=int, default=160)
    parser.add_argument("--documents", type=int, help="the first N documents of each corpus")
    parser.add_argument("--seed", type=int, action="append")
    parser.add_argument("--output", type=Path, default=Path("runs/fast-agreement"))
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args()
    subjects = [(model, True) for model in asked.models]
    for shape in asked.random:
        folder = asked.output / f"random-{shape}" / "checkpoint"
        subjects.append((str(write_random(shape, folder, Path(asked.models[0]))), False))
    found = [examine(model, trained, asked) for model, trained in subjects]
    holds = all(one["rows"]["fast"][STATISTIC] >= LEAST for one in found if one["trained"])
    document = {
        "context_tokens": asked.context_tokens,
        "chunk_tokens": asked.chunk_tokens,
        "least": LEAST,
        "holds_on_trained": holds,
        "models": found,
    }
    if asked.json:
        print(json.dumps(document, indent=2))
        return
    table = Table("model", "shortcut", "chunks read", "rank corr. max", "mean", *(f"moved at {r}" for r in PRESETS))
    for one in found:
        for label, row in one["rows"].items():
            moved = (f"{row['moved'][retention_key(r)]} of {one['heads']}" for r in PRESETS)
            name = one["model"] if one["trained"] else f"{one['model']} (random)"
            table.add_row(name, label, f"{row['read']:.0%}", f"{row['max']:.3f}", f"{row['mean']:.3f}", *moved)
    Console().print(table)
    verdict = "at least" if holds else "NOT at least"
    print(f"all shortcuts, trained models, by {STATISTIC}, worst seed: {verdict} {LEAST}")
    for one in found:
        files = " --profile ".join([one["rows"]["exact"]["files"][0], one["rows"]["fast"]["files"][0]])
        if one["trained"]:
            print(f"answers: kvprofile evaluate MODEL --profile {files}")


if __name__ == "__main__":
    main()
