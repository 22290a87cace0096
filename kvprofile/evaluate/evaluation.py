"""A whole evaluation: profiles, tasks and a checkpoint in, items and a summary out, resumable exercise by exercise."""

from __future__ import annotations

import json
import math
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvprofile import __version__
from kvprofile.budget import store
from kvprofile.budget.dtypes import PLAIN
from kvprofile.budget.probe import Probe
from kvprofile.budget.probe import load as load_probe
from kvprofile.budget.profile import mean_budget
from kvprofile.budget.trim import SPAN_TOKENS, TrimRule
from kvprofile.checkpoint import Description, Placement, describe, identity, load_model, load_tokenizer, locate, place
from kvprofile.errors import InputError
from kvprofile.evaluate import exercises
from kvprofile.evaluate.encoding import Asked, Wording, wording
from kvprofile.evaluate.item_store import Item, ItemStore
from kvprofile.evaluate.measurer import MOST_HELD, Measurer
from kvprofile.evaluate.options import EvaluationOptions
from kvprofile.evaluate.own_scores import chunk_tokens, own_scores
from kvprofile.evaluate.simulate import simulating
from kvprofile.evaluate.summary import Results, summarise
from kvprofile.evaluate.token_choice import (
    ANY_TOKENS,
    KEY_NORMS,
    OWN_SCORES,
    PROBE,
    REVERSED,
    AtRandom,
    ByKeyNorm,
    ByProbe,
    TokenChoice,
)
from kvprofile.evaluate.variants import Contender, Variant, build
from kvprofile.files import sha256_of
from kvprofile.progress import Progress, Silent
from kvprofile.questions import judge, user_tasks
from kvprofile.questions.tasks import TASKS, Question
from kvprofile.scoring.prompts import OPEN_THOUGHT_NOTE

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

OUTPUT_DIR = Path("runs/evaluate")
SUMMARY_VERSION = 3
"""Also of what items mean: a run that another version began is not continued."""

OTHER_TRIM = 0.25
"""Share of a scored document's tokens by which sinks and window may differ from those that shares were made for: on the
bundled checkpoint 27 % moved a share by 0.08 at most, and 13 % by 0.05."""


@dataclass(frozen=True)
class EvaluationPlan:
    """An evaluation that has passed every check that needs no weights."""

    description: Description
    tokenizer: PreTrainedTokenizerBase
    words: Wording
    rule: TrimRule
    contenders: tuple[Contender, ...]
    variants: tuple[Variant, ...]
    asked: tuple[Asked, ...]
    options: EvaluationOptions
    warnings: tuple[str, ...]
    told: tuple[str, ...] = ()
    probes: Mapping[str, Probe] = field(default_factory=dict)

    @property
    def cache_tokens(self) -> int:
        """Tokens of the largest cache held at a time: a context, its trimmed copies, and a batch of rows twice.

        Whole heads share one copy, graded ones hold one for each budget. Rows count twice for answers that are written,
        which begin as copies of what was read.
        """
        budgets = len({variant.budget for variant in self.variants})
        graded = {variant.budget: mean_budget(variant.heads) for variant in self.variants if variant.tokens}
        copies = min(MOST_HELD, math.fsum(graded.values()))
        copies += 2.0 * any(variant.cache != PLAIN for variant in self.variants)  # a context in a cache of its own
        rule = self.rule
        return max(
            math.ceil((2 + copies + self.options.own_scores) * len(asked.context_ids))
            + len(graded) * rule.held_tokens(len(asked.context_ids), len(asked.context_ids))
            + 2 * min(self.options.batch, budgets * len(asked.rows)) * (asked.positions - len(asked.context_ids))
            for asked in self.asked
        )

    @property
    def questions(self) -> int:
        """Questions that every variant is asked."""
        return sum(len(asked.exercise.questions) for asked in self.asked)


