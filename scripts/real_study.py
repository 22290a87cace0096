"""The study on a pretrained model: `python scripts/real_study.py [--all] [--minutes M]`, after `make real-model`.

Asks SmolLM2-135M-Instruct about contexts that are trimmed by every ranking and by controls, and writes
docs/studies/real-model.md with its data and pictures from all that has been asked so far. Every context is an
evaluation in a folder of its own under --runs, so a stopped run loses less than a minute, and no context is read twice.
Random heads are drawn anew for every context: the interval over contexts then holds the error of the draws too.
"""

from __future__ import annotations

import argparse
import hashlib
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from kvprofile.budget import store
from kvprofile.evaluate.evaluation import evaluate_checkpoint
from kvprofile.evaluate.item_store import SUMMARY, Item
from kvprofile.evaluate.options import EvaluationOptions
from kvprofile.evaluate.summary import Results
from kvprofile.evaluate.variants import Contender
from scripts import real_model

ROOT = Path(__file__).resolve().parents[1]
MODEL = real_model.FOLDER / real_model.NAME
PROFILE = ROOT / "models" / "kv_budget" / f"{real_model.NAME}.json"

SINKS, WINDOW, BLOCK = 16, 128, 32
RETENTIONS = (0.9, 0.7, 0.5, 0.3, 0.2)
FACTS = ("needle", "multi_key", "lookup", "prose")


@dataclass(frozen=True)
class Part:
    """A part of the study: ``contexts`` says how many contexts of each task and length, and with how many questions."""

    name: str
    methods: tuple[str, ...]
    retentions: tuple[float, ...]
    contexts: tuple[tuple[str, int, int, int], ...]
    controls: bool = True

    def pieces(self) -> list[Piece]:
        """Its contexts, mixed so that the first hundred are a small study."""
        found = [
            (number / count, Piece(self, task, length, number, questions))
            for task, length, count, questions in self.contexts
            for number in range(count)
        ]
        return [piece for _, piece in sorted(found, key=lambda entry: entry[0])]


@dataclass(frozen=True)
class Piece:
    """One context, its questions and every budget."""

    part: Part
    task: str
    length: int
    number: int
    questions: int

    @property
    def name(self) -> str:
        """Of the context, in merged results."""
        return f"{self.task}/{self.length}/{self.number}"

    def options(self) -> EvaluationOptions:
        """What is asked; the seed makes the context and draws the random heads."""
        return EvaluationOptions(
            retentions=self.part.retentions,
            tasks=(self.task,),
            context_tokens=(self.length,),
            contexts=1,
            questions=self.questions,
            sink_tokens=SINKS,
            recent_tokens=WINDOW,
            block_tokens=BLOCK,
            random_seeds=1,
            controls=self.part.controls,
            only_outside=True,
            seed=self.number,
        )

    def contenders(self) -> list[Contender]:
        """The rankings under test."""
        return [contender(method) for method in self.part.methods]

    def folder(self, runs: Path) -> Path:
        """Where its evaluation is; other settings or profiles, another folder."""
        facts = [
            str(self.options()),
            *(f"{c.label} {c.statistic} {store.to_bytes(c.profile)!r}" for c in self.contenders()),
        ]
        key = hashlib.sha256("\n".join(facts).encode()).hexdigest()[:8]
        return runs / self.part.name / f"{self.task}-{self.length}-{self.number}-{key}"


def contender(method: str) -> Contender:
    """A ranking by name."""
    profile = store.load(PROFILE)
    return Contender(method, profile, {"kvzip": "max", "kvzip-mean": "mean"}[method])


MAIN = Part(
    "main",
    ("kvzip", "kvzip-mean"),
    RETENTIONS,
    (
        *((task, 1500, 13, 8) for task in (*FACTS, "multi_turn", "functions")),
        ("persona", 1500, 20, 3),
        *((task, 4000, 5, 12) for task in FACTS),
        *((task, 7000, 2, 12) for task in FACTS),
    ),
)
PARTS = (MAIN,)


def ask(parts: Sequence[Part], runs: Path, minutes: float) -> None:
    """Ask what was not asked yet, the parts in turns, and begin nothing after ``minutes``."""
    started = time.monotonic()
    left = [piece for part in parts for piece in part.pieces() if not (piece.folder(runs) / SUMMARY).is_file()]
    for number, piece in enumerate(left):
        if time.monotonic() - started > 60 * minutes:
            print(f"{len(left) - number} contexts are left; run it again to go on", flush=True)
            return
        begun = time.monotonic()
        evaluate_checkpoint(
            str(MODEL), piece.contenders(), piece.options(), piece.folder(runs), dtype="float32", device="cpu"
        )
        taken = time.monotonic() - begun
        print(f"{number + 1} of {len(left)}: {piece.part.name}, {piece.name}, {taken:.0f} s", flush=True)


def finished(part: Part, runs: Path) -> Results | None:
    """All that was asked of a part, as one evaluation; None where nothing was."""
    items: list[Item] = []
    variants = None
    for piece in part.pieces():
        folder = piece.folder(runs)
        if (folder / SUMMARY).is_file():
            found = Results.load(folder)
            variants = variants or found.variants
            items += [replace(i, exercise=piece.name) for seeds in found.items.values() for each in seeds for i in each]
    return None if variants is None else Results.of(items, variants)


def main() -> None:
    parser = argparse.ArgumentParser(description="The study on a pretrained model.")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "study-real", help="where finished work is kept")
    parser.add_argument("--minutes", type=float, default=1e9, help="begin no further context after so many")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    ask(PARTS, arguments.runs, arguments.minutes)


if __name__ == "__main__":
    main()
