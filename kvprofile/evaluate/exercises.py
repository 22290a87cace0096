"""From names of tasks to exercises as ids: generated ones, those that people bring, and which questions are kept."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from kvprofile.budget.trim import TrimRule
from kvprofile.checkpoint import Description
from kvprofile.errors import InputError
from kvprofile.evaluate.encoding import Asked, Wording, ask
from kvprofile.evaluate.options import EvaluationOptions
from kvprofile.questions import user_tasks
from kvprofile.questions.tasks import TASKS, exercise
from kvprofile.scoring.prompts import encode

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PURPOSE = "evaluate"
"""Exercises made for this purpose are never used in training or scoring."""

_EVERY_QUESTION = 1_000_000


@dataclass(frozen=True)
class TaskExercises:
    """The exercises of a task that can be asked, why others are left out, and as what brought ones were read."""

    asked: list[Asked]
    warnings: list[str]
    told: tuple[str, ...]


def make(
    task: str,
    description: Description,
    tokenizer: PreTrainedTokenizerBase,
    words: Wording,
    rule: TrimRule,
    options: EvaluationOptions,
) -> TaskExercises:
    """The exercises of a task. Raises InputError where a generated one does not fit or a brought one is not read."""
    warnings = []
    told: tuple[str, ...] = ()
    if task in TASKS:
        found = list(_generated(task, tokenizer, words, rule, options))
        for each in found:
            _check_positions(each, description)
    else:
        brought, told = _brought(task, tokenizer, words, rule, options)
        found = [each for each in brought if each.positions <= description.max_positions]
        if len(found) < len(brought):
            left_out = f"{len(brought) - len(found)} of {len(brought)} documents are left out"
            warnings.append(f"{brought[0].exercise.task}: {left_out}, {description.position_reason}")
    kept = [each for each in found if each.exercise.questions]
    if len(kept) < len(found):
        left_out = f"{len(found) - len(kept)} of {len(found)} contexts are left out"
        warnings.append(f"{found[0].exercise.task}: {left_out}, no question has its evidence outside sinks and window")
    return TaskExercises(kept, warnings, told)


def _generated(
    task: str, tokenizer: PreTrainedTokenizerBase, words: Wording, rule: TrimRule, options: EvaluationOptions
) -> Iterator[Asked]:
    wanted = _EVERY_QUESTION if options.only_outside else options.questions
    for length in dict.fromkeys(options.context_tokens):
        for number in range(options.contexts):
            seed = (options.seed * 10**7 + length) * 10**7 + number
            made = exercise(task, PURPOSE, seed, length, wanted, lambda text: len(encode(tokenizer, text)))
            asked = ask(f"{task}/{length}/{number}", made, length, tokenizer, words, rule, options.continued_tokens)
            yield _only_outside(asked, tokenizer, words, rule, options) if options.only_outside else asked


def _brought(
    reference: str, tokenizer: PreTrainedTokenizerBase, words: Wording, rule: TrimRule, options: EvaluationOptions
) -> tuple[list[Asked], tuple[str, ...]]:
    wanted = _EVERY_QUESTION if options.only_outside else options.questions
    found = user_tasks.load(reference, options.contexts, wanted, options.columns)
    asked = [
        ask(f"{found.name}/{number}", each, None, tokenizer, words, rule) for number, each in enumerate(found.exercises)
    ]
    if options.only_outside:
        asked = [_only_outside(each, tokenizer, words, rule, options) for each in asked]
    return asked, found.told


def _only_outside(
    asked: Asked, tokenizer: PreTrainedTokenizerBase, words: Wording, rule: TrimRule, options: EvaluationOptions
) -> Asked:
    """The exercise without questions whose evidence a trimmed head sees; what has no known place stays."""
    chosen = [number for number, outside in enumerate(asked.outside) if outside is not False][: options.questions]
    kept = replace(asked.exercise, questions=tuple(asked.exercise.questions[number] for number in chosen))
    return ask(asked.name, kept, asked.length, tokenizer, words, rule, options.continued_tokens)


def _check_positions(asked: Asked, description: Description) -> None:
    if asked.positions > description.max_positions:
        raise InputError(
            f"{asked.name} needs {asked.positions:,} positions with its questions and answers, but "
            f"{description.position_reason}; pass fewer --context-tokens or other --tasks"
        )
