"""The study on a pretrained model: `python -m scripts.real_study [--all] [--minutes M]`, after `make real-model`.

Asks SmolLM2-135M-Instruct about contexts that were trimmed by every ranking and by controls, and writes
docs/studies/real-model.md, its data and its picture, and the table in README, from all that has been asked so far.
Every context is an evaluation in a folder of its own under --runs, so a stopped run loses a minute or two. What the
finished ones measured is put into docs/studies/data (`scripts/study_records.py`) and not asked again; `--minutes 0`
makes the page from these records, without a model. The first contexts of a part are a small study already. Random heads
are drawn anew for every context, so that the intervals, which are over contexts, hold the error of the draws too.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import time
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2
import numpy as np
import torch
from scipy.stats import spearmanr

from kvprofile.budget import store
from kvprofile.budget.profile import Matrix, Profile
from kvprofile.checkpoint import describe, load_tokenizer, locate, place
from kvprofile.corpus.sources import bundled_names, load_corpus
from kvprofile.evaluate.evaluation import evaluate_checkpoint
from kvprofile.evaluate.item_store import Item, rounded
from kvprofile.evaluate.options import EvaluationOptions
from kvprofile.evaluate.summary import Results, summarise
from kvprofile.evaluate.variants import (
    CONTROLS,
    FULL,
    INVERTED,
    PROFILE,
    RANDOM,
    STREAMING,
    UNIFORM,
    Contender,
    Variant,
    build,
)
from kvprofile.files import document, write_atomically
from kvprofile.progress import Silent
from kvprofile.questions.tasks import CONTINUED_TOKENS
from kvprofile.report import plots
from kvprofile.report.quality_plot import PROFILE_COLOURS
from kvprofile.scoring import run
from kvprofile.scoring.hf_engine import HfEngine
from kvprofile.scoring.plan import ScoringOptions, plan
from scripts import real_model, study_records

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parents[1]
TEMPLATES = Path(__file__).parent
PAGES = ROOT / "docs" / "studies"
MODEL = real_model.FOLDER / real_model.NAME
SHIPPED = ROOT / "models" / "kv_budget" / f"{real_model.NAME}.json"
README_TABLE = re.compile(r"(?<=<!-- made by `make study-real` -->\n).*?(?=<!-- end -->)", re.DOTALL)

SINKS, WINDOW, BLOCK = 16, 128, 32
SWEPT = ((4, 128), (16, 64), (16, 128), (16, 256), (64, 128), (128, 128))
SWEPT_BLOCK = 4
RETENTIONS = (0.9, 0.7, 0.5, 0.3, 0.2)
FACTS = ("needle", "multi_key", "lookup", "prose")
STATISTIC = {"kvzip": "max", "kvzip-mean": "mean"}

SCORED = {"gate": (tuple(bundled_names()), 1, 600), "kvzip-plus": (tuple(bundled_names()), 1, 600),
          "ablation": (("code", "prose", "voice"), 1, 300)}  # fmt: skip
"""What the methods that the shipped file does not hold are scored on: corpora, documents of each, tokens of each."""


@dataclass(frozen=True)
class Control(Contender):
    """As many heads as a ranking keeps, but others: those of one of evaluate's controls, by its kind."""

    control: str = RANDOM
    seed: int = 0

    def heads(self, retention: float) -> Matrix:
        """[L][G]."""
        ranking = Contender(self.label, self.profile, self.statistic)
        found = build([ranking], self.profile.model.geometry, [retention], random_seeds=1, seed=self.seed)
        return next(variant.heads for variant in found if variant.kind == self.control)


def mixed(contexts: Sequence[tuple[str, int, int, int]]) -> list[tuple[float, tuple[str, int, int, int]]]:
    """(task, tokens, number, questions) of every context, from (task, tokens, how many, questions), mixed.

    Each has its place in the whole, 0 to 1, so that the first are a small study already.
    """
    found = [
        ((number + 0.5) / count, (task, length, number, questions))
        for task, length, count, questions in contexts
        for number in range(count)
    ]
    return sorted(found, key=lambda entry: entry[0])