def plan(
    description: Description,
    tokenizer: PreTrainedTokenizerBase,
    contenders: Sequence[Contender],
    options: EvaluationOptions,
) -> EvaluationPlan:
    """Make exercises and budgets, and check them.

    Raises InputError for profiles of another geometry or without scores, unknown tasks, and contexts that do not fit.
    """
    runtime = contenders[0].profile.runtime
    rule = TrimRule(
        runtime.sink_tokens if options.sink_tokens is None else options.sink_tokens,
        runtime.recent_tokens if options.recent_tokens is None else options.recent_tokens,
        options.block_tokens,
        options.window,
    )
    variants = build(
        contenders,
        description.geometry,
        options.retentions,
        controls=options.controls,
        random_seeds=options.random_seeds,
        seed=options.seed,
        own_scores=options.own_scores,
        caches=options.kv_cache_dtypes,
    )
    if any(variant.tokens for variant in variants) and not rule.anchored:
        raise InputError("graded budgets need a window that stays: leave out --window sliding, or ask for --kind whole")
    words = wording(tokenizer, description.config, description.source.folder)
    warnings = [*description.notes, *_profile_warnings(description, contenders, rule)]
    if words.frame.leaves_thought_open:
        warnings.append(OPEN_THOUGHT_NOTE)
    asked: list[Asked] = []
    told: list[str] = []
    user_tasks.require([task for task in options.tasks if task not in TASKS])
    for task in dict.fromkeys(options.tasks):
        found = exercises.make(task, description, tokenizer, words, rule, options)
        asked += found.asked
        warnings += found.warnings
        told += found.told
    made = EvaluationPlan(
        description, tokenizer, words, rule, tuple(contenders), tuple(variants), tuple(asked), options, (), tuple(told),
        {each.label: load_probe(each.probe, each.profile) for each in contenders if each.probe is not None},
    )  # fmt: skip
    _check(made)
    return replace(made, warnings=(*warnings, *_length_warnings(made)))


def evaluate(
    planned: EvaluationPlan, placement: Placement, folder: Path, progress: Progress, force: bool = False
) -> dict[str, Any]:
    """Ask every question under every variant, continuing where an earlier run stopped, and summarise.

    Gives what ``summary.json`` holds. Raises InputError where ``folder`` holds other things, weights do not load or the
    disk is full; finished exercises stay for the next run.
    """
    kept = ItemStore(folder, run_key(planned, placement))
    count = len(planned.variants)
    expected = [(asked.name, count * len(asked.exercise.questions)) for asked in planned.asked]
    with kept.opened(_run_document(planned, placement), expected, force) as finished:
        if finished:
            progress.say(f"continuing: {finished} of {len(expected)} exercises are finished already")
        if finished < len(expected):
            _measure(planned, placement, kept, planned.asked[finished:], progress)
        summary = {
            "schema_version": SUMMARY_VERSION,
            "kvprofile_version": __version__,
            **_facts(planned, placement),
            "warnings": list(planned.warnings),
            **summarise(Results.of(kept.items(), planned.variants)),
        }
        kept.save_summary(summary)
    return summary


def evaluate_checkpoint(
    model: str,
    contenders: Sequence[Contender],
    options: EvaluationOptions,
    folder: Path,
    *,
    dtype: str = "auto",
    device: str = "auto",
    progress: Progress | None = None,
    force: bool = False,
) -> dict[str, Any]:
    """All of it in one call, for scripts: ``kvprofile evaluate`` without its output. Errors as in plan and evaluate."""
    description = describe(locate(model))
    planned = plan(description, load_tokenizer(description.source), contenders, options)
    placement = place(description, dtype, device, planned.cache_tokens)
    return evaluate(planned, placement, folder, progress or Silent(), force)


def default_folder(planned: EvaluationPlan, placement: Placement) -> Path:
    """Where an evaluation is kept unless told otherwise: one folder for each model and settings."""
    name = store.file_name(planned.description.source.name).removesuffix(".json")
    return OUTPUT_DIR / name / run_key(planned, placement)[:8]


