"""The study of static budgets: `python scripts/study.py models/pocket OTHER_CHECKPOINT... [--runs DIR]`.

Scores every checkpoint with every method, asks it the tasks under every budget and control, looks at how far scores of
one corpus serve another and at voice guides, and writes docs/studies/static-budgets.md with its data and pictures.
What is finished in --runs is not done again. Checkpoints come from scripts/train_pocket.py; nothing here knows
them by name.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
import torch
from scipy.stats import spearmanr

from kvprofile.budget import store
from kvprofile.budget.allocate import preset_budgets
from kvprofile.budget.profile import WHOLE_VERSION, Profile
from kvprofile.budget.trim import SLIDING, TrimRule
from kvprofile.checkpoint import describe, load_model, load_tokenizer, locate, place
from kvprofile.corpus.sources import bundled_names, load_corpus
from kvprofile.evaluate.evaluation import evaluate_checkpoint
from kvprofile.evaluate.options import EvaluationOptions
from kvprofile.evaluate.summary import Results
from kvprofile.evaluate.variants import Contender
from kvprofile.files import write_atomically
from kvprofile.progress import Silent
from kvprofile.report import quality_plot
from kvprofile.scoring import gates, run
from kvprofile.scoring.aggregate import HeadStatistics
from kvprofile.scoring.attention import recording
from kvprofile.scoring.hf_engine import HfEngine
from kvprofile.scoring.methods import GATE_STEPS
from kvprofile.scoring.plan import ScoringOptions, ScoringPlan
from kvprofile.scoring.plan import plan as plan_scoring
from kvprofile.scoring.reconstruction import Scorer

ROOT = Path(__file__).resolve().parents[1]
TEMPLATE = Path(__file__).with_name("study.md.jinja")

RETENTIONS = (0.9, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2)
TASKS = ("needle", "multi_key", "lookup", "variables", "functions", "prose", "multi_turn")
METHODS = ("gate", "kvzip", "kvzip-mean", "ablation", "greedy")
STATISTIC = {"kvzip": "max", "kvzip-mean": "mean"}
SINKS, WINDOW, BLOCK = 16, 64, 16
SCORED_TOKENS = 900
GUIDE_SINKS = (0, 16, 32, 48, 64, 96)
GUIDE_RETENTIONS = (0.7, 0.5, 0.3)


class Model:
    """One checkpoint and its part of --runs."""

    def __init__(self, folder: Path, runs: Path, contexts: int) -> None:
        self.folder, self.name, self.contexts = folder, folder.name, contexts
        self.runs = runs / folder.name
        self.description = describe(locate(str(folder)))

        plan = json.loads((folder / "training.json").read_text())["plan"]
        self.row_tokens = int(plan[-1]["row_tokens"])
        self.scored_tokens = min(SCORED_TOKENS, self.row_tokens // 2 - 60)  # read and repeated they fill a row

    def context_tokens(self) -> tuple[int, ...]:
        """Lengths of the contexts it is asked about: half of the longest rows it was trained on, and most of them."""
        return self.row_tokens // 2 - 24, int(self.row_tokens * 0.88)

    def plan(self, method: str) -> ScoringPlan:
        """The scoring run of a method over the bundled corpora."""
        options = ScoringOptions(method, self.scored_tokens, self.scored_tokens, 0, SINKS, WINDOW)
        corpora = [load_corpus(name) for name in bundled_names()]
        return plan_scoring(self.description, load_tokenizer(self.description.source), corpora, options)

    def profile(self, method: str) -> Profile:
        """The profile of a method, made once."""
        file = self.runs / f"{method}.json"
        if not file.is_file():
            file.parent.mkdir(parents=True, exist_ok=True)
            planned = self.plan("gate" if method == "greedy" else method)
            placement = place(self.description, "float32", "cpu", planned.positions)
            if method == "greedy":
                store.save(self._greedy(planned), file)
            else:
                run.profile(planned, HfEngine(placement), file, Silent())
            print(f"{self.name}: scored by {method}", flush=True)
        return store.load(file)

    def _greedy(self, planned: ScoringPlan) -> Profile:
        """The gate profile with the order of greedy elimination in place of its losses."""
        base = self.profile("gate")
        with self.gated(planned) as gated:
            order = gates.greedy(gated, planned.documents)
        scores = base.scores.model_copy(update={"loss": [[round(v, 5) for v in row] for row in order.tolist()]})
        scoring = base.scoring.model_copy(update={"method": "greedy"})
        whole = {"schema_version": WHOLE_VERSION, "probe": None, "budgets": preset_budgets(scores, "loss")}
        return base.model_copy(update={"scores": scores, "scoring": scoring, **whole})

    def gated(self, planned: ScoringPlan) -> Any:
        """The model with gates, as a context manager."""
        model = load_model(self.description, place(self.description, "float32", "cpu", planned.positions))
        rule = TrimRule(SINKS, WINDOW, 1, SLIDING)
        return gates.gating(
            model, self.description.geometry, rule, planned.frame, document_tokens=planned.document_tokens,
            chunk_tokens=self.scored_tokens,
        )  # fmt: skip

    def contenders(self) -> list[Contender]:
        """Every method under test; the attention statistics are those that the gate profile holds."""
        return [
            Contender(method, self.profile("gate" if method in STATISTIC else method), STATISTIC.get(method))
            for method in METHODS
        ]

    def by_document(self) -> dict[str, Any]:
        """Scores of every single document by gate and by maximum: names and [documents][heads]."""
        file = self.runs / "documents.json"
        if not file.is_file():
            planned = self.plan("gate")
            with self.gated(planned) as gated:
                slopes = [gates.gate_scores(gated, [d], GATE_STEPS).flatten().tolist() for d in planned.documents]
                model = gated.model
            with recording(model, self.description.geometry) as recorder:
                scorer = Scorer(model, recorder, planned.frame, document_tokens=planned.document_tokens,
                                chunk_tokens=self.scored_tokens)  # fmt: skip
                found = [torch.cat([c.token_scores for c in scorer.score(d)], -1) for d in planned.documents]
            largest = [HeadStatistics.of(scores).maximum.flatten().tolist() for scores in found]
            names = [document.name for document in planned.documents]
            write(file, {"documents": names, "gate": slopes, "kvzip": largest})
        return dict(json.loads(file.read_text()))


def write(path: Path, document: Any) -> None:
    """A JSON file, atomically, the same bytes for the same content."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, (json.dumps(document, indent=1, sort_keys=True) + "\n").encode())