@dataclass(frozen=True)
class Part:
    """A part of the study. ``contexts``: how many of each task and length, and with how many questions each."""

    name: str
    methods: tuple[str, ...]
    retentions: tuple[float, ...]
    contexts: tuple[tuple[str, int, int, int], ...]
    sinks: int = SINKS
    window: int = WINDOW
    block: int = BLOCK
    only_outside: bool = True
    continued: int = CONTINUED_TOKENS
    shipped: bool = True

    def pieces(self) -> list[tuple[float, Piece]]:
        """Its contexts, mixed, each with its place in the part, 0 to 1."""
        return [(place, Piece(self, *context)) for place, context in mixed(self.contexts)]


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

    @property
    def seed(self) -> int:
        """Of the context and of its random heads: another one for every context."""
        return zlib.crc32(self.name.encode()) % 1_000_000

    def options(self) -> EvaluationOptions:
        """What is asked."""
        return EvaluationOptions(
            retentions=self.part.retentions,
            tasks=(self.task,),
            context_tokens=(self.length,),
            contexts=1,
            questions=self.questions,
            sink_tokens=self.part.sinks,
            recent_tokens=self.part.window,
            block_tokens=self.part.block,
            controls=False,
            only_outside=self.part.only_outside,
            continued_tokens=self.part.continued,
            seed=self.seed,
        )

    def contenders(self, runs: Path) -> list[Contender]:
        """The rankings under test, and the controls, which keep as many heads as kvzip does."""
        found = []
        for method in self.part.methods:
            label = "kvzip" if method in CONTROLS else method
            like = shipped() if self.part.shipped else scored("gate" if label in STATISTIC else label, runs)
            made = Contender(method, like, STATISTIC.get(label))
            control = Control(**vars(made), control=method, seed=self.seed)
            found.append(control if method in CONTROLS else made)
        return found

    def folder(self, runs: Path) -> Path:
        """Where its evaluation is kept; other settings or budgets, another folder."""
        part = self.part
        budgets = [(c.label, [c.heads(r) for r in part.retentions]) for c in self.contenders(runs)]
        facts = [self.questions, part.sinks, part.window, part.block, part.only_outside, part.continued]
        key = hashlib.sha256(json.dumps([facts, budgets]).encode()).hexdigest()[:8]
        return runs / part.name / f"{self.task}-{self.length}-{self.number}-{key}"


@cache
def shipped() -> Profile:
    """The budget file of the model in this repository."""
    return store.load(SHIPPED)


@cache
def scored(method: str, runs: Path) -> Profile:
    """The model's profile by another method, on few and short texts, made once."""
    file = scored_file(method, runs)
    if not file.is_file():
        file.parent.mkdir(parents=True, exist_ok=True)
        names, documents, tokens = SCORED[method]
        options = ScoringOptions(method, tokens, tokens, 0, SINKS, WINDOW)
        description = describe(locate(str(MODEL)))
        corpora = [load_corpus(name, documents) for name in names]
        planned = plan(description, load_tokenizer(description.source), corpora, options)
        placement = place(description, "float32", "cpu", planned.positions)
        begun = time.monotonic()
        run.profile(planned, HfEngine(placement), file, Silent())
        print(f"scored by {method} in {time.monotonic() - begun:.0f} s", flush=True)
    return store.load(file)


def scored_file(method: str, runs: Path) -> Path:
    """Where that profile is: under ``runs`` or, if it was committed with the page, there."""
    committed, own = PAGES / "data" / real_model.NAME / f"{method}.json", runs / "profiles" / f"{method}.json"
    return committed if committed.is_file() and not own.is_file() else own


MAIN = Part(
    "main",
    ("kvzip", "kvzip-mean", RANDOM, INVERTED, STREAMING),
    RETENTIONS,
    (
        *((task, 1500, 17, 8) for task in (*FACTS, "multi_turn", "functions")),
        ("persona", 1500, 20, 3),
        *((task, 4000, 3, 12) for task in FACTS),
        *((task, 7000, 1, 12) for task in FACTS),
    ),
)
CONTINUED = ("kvzip", "kvzip-mean", RANDOM)
CONTINUATIONS = Part("continuations", CONTINUED, (0.5, 0.3), (("continuation", 1000, 160, 1),), continued=150)
LONG = Part("long", CONTINUED, (0.5, 0.3), (("continuation", 1001, 40, 1),))
METHODS = Part(
    "methods",
    ("kvzip", "kvzip-mean", "kvzip-plus", "gate", UNIFORM, RANDOM),
    (0.7, 0.5, 0.3),
    tuple((task, 1501, 13, 8) for task in FACTS),
    shipped=False,
)
ABLATION = replace(METHODS, name="ablation", methods=("kvzip", "ablation"))
SWEEP = tuple(
    Part(
        f"sinks-{sinks}-window-{window}",
        ("kvzip",),
        (0.5, 0.3),
        tuple((task, 1502, 3, 20) for task in FACTS),
        sinks=sinks,
        window=window,
        block=SWEPT_BLOCK,
        only_outside=False,
    )
    for sinks, window in SWEPT
)
ALL = (MAIN, CONTINUATIONS, LONG, METHODS, *SWEEP, ABLATION)


