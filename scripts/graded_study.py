"""The study of graded budgets: `python -m scripts.graded_study [--minutes M]`, after `make real-model`.

The contexts and questions of `scripts/real_study.py`, under whole heads and graded ones at equal bytes and, on a part
of the contexts, every control that could show that shares or probe know nothing. It writes
docs/studies/graded-budgets.md and its data from what has been asked so far. Every context is an evaluation of its own
under --runs, so a stopped run loses a minute or two; what finished ones measured is put into docs/studies/data
(`scripts/study_records.py`), and is not asked again. `--share 1/2` and `--share 2/2` are two processes that ask about
different contexts; `--minutes 0` makes the page from the records.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jinja2
import torch

from kvprofile.budget.probe import path_of
from kvprofile.budget.trim import GRADED, TrimRule
from kvprofile.evaluate.evaluation import evaluate_checkpoint
from kvprofile.evaluate.item_store import rounded
from kvprofile.evaluate.options import EvaluationOptions
from kvprofile.evaluate.summary import Results, summarise
from kvprofile.evaluate.token_choice import OWN_SCORES
from kvprofile.evaluate.variants import GRADED_CONTROLS, RANDOM, Contender
from kvprofile.files import document, write_atomically
from kvprofile.questions.tasks import CONTINUED_TOKENS
from scripts import real_model, real_study, study_records
from scripts.real_study import (
    BLOCK,
    CONTINUATIONS,
    FACTS,
    LONG,
    MAIN,
    MODEL,
    ROOT,
    SHIPPED,
    SINKS,
    TEMPLATES,
    WINDOW,
    estimate,
    mixed,
    shipped,
)

WHOLE_LABEL = "kvzip"
RETENTIONS = (0.5, 0.3, 0.15)
README_PARAGRAPH = re.compile(r"(?<=<!-- made by `make study-graded` -->\n).*?(?=<!-- end -->)", re.DOTALL)


@dataclass(frozen=True)
class Part:
    """Questions, or texts that go on, on contexts: how many of each task and length, with how many questions each."""

    name: str
    contexts: tuple[tuple[str, int, int, int], ...]
    retentions: tuple[float, ...] = RETENTIONS
    controls: bool = False
    own_scores: bool = False
    continued: int = CONTINUED_TOKENS

    def pieces(self) -> list[Piece]:
        """Its contexts, mixed, so that the first are a small study already."""
        return [Piece(self, *context) for _, context in mixed(self.contexts)]


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
        """What is asked, of the contexts of the other study; random heads and tokens are drawn for each anew."""
        like = real_study.Piece(MAIN, self.task, self.length, self.number, self.questions)
        return replace(
            like.options(),
            retentions=self.part.retentions,
            controls=self.part.controls,
            own_scores=self.part.own_scores,
            random_seeds=1,
            continued_tokens=self.part.continued,
        )

    def folder(self, runs: Path) -> Path:
        """Where its evaluation is kept; other budgets, another probe or other tokens that stay, another folder."""
        part, probe = self.part, shipped().probe
        heads = [c.heads(r) for c in contenders() for r in part.retentions]
        rule = TrimRule(SINKS, WINDOW, BLOCK)
        shares = [number / 20 for number in range(1, 20)]
        kept = [(rule.near_blocks(share, self.length), rule.spans(share, self.length)) for share in shares]
        facts = [self.questions, part.continued, part.controls, part.own_scores, heads, probe and probe.sha256, kept]
        key = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:8]
        return runs / self.part.name / f"{self.task}-{self.length}-{self.number}-{key}"


QUESTIONS = Part("graded", MAIN.contexts, own_scores=True)
CONTROLS = Part(
    "graded-controls",
    (*((task, 1500, 5, 8) for task in (*FACTS, "multi_turn", "functions")), *((task, 4000, 1, 12) for task in FACTS)),
    controls=True,
)
"""On contexts that QUESTIONS has too."""
TEXTS = Part("graded-texts", CONTINUATIONS.contexts, CONTINUATIONS.retentions, continued=CONTINUATIONS.continued)
LONG_TEXTS = Part("graded-long-texts", LONG.contexts, LONG.retentions)
PARTS = (QUESTIONS, CONTROLS, LONG_TEXTS, TEXTS)


def contenders() -> list[Contender]:
    """Whole heads and graded ones of the budget file in this repository."""
    return [
        Contender(WHOLE_LABEL, shipped()),
        Contender(GRADED, shipped(), None, GRADED, path_of(SHIPPED)),
    ]


def ask(
    parts: Sequence[Part], runs: Path, output: Path, minutes: float, share: tuple[int, int], first: int | None
) -> None:
    """Ask what was not asked yet, and begin nothing after ``minutes``."""
    started = time.monotonic()
    pieces = [piece for part in parts for piece in part.pieces()[:first]]
    known = {part.name: study_records.Records.load(records_of(part, output)) for part in parts}
    for number, piece in enumerate(pieces):
        folder = piece.folder(runs)
        if number % share[1] != share[0] - 1 or study_records.is_known(known[piece.part.name], piece.name, folder):
            continue
        if time.monotonic() - started > 60 * minutes:
            return
        begun = time.monotonic()
        evaluate_checkpoint(str(MODEL), contenders(), piece.options(), folder, dtype="float32", device="cpu")
        taken = time.monotonic() - begun
        print(f"{number + 1} of {len(pieces)}: {piece.part.name}, {piece.name}, {taken:.0f} s", flush=True)


def records_of(part: Part, output: Path) -> Path:
    """The file of what a part measured."""
    return study_records.path_of(output, real_model.NAME, part.name)


def finished(part: Part, runs: Path, output: Path) -> Results | None:
    """All that was asked of a part, from its records, into which finished folders go; None where nothing was."""
    folders = [(piece.name, piece.folder(runs)) for piece in part.pieces()]
    return study_records.collect(records_of(part, output), folders)


def rows(results: Results) -> list[dict[str, Any]]:
    """Every row: what it keeps, and its paired difference to graded heads at the same retention."""
    found = []
    for variant in results.variants:
        row = variant.row
        graded = f"{GRADED}@{variant.retention:g}" if variant.retention is not None else None
        found.append(
            {
                "name": variant.name,
                "retention": variant.retention,
                "realised": float(results.column(row, "retention_realised").mean()),
                "kl": estimate(results.rise(row, "kl")),
                "agreement": estimate(results.share_of_tokens(row, "agreement")),
                "right": estimate(results.share_of_tokens(row, "right_share")),
                "kl_less_graded": estimate(results.rise(row, "kl", graded)) if graded else None,
            }
        )
    return found


def asked(results: Results, part: Part) -> dict[str, Any]:
    """How much was asked, and every row."""
    return {
        "questions": len(results.questions),
        "contexts": len({item.exercise for item in results.questions}),
        "planned": len(part.pieces()),
        "rows": rows(results),
    }


def comparison(results: Results, part: Part) -> dict[str, Any]:
    """Graded heads, whole ones and the ceiling, all together and by length."""
    ratios = {
        f"{retention:g}": estimate(
            results.bootstrap.quotient(
                results.column(f"{GRADED}@{retention:g}", "kl"), results.column(f"{WHOLE_LABEL}@{retention:g}", "kl")
            )
        )
        for retention in RETENTIONS
    }
    lengths = sorted({item.length for item in results.questions if item.length})
    by_length = {}
    for length in lengths:
        some = results.only(lambda item, length=length: item.length == length)  # type: ignore[misc]
        if some:
            names = (WHOLE_LABEL, GRADED, OWN_SCORES)
            shown = {f"{n}@{r:g}": estimate(some.rise(f"{n}@{r:g}", "kl")) for n in names for r in RETENTIONS}
            by_length[str(length)] = {"questions": len(some.questions), "kl": shown}
    return {
        **asked(results, part),
        "ratio_to_whole": ratios,
        "graded_at_30_less_whole_at_50": estimate(results.rise(f"{GRADED}@0.3", "kl", f"{WHOLE_LABEL}@0.5")),
        "by_length": by_length,
    }


def texts(results: Results, part: Part) -> dict[str, Any]:
    """Continued texts, by the tokens that follow the trim."""
    summary = summarise(results)
    kept = ("name", "retention", "retention_realised", "kl", "agreement", "by_span")
    rows = [{key: row[key] for key in kept} for row in summary["rows"] if row["name"] != "full"]
    return {"texts": summary["questions"], "planned": len(part.pieces()), "tokens": part.continued, "rows": rows}


def write_page(runs: Path, output: Path, readme: Path) -> None:
    """The page, its data and the readme's paragraph; nothing where nothing was asked yet."""
    found = finished(QUESTIONS, runs, output)
    if found is None:
        return
    (output / "data").mkdir(parents=True, exist_ok=True)
    controls = finished(CONTROLS, runs, output)
    continued = [texts(each, part) for part in (LONG_TEXTS, TEXTS) if (each := finished(part, runs, output))]
    probe = shipped().probe
    data = rounded(
        {
            "model": real_model.NAME,
            "geometry": shipped().model.geometry.describe(),
            "settings": {"sinks": SINKS, "window": WINDOW, "block": BLOCK},
            "probe": probe and probe.model_dump(mode="json"),
            "retentions": list(RETENTIONS),
            "asked": comparison(found, QUESTIONS),
            "controls": {"names": [RANDOM, *GRADED_CONTROLS], **asked(controls, CONTROLS)} if controls else None,
            "continued": continued,
        }
    )
    write_atomically(output / "data" / "graded-budgets.json", document(data))
    environment = jinja2.Environment(  # noqa: S701 - Markdown
        undefined=jinja2.StrictUndefined, keep_trailing_newline=True, trim_blocks=True, lstrip_blocks=True,
        loader=jinja2.FileSystemLoader(TEMPLATES),
    )  # fmt: skip
    environment.globals.update(real_study.VIEWS)
    page = environment.get_template("graded_study.md.jinja").render(data)
    write_atomically(output / "graded-budgets.md", page.encode())
    print(f"wrote {output / 'graded-budgets.md'}")
    told = environment.get_template("graded_study_readme.md.jinja").render(data)
    text = readme.read_text(encoding="utf-8")
    write_atomically(readme, README_PARAGRAPH.sub(lambda _: told, text).encode())


def _share(text: str) -> tuple[int, int]:
    number, _, count = text.partition("/")
    if not (number.isdecimal() and count.isdecimal() and 1 <= int(number) <= int(count)):
        raise argparse.ArgumentTypeError(f"{text!r} is not like 1/2")
    return int(number), int(count)


def main() -> None:
    parser = argparse.ArgumentParser(description="Graded budgets on a pretrained model.")
    parser.add_argument(
        "--minutes", type=float, default=float("inf"), help="begin nothing after so many; 0: page only, without a model"
    )
    parser.add_argument("--share", type=_share, default=(1, 1), help="1/2: every second context, for two processes")
    parser.add_argument("--first", type=int, help="only so many contexts of each part")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "study-real", help="where finished work is kept")
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "studies", help="of the page and the records")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md", help="whose paragraph is written anew")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.minutes > 0:
        if real_model.is_whole(MODEL) is False:
            parser.error(f"{MODEL} is not there; `make real-model` makes it")
        ask(PARTS, arguments.runs, arguments.output, arguments.minutes, arguments.share, arguments.first)
    write_page(arguments.runs, arguments.output, arguments.readme)


if __name__ == "__main__":
    main()