def estimate(found: Any) -> list[float | None]:
    """[value, low, high] of an Estimate, rounded."""
    return [None if v is None else round(v, 5) for v in (found.value, found.low, found.high)]


def compare(model: Model, arguments: argparse.Namespace) -> dict[str, Any]:
    """Methods and controls at every retention, with paired differences against kvzip and random heads."""
    options = EvaluationOptions(
        retentions=RETENTIONS,
        tasks=TASKS,
        context_tokens=model.context_tokens(),
        contexts=model.contexts,
        sink_tokens=SINKS,
        recent_tokens=WINDOW,
        window=SLIDING,
        block_tokens=BLOCK,
        random_seeds=arguments.random_seeds,
        only_outside=True,
        generate=False,
    )
    folder = model.runs / "evaluation"
    summary = evaluate_checkpoint(str(model.folder), model.contenders(), options, folder, dtype="float32", device="cpu")
    results = Results.load(folder)
    rows = {row["name"] if row["retention"] is None else f"{row['name']}@{row['retention']:g}": row
            for row in summary["rows"]}  # fmt: skip
    table = []
    for retention in RETENTIONS:
        for name in (*METHODS, "uniform", "random", "inverted"):
            row = f"{name}@{retention:g}"
            parts = {task: results.only(lambda item, task=task: item.task == task) for task in TASKS}  # type: ignore[misc]
            table.append(
                {
                    "retention": retention,
                    "name": name,
                    "full_heads": rows[row]["full_heads"],
                    "realised": float(results.column(row, "retention_realised").mean()),
                    "accuracy": estimate(results.accuracy(row)),
                    "relative": estimate(results.relative(row)),
                    "less_kvzip": estimate(results.difference(row, f"kvzip@{retention:g}")),
                    "less_random": estimate(results.difference(row, f"random@{retention:g}")),
                    "loss_rise": estimate(results.rise(row, "nll")),
                    "by_task": {t: estimate(part.relative(row))[0] for t, part in parts.items() if part is not None},
                }
            )
    picture = arguments.output / f"static-budgets-{model.name}.png"
    quality_plot.write(summary, picture)
    return {
        "model": model.name,
        "geometry": model.description.geometry.describe(),
        "context_tokens": model.context_tokens(),
        "scored_tokens": model.scored_tokens,
        "questions": len(results.questions),
        "exercises": len({item.exercise for item in results.questions}),
        "full": estimate(results.accuracy("full")),
        "streaming": estimate(results.relative("streaming")),
        "rows": table,
        "picture": picture.name,
    }