def ask(parts: Sequence[Part], runs: Path, output: Path, minutes: float, first: int | None) -> None:
    """Ask what was not asked yet, the parts in turns, and begin nothing after ``minutes``."""
    started = time.monotonic()
    known = {part.name: study_records.Records.load(records_of(part, output)) for part in parts}
    pieces = sorted((entry for part in parts for entry in part.pieces()[:first]), key=lambda entry: entry[0])
    for number, (_, piece) in enumerate(pieces, 1):
        if time.monotonic() - started > 60 * minutes:
            return
        folder = piece.folder(runs)
        if study_records.is_known(known[piece.part.name], piece.name, folder):
            continue
        begun = time.monotonic()
        options = piece.options()
        evaluate_checkpoint(str(MODEL), piece.contenders(runs), options, folder, dtype="float32", device="cpu")
        taken = time.monotonic() - begun
        print(f"{number} of {len(pieces)}: {piece.part.name}, {piece.name}, {taken:.0f} s", flush=True)


def records_of(part: Part, output: Path) -> Path:
    """The file of what a part measured."""
    return study_records.path_of(output, real_model.NAME, part.name)


def finished(part: Part, runs: Path, output: Path) -> Results | None:
    """All that was asked of a part, from its records, into which finished folders go; None where nothing was."""
    path = records_of(part, output)
    if not path.is_file() and not (runs / part.name).is_dir():
        return None  # before a model is scored to know which budgets it would be asked under
    return study_records.collect(path, [(piece.name, piece.folder(runs)) for _, piece in part.pieces()])


def estimate(found: Any) -> list[float | None]:
    """[value, low, high] of an Estimate."""
    return [found.value, found.low, found.high]


def comparison(results: Results, part: Part) -> dict[str, Any]:
    """Every row of a part: what it keeps, and its paired differences to kvzip and to random heads."""
    rows = []
    for variant in results.variants:
        row, at = variant.row, f"@{variant.retention:g}" if variant.retention is not None else ""
        against = {name: f"{name}{at}" for name in ("kvzip", RANDOM) if at and f"{name}{at}" in results.items}
        rows.append(
            {
                "name": variant.name,
                "retention": variant.retention,
                "full_heads": variant.full_heads,
                "realised": float(results.column(row, "retention_realised").mean()),
                "kl": estimate(results.rise(row, "kl")),
                "agreement": estimate(results.share_of_tokens(row, "agreement")),
                "right": estimate(results.share_of_tokens(row, "right_share")),
                "loss_rise": estimate(results.rise(row, "nll")),
                **{f"kl_less_{name}": estimate(results.rise(row, "kl", other)) for name, other in against.items()},
                **{
                    f"agreement_less_{name}": estimate(results.difference(row, other, "agreement"))
                    for name, other in against.items()
                },
            }
        )
    lengths = sorted({item.length for item in results.questions if item.length})
    tasks = list(dict.fromkeys(item.task for item in results.questions))
    return {
        "contexts": len({item.exercise for item in results.questions}),
        "planned": len(part.pieces()),
        "questions": len(results.questions),
        "retentions": list(part.retentions),
        "methods": list(part.methods),
        "exact": sum(item.exact for item in results.questions) / len(results.questions),
        "rows": rows,
        "by_length": _split(results, lengths, lambda item: item.length),
        "by_task": _split(results, tasks, lambda item: item.task),
    }