def run_key(planned: EvaluationPlan, placement: Placement) -> str:
    """Everything the items depend on, as one hash. The batch is left out: a run may continue with a smaller one."""
    facts = {
        "version": [__version__, SUMMARY_VERSION],
        "model": identity(planned.description, planned.tokenizer).model_dump(mode="json"),
        "dtype": placement.dtype,
        "device": placement.device.partition(":")[0],
        "rule": asdict(planned.rule),
        "generate": planned.options.generate,
        "words": [planned.words.end_ids, planned.words.next_ids, sorted(planned.words.stop_ids)],
        "variants": [(variant.key, variant.budget) for variant in planned.variants],
        "span_tokens": SPAN_TOKENS if any(variant.tokens for variant in planned.variants) else None,
        "probes": [each.profile.probe and each.profile.probe.sha256 for each in planned.contenders if each.probe],
        "exercises": [
            (asked.name, asked.exercise.answered, asked.context_ids, [asdict(row) for row in asked.rows])
            for asked in planned.asked
        ],
        "expected": [
            [(q.expected, q.any_of, q.measure, q.choices) for q in asked.exercise.questions] for asked in planned.asked
        ],
    }
    return sha256_of(json.dumps(facts, sort_keys=True).encode())


def _measure(
    planned: EvaluationPlan, placement: Placement, kept: ItemStore, left: Sequence[Asked], progress: Progress
) -> None:
    """Ask what is left, and write each exercise's items as soon as they are known."""
    budgets = {variant.budget: variant for variant in planned.variants}
    order = {budget: number for number, budget in enumerate(budgets)}
    model = load_model(planned.description, placement)
    caches = len({variant.cache for variant in planned.variants})
    progress.start(sum(caches * len(asked.context_ids) + len(budgets) * asked.read_tokens for asked in left))
    with simulating(model, planned.description.geometry, planned.variants[0].heads, planned.rule) as simulation:
        choose = _choices(planned, model)
        chosen = [(variant.heads, choose(variant), variant.cache) for variant in budgets.values()]
        measurer = Measurer(
            simulation,
            planned.tokenizer,
            planned.words,
            planned.options.batch,
            progress.advance,
            planned.options.generate,
        )
        for asked in left:
            outcomes = measurer.measure(asked, chosen)
            kept.append(
                [
                    Item(
                        exercise=asked.name,
                        task=asked.exercise.task,
                        length=asked.length,
                        question=number,
                        variant=variant.key,
                        context_tokens=len(asked.context_ids),
                        depth=asked.depths[number],
                        outside=asked.outside[number],
                        **vars(outcomes[order[variant.budget]][number]),
                    )
                    for number in range(len(asked.exercise.questions))
                    for variant in planned.variants
                ]
            )


def _choices(planned: EvaluationPlan, model: PreTrainedModel) -> Callable[[Variant], TokenChoice | None]:
    """How the variants choose tokens; those that choose alike share one choice."""
    probes = {label: ByProbe(probe) for label, probe in planned.probes.items()}
    norms = ByKeyNorm()
    own = own_scores(model, planned.description.geometry, planned.words.frame, planned.description.max_positions)

    def choice(variant: Variant) -> TokenChoice | None:
        if variant.tokens == PROBE:
            return probes[variant.probe or ""]
        if variant.tokens == REVERSED:
            return ByProbe(probes[variant.probe or ""].probe, reversed=True)
        if variant.tokens == ANY_TOKENS:
            return AtRandom(variant.seed or 0)
        return {KEY_NORMS: norms, OWN_SCORES: own, None: None}[variant.tokens]

    return choice


def _facts(planned: EvaluationPlan, placement: Placement) -> dict[str, Any]:
    """What was evaluated and how, without anything that names a machine."""
    settings = {
        **asdict(planned.options),
        **asdict(planned.rule),
        "tasks": list(dict.fromkeys(asked.exercise.task for asked in planned.asked)),
        "dtype": placement.dtype,
        "device": placement.device.partition(":")[0],
    }
    del settings["batch"]  # not in the key either: it changes nothing but the memory needed
    return {
        "model": identity(planned.description, planned.tokenizer).model_dump(mode="json"),
        "profiles": [
            {
                "label": contender.label,
                "kind": contender.kind,
                "model": contender.profile.model.name,
                "method": contender.profile.scoring.method,
                "statistic": contender.statistic or contender.profile.scoring.statistic,
                "sha256": sha256_of(store.to_bytes(contender.profile)),
            }
            for contender in planned.contenders
        ],
        "settings": settings,
        "accuracy": _what_accuracy_is(planned),
    }