def agreement(model: Model) -> dict[str, Any]:
    """Spearman correlation of head scores between corpora, and of few documents with all."""
    found = model.by_document()
    corpora = list(dict.fromkeys(name.split("/")[0] for name in found["documents"]))
    result: dict[str, Any] = {"model": model.name, "corpora": corpora}
    for method, merge in (("gate", torch.mean), ("kvzip", torch.amax)):
        scores = torch.tensor(found[method])
        groups = [[i for i, name in enumerate(found["documents"]) if name.startswith(f"{c}/")] for c in corpora]
        merged = [merge(scores[group], dim=0) for group in groups]
        pairs = [[float(spearmanr(a, b).statistic) for b in merged] for a in merged]
        everything = merge(scores, dim=0)
        few = {}
        for count in (1, 2, 3, 6, 9, 12):
            chosen = list(itertools.combinations(range(len(scores)), count))
            generator = torch.Generator().manual_seed(0)
            picks = [chosen[int(torch.randint(len(chosen), (1,), generator=generator))] for _ in range(100)]
            values = sorted(float(spearmanr(merge(scores[list(pick)], dim=0), everything).statistic) for pick in picks)
            few[count] = {"median": values[50], "worst of 20": values[5]}
        others = [pairs[i][j] for i, j in itertools.combinations(range(len(corpora)), 2)]
        result[method] = {"pairs": pairs, "lowest": min(others), "mean": sum(others) / len(others), "few": few}
    return result


def guides(model: Model, arguments: argparse.Namespace) -> dict[str, Any]:
    """Accuracy of persona questions by sink size: the guide stands at the start, far outside of the window."""
    rows = []
    for sinks in GUIDE_SINKS:
        options = EvaluationOptions(
            retentions=GUIDE_RETENTIONS,
            tasks=("persona",),
            context_tokens=(1000,),
            contexts=arguments.guides,
            sink_tokens=sinks,
            recent_tokens=WINDOW,
            window=SLIDING,
            block_tokens=BLOCK,
            random_seeds=3,
            generate=False,
        )
        contenders = [c for c in model.contenders() if c.label in ("gate", "kvzip")]
        folder = model.runs / f"guides-{sinks}"
        evaluate_checkpoint(str(model.folder), contenders, options, folder, dtype="float32", device="cpu")
        results = Results.load(folder)
        cells = {f"{name}@{r:g}": estimate(results.relative(f"{name}@{r:g}"))
                 for r in GUIDE_RETENTIONS for name in ("gate", "kvzip", "random")}  # fmt: skip
        rows.append({"sinks": sinks, "streaming": estimate(results.relative("streaming")), **cells})
        questions = len(results.questions)
    return {"model": model.name, "questions": questions, "full": estimate(results.accuracy("full")), "rows": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("models", type=Path, nargs="+", help="checkpoint folders, the bundled one first")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "study", help="where finished work is kept")
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "studies")
    parser.add_argument("--contexts", type=int, default=10, help="contexts of each task and length, first checkpoint")
    parser.add_argument("--other-contexts", type=int, default=4, help="the same for the other checkpoints")
    parser.add_argument(
        "--guides", type=int, default=30, help="contexts with a voice guide for each sink size; 0 leaves them out"
    )
    parser.add_argument("--random-seeds", type=int, default=10)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--no-page", action="store_true", help="only do the work; the page is for all checkpoints")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    arguments.output.mkdir(parents=True, exist_ok=True)
    counts = [arguments.contexts, *[arguments.other_contexts] * (len(arguments.models) - 1)]
    models = [Model(folder, arguments.runs, count) for folder, count in zip(arguments.models, counts, strict=True)]
    data: dict[str, Any] = {
        "settings": {
            "models": [model.name for model in models],
            "sinks": SINKS,
            "window": WINDOW,
            "block": BLOCK,
            "contexts": counts,
            "random_seeds": arguments.random_seeds,
        }
    }
    data["compare"] = [compare(model, arguments) for model in models]
    data["agreement"] = [agreement(model) for model in models]
    data["guides"] = [guides(model, arguments) for model in models[:1] if arguments.guides]
    if arguments.no_page:
        return
    for model in models:
        for method in ("gate", "ablation", "greedy"):
            store.save(model.profile(method), arguments.output / "data" / model.name / f"{method}.json")
    write(arguments.output / "data" / "static-budgets.json", data)
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True)  # noqa: S701 - Markdown
    text = environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(**data, **VIEWS)
    write_atomically(arguments.output / "static-budgets.md", text.encode())
    print(f"wrote {arguments.output / 'static-budgets.md'}")


def _percent(found: Sequence[float | None] | float | None, digits: int = 1) -> str:
    value = found[0] if isinstance(found, Sequence) else found
    return "" if value is None else f"{value:.{digits}%}"


def _interval(found: Sequence[float | None], digits: int = 1) -> str:
    value, low, high = found
    if value is None or low is None or high is None:
        return _percent(value, digits)
    return f"{value:.{digits}%} ({100 * low:.{digits}f} to {100 * high:.{digits}f})"


def _pick(rows: list[dict[str, Any]], **wanted: Any) -> dict[str, Any]:
    return next(row for row in rows if all(row[key] == value for key, value in wanted.items()))


VIEWS = {"percent": _percent, "interval": _interval, "pick": _pick, "methods": METHODS, "retentions": RETENTIONS,
         "tasks": TASKS}  # fmt: skip

if __name__ == "__main__":
    main()