def for_each_retention(results: Results, rankings: Sequence[str], retentions: Sequence[float]) -> list[dict[str, Any]]:
    """At each retention the ranking that was nearest to the full cache on the other half of the contexts.

    Every other context of each task and length is a half; the ranking that one half chooses is measured on the other.
    """
    halves = [lambda item, half=half: int(item.exercise.rpartition("/")[2]) % 2 == half for half in (0, 1)]
    full, reference = results.variants[0], "kvzip"
    found = []
    for retention in retentions:
        chosen: list[str] = []
        for half in halves:
            other = results.only(lambda item, half=half: not half(item))  # type: ignore[misc]
            kls = {name: other.rise(f"{name}@{retention:g}", "kl").value for name in rankings} if other else {}
            chosen.append(min(kls, key=lambda name: (kls[name] or 0.0, name), default=reference))
        best = Variant("best", PROFILE, retention, full.heads)
        same = next(each for each in results.variants if each.row == f"{reference}@{retention:g}")
        rows = [results.items[f"{name}@{retention:g}"][0] for name in chosen]
        items = [
            replace(pair[0] if halves[0](pair[0]) else pair[1], variant=best.key) for pair in zip(*rows, strict=True)
        ]
        merged = Results.of([*results.questions, *results.items[same.row][0], *items], [full, same, best])
        kl, less = merged.rise(best.row, "kl"), merged.rise(best.row, "kl", same.row)
        found.append({"retention": retention, "chosen": chosen, "kl": estimate(kl), "kl_less_kvzip": estimate(less)})
    return found


def _split(results: Results, keys: Iterable[Any], key_of: Callable[[Item], Any]) -> list[dict[str, Any]]:
    """KL and agreement of every row over the questions of each key."""
    found = []
    for key in keys:
        some = results.only(lambda item, key=key: key_of(item) == key)  # type: ignore[misc]
        if some:
            tokens = sorted({item.context_tokens for item in some.questions})
            found.append(
                {
                    "key": key,
                    "questions": len(some.questions),
                    "contexts": len({item.exercise for item in some.questions}),
                    "context_tokens": [tokens[0], tokens[-1]],
                    "right": estimate(some.share_of_tokens(FULL, "right_share")),
                    "kl": {variant.row: estimate(some.rise(variant.row, "kl")) for variant in some.variants},
                    "mean_less_kvzip": {
                        variant.row: estimate(some.rise(variant.row, "kl", f"kvzip@{variant.retention:g}"))
                        for variant in some.variants
                        if variant.name == "kvzip-mean"
                    },
                }
            )
    return found


def spans(results: Results, part: Part) -> dict[str, Any]:
    """A part of continued texts, by the tokens that follow the trim."""
    summary = summarise(results)
    shown = ("name", "retention", "retention_realised", "kl", "agreement", "loss_rise", "by_span")
    rows = [{key: row[key] for key in shown} for row in summary["rows"]]
    for row in rows:
        name, at = row["name"], f"@{row['retention']:g}" if row["retention"] is not None else ""
        row["kl_less_kvzip"] = estimate(results.rise(f"{name}{at}", "kl", f"kvzip{at}")) if at else None
    return {"texts": summary["questions"], "planned": len(part.pieces()), "retentions": list(part.retentions),
            "methods": list(part.methods), "tokens": part.continued, "rows": rows}  # fmt: skip


def swept(runs: Path, output: Path) -> dict[str, Any] | None:
    """The ranking of kvzip under every sinks and window, over the questions that lie outside of all of them."""
    by_setting = {(part.sinks, part.window): found for part in SWEEP if (found := finished(part, runs, output))}
    if len(by_setting) < len(SWEEP):
        return None
    asked = [
        {(item.exercise, item.question) for item in found.questions if item.outside} for found in by_setting.values()
    ]
    common = set.intersection(*asked)
    items: list[Item] = []
    variants: list[Variant] = []
    for (sinks, window), found in by_setting.items():
        for variant in found.variants:
            if variant.kind == FULL and variants:
                continue
            name = FULL if variant.kind == FULL else f"{sinks}/{window}"
            renamed = replace(variant, name=name)
            variants.append(renamed)
            some = [item for item in found.items[variant.row][0] if (item.exercise, item.question) in common]
            items += [replace(item, variant=renamed.key) for item in some]
    if not items:
        return None
    results = Results.of(items, variants)
    rows = [
        {
            "sinks": sinks,
            "window": window,
            "retention": retention,
            "realised": float(results.column(f"{sinks}/{window}@{retention:g}", "retention_realised").mean()),
            "kl": estimate(results.rise(f"{sinks}/{window}@{retention:g}", "kl")),
            "kl_less_usual": estimate(
                results.rise(f"{sinks}/{window}@{retention:g}", "kl", f"{SINKS}/{WINDOW}@{retention:g}")
            ),
            "agreement": estimate(results.share_of_tokens(f"{sinks}/{window}@{retention:g}", "agreement")),
        }
        for sinks, window in SWEPT
        for retention in SWEEP[0].retentions
    ]
    return {"questions": len(results.questions), "contexts": len({i.exercise for i in results.questions}),
            "planned": len(SWEEP[0].pieces()), "retentions": list(SWEEP[0].retentions), "rows": rows}  # fmt: skip