def _what_accuracy_is(planned: EvaluationPlan) -> dict[str, str]:
    """For each task, what its accuracy is the mean of."""
    questions: dict[str, list[Question]] = {}
    for asked in planned.asked:
        questions.setdefault(asked.exercise.task, []).extend(asked.exercise.questions)
    verbatim = {asked.exercise.task for asked in planned.asked if asked.exercise.verbatim}
    continued = {asked.exercise.task for asked in planned.asked if asked.exercise.continued}
    told = {task: judge.describe(found) for task, found in questions.items()}
    if not planned.options.generate:
        told = dict.fromkeys(questions, "share of answers that are the reference, token by token")
    told |= dict.fromkeys(continued, "share of tokens of the text that follows that are the first choice")
    return told | dict.fromkeys(verbatim, "share of tokens of the context that are the first choice")


def _run_document(planned: EvaluationPlan, placement: Placement) -> dict[str, Any]:
    libraries = ("numpy", "tokenizers", "torch", "transformers")
    return {
        "kvprofile_version": __version__,
        "versions": {"python": platform.python_version(), **{name: version(name) for name in libraries}},
        **_facts(planned, placement),
        "batch": planned.options.batch,
        "exercises": len(planned.asked),
        "questions": planned.questions,
        "variants": [asdict(variant) for variant in planned.variants],
    }


def _profile_warnings(description: Description, contenders: Sequence[Contender], rule: TrimRule) -> Iterator[str]:
    for contender in contenders:
        known = contender.profile.model.weights_sha256
        if known is None:
            yield f"the profile {contender.label} was imported and is not verified against weights"
        elif known != description.weights_sha256:
            yield f"the profile {contender.label} was made from other weights than these"
        made, scored = contender.profile.runtime, contender.profile.scoring.corpora
        apart = abs(rule.sink_tokens - made.sink_tokens) + abs(rule.recent_tokens - made.recent_tokens)
        tokens = sum(corpus.tokens for corpus in scored) / max(1, sum(corpus.documents for corpus in scored))
        if contender.probe is not None and apart > OTHER_TRIM * tokens:
            yield (
                f"the shares of {contender.label} were made for {made.sink_tokens} sinks and a window of "
                f"{made.recent_tokens}, on documents of {tokens:,.0f} tokens; score again for other ones"
            )


def _length_warnings(planned: EvaluationPlan) -> Iterator[str]:
    shortest = min(len(asked.context_ids) for asked in planned.asked)
    share = planned.rule.held_tokens(shortest, shortest) / shortest
    if share > 1 / 3:
        yield f"trimmed heads keep {share:.0%} of a context of {shortest:,} tokens; longer ones tell heads apart better"


def _check(planned: EvaluationPlan) -> None:
    names = [asked.name for asked in planned.asked]
    if not names:
        raise InputError(
            f"no exercise is left, with {planned.rule.sink_tokens} sinks, the last {planned.rule.recent_tokens} tokens "
            f"and {planned.description.max_positions:,} positions; choose other --context-tokens or --tasks"
        )
    twice = next((name for name in names if names.count(name) > 1), None) if len({*names}) < len(names) else None
    if twice:
        raise InputError(f"two sources of tasks are called {twice.rpartition('/')[0]}; rename one")
    rows = planned.description.vocabulary_rows
    highest = max(max((*asked.context_ids, *(i for row in asked.rows for i in row.ids))) for asked in planned.asked)
    if highest >= rows:
        raise InputError(
            f"{planned.description.source.folder}: the tokenizer gives id {highest}, the model has {rows} embeddings; "
            "it belongs to another model"
        )
    if any(variant.tokens == OWN_SCORES for variant in planned.variants):
        longest = max(len(asked.context_ids) for asked in planned.asked)
        chunk_tokens(planned.words.frame, planned.description.max_positions, longest)