def stability(runs: Path) -> dict[str, Any] | None:
    """Rank correlation of the heads' scores on all texts with those on the few and short ones, by method."""
    if not scored_file("gate", runs).is_file():
        return None
    profiles = (shipped(), scored("gate", runs))
    whole, few = (profile.scores.statistics() for profile in profiles)
    tokens = [sum(corpus.tokens for corpus in profile.scoring.corpora) for profile in profiles]
    found = {
        name: float(spearmanr(np.array(whole[each]).ravel(), np.array(few[each]).ravel()).statistic)
        for name, each in STATISTIC.items()
    }
    return {"tokens": tokens, **found}


def write_page(runs: Path, output: Path, readme: Path | None) -> None:
    """The page, its data and its picture, and the table of the readme; nothing where nothing was asked yet."""
    main = finished(MAIN, runs, output)
    if main is None:
        return
    output.mkdir(parents=True, exist_ok=True)
    (output / "data").mkdir(exist_ok=True)
    methods, ablation = finished(METHODS, runs, output), finished(ABLATION, runs, output)
    continued = {
        part.name: spans(found, part) for part in (CONTINUATIONS, LONG) if (found := finished(part, runs, output))
    }
    data = rounded(
        {
            "model": real_model.NAME,
            "package": real_model.pinned()[0],
            "geometry": shipped().model.geometry.describe(),
            "settings": {"sinks": SINKS, "window": WINDOW, "block": BLOCK, "swept_block": SWEPT_BLOCK},
            "scored": {
                name: [*map(list, (names,)), documents, tokens] for name, (names, documents, tokens) in SCORED.items()
            },
            "main": comparison(main, MAIN),
            "continued": continued,
            "methods": comparison(methods, METHODS) if methods else None,
            "ablation": comparison(ablation, ABLATION) if ablation else None,
            "best": {
                part.name: for_each_retention(asked, rankings, part.retentions)
                for part, asked, rankings in (
                    (MAIN, main, ("kvzip", "kvzip-mean")),
                    (METHODS, methods, ("kvzip", "kvzip-mean", "kvzip-plus", "gate")),
                )
                if asked
            },
            "sweep": swept(runs, output),
            "stability": stability(runs),
        }
    )
    write_atomically(output / "data" / "real-model.json", document(data))
    for method in SCORED:
        if scored_file(method, runs).is_file():
            store.save(scored(method, runs), output / "data" / real_model.NAME / f"{method}.json")
    picture = output / "real-model.png"
    title = f"{real_model.NAME}, {data['main']['questions']:,} questions"
    write_atomically(picture, plots.to_bytes(lambda: drawn(data["main"]), title, plots.picture_of(picture), 120))
    environment = jinja2.Environment(  # noqa: S701 - Markdown
        undefined=jinja2.StrictUndefined, keep_trailing_newline=True, trim_blocks=True, lstrip_blocks=True,
        loader=jinja2.FileSystemLoader(TEMPLATES),
    )  # fmt: skip
    environment.globals.update(VIEWS)
    write_atomically(output / "real-model.md", environment.get_template("real_study.md.jinja").render(data).encode())
    print(f"wrote {output / 'real-model.md'}")
    if readme is not None:
        table = environment.get_template("real_study_readme.md.jinja").render(data)
        text = readme.read_text(encoding="utf-8")
        write_atomically(readme, README_TABLE.sub(lambda _: table, text).encode())


def drawn(main: dict[str, Any]) -> Figure:
    """KL and agreement over the share of the cache kept, with intervals."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, PercentFormatter

    figure = Figure(figsize=(9.0, 4.2), layout="constrained")
    for axes, (field, label) in zip(figure.subplots(1, 2), SHOWN.items(), strict=True):
        for name, style in STYLES.items():
            rows = [row for row in main["rows"] if row["name"] == name]
            rows = rows[:1] if name == STREAMING else rows
            found = [row[field] for row in rows]
            values = [value for value, *_ in found]
            bounds = [[value if bound is None else bound for bound in (low, high)] for value, low, high in found]
            reach = np.abs(np.array(bounds) - np.array(values)[:, None]).T
            axes.errorbar([row["realised"] for row in rows], values, yerr=reach, capsize=2.5, **style)
        axes.set_xlabel("share of the cache kept")
        axes.set_title(label, fontsize=10)
        axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        axes.grid(axis="y", color="#e4e4e4", linewidth=0.8)
        axes.set_axisbelow(True)
        if field == "kl":
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        else:
            axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=5, frameon=False, fontsize=9)
    return figure


SHOWN = {
    "kl": "KL from the full cache, nats per token (log scale)",
    "agreement": "first choices that are the full cache's",
}
STYLES: dict[str, dict[str, Any]] = {
    "kvzip": {"label": "kvzip", "color": PROFILE_COLOURS[0], "marker": "o"},
    "kvzip-mean": {"label": "kvzip-mean", "color": PROFILE_COLOURS[1], "marker": "s"},
    RANDOM: {"label": "random heads", "color": "#8a8a8a", "marker": "."},
    INVERTED: {"label": "upside down", "color": "#b58900", "marker": "v"},
    STREAMING: {"label": "no head full", "color": "black", "marker": "x", "linestyle": "none"},
}


def pick(rows: list[dict[str, Any]], name: str, retention: float | None = None) -> dict[str, Any]:
    """The row of a name at a retention."""
    return next(row for row in rows if row["name"] == name and row["retention"] == retention)


def number(found: Any, digits: int = 3, sign: str = "") -> str:
    """A value with its interval: '0.041 (0.036 to 0.047)'."""
    value, low, high = (found[key] for key in ("value", "low", "high")) if isinstance(found, dict) else found
    if value is None or low is None or high is None:
        return "" if value is None else f"{value:{sign}.{digits}f}"
    return f"{value:{sign}.{digits}f} ({low:{sign}.{digits}f} to {high:{sign}.{digits}f})"


def percent(found: Any, digits: int = 1) -> str:
    """A share with its interval: '91.0 % (90.1 to 91.9)'; a plain number without."""
    value, low, high = (
        (found, None, None) if isinstance(found, float | int)
        else (found[key] for key in ("value", "low", "high")) if isinstance(found, dict) else found
    )  # fmt: skip
    if value is None or low is None or high is None:
        return "" if value is None else f"{100 * value:.{digits}f} %"
    return f"{100 * value:.{digits}f} % ({100 * low:.{digits}f} to {100 * high:.{digits}f})"


def surely(rows: list[dict[str, Any]], name: str, field: str) -> dict[str, list[float]]:
    """The retentions at which a name's difference is surely below zero, surely above, and neither."""
    found: dict[str, list[float]] = {"below": [], "above": [], "open": []}
    for row in rows:
        if row["name"] == name and field in row:
            _, low, high = row[field]
            kind = "below" if high is not None and high < 0 else "above" if low is not None and low > 0 else "open"
            found[kind].append(row["retention"])
    return found


def listed(values: Sequence[Any]) -> str:
    """'0.9, 0.7 and 0.5'."""
    texts = [f"{value:g}" if isinstance(value, float) else str(value) for value in values]
    return " and ".join(filter(None, [", ".join(texts[:-1]), *texts[-1:]]))


VIEWS: dict[str, Any] = {"pick": pick, "number": number, "percent": percent, "surely": surely, "listed": listed}


def main() -> None:
    parser = argparse.ArgumentParser(description="The study on a pretrained model.")
    parser.add_argument("--all", action="store_true", help="every part, not only the one whose table is in README")
    parser.add_argument("--parts", nargs="+", choices=[part.name for part in ALL], help="some parts only")
    parser.add_argument(
        "--minutes", type=float, default=1e9, help="begin nothing after so many; 0: page only, without a model"
    )
    parser.add_argument("--first", type=int, help="only the first so many contexts of each part")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "study-real", help="where finished work is kept")
    parser.add_argument("--output", type=Path, default=PAGES, help="of the page and the records")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md", help="whose table is written anew")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    parts = (
        [part for part in ALL if part.name in arguments.parts] if arguments.parts else ALL if arguments.all else [MAIN]
    )
    if arguments.minutes > 0:
        if real_model.is_whole(MODEL) is False:
            parser.error(f"{MODEL} is not there; `make real-model` makes it")
        ask(parts, arguments.runs, arguments.output, arguments.minutes, arguments.first)
    write_page(arguments.runs, arguments.output, arguments.readme)


if __name__ == "__main__":
    main()
