"""How a model is asked: an exercise as ids, its questions after the context, and where their evidence lies in it.

The frame is that of scoring. A question follows the context of the user's first turn; in a conversation the later ones
are turns of their own, after the reference answers to those before. Nothing here runs a model.
"""

from __future__ import annotations

import bisect
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

from kvprofile.budget.trim import TrimRule
from kvprofile.questions.tasks import CONTINUED_TOKENS, Exercise
from kvprofile.scoring.prompts import Frame, chat_frame, encode

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PretrainedConfig, PreTrainedTokenizerBase

SPARE_TOKENS = 32
"""How much longer than the reference a generated answer may be."""

Span: TypeAlias = tuple[int, int]
"""[start, stop) of characters or tokens."""

_MARKS = tuple(f"kvprofile-turn-{number}-goes-here" for number in range(3))


@dataclass(frozen=True)
class Wording:
    """The ids around questions and answers.

    ``end_ids`` ends an answer (empty where the tokenizer knows no end), ``next_ids`` stands between an answer and the
    next question of a conversation, ``stop_ids`` are all ids that end a generated answer.
    """

    frame: Frame
    end_ids: tuple[int, ...]
    next_ids: tuple[int, ...]
    stop_ids: frozenset[int]


@dataclass(frozen=True)
class Reference:
    """Where a row holds the reference answer to a question: ``answer_ids``, the end included, from ``start`` on."""

    question: int
    start: int
    answer_ids: tuple[int, ...]


@dataclass(frozen=True)
class AskedRow:
    """Ids that one branch reads after the context, and the answers in them."""

    ids: tuple[int, ...]
    references: tuple[Reference, ...]


@dataclass(frozen=True)
class Asked:
    """An exercise as ids.

    ``depths`` and ``outside`` have one entry for each question: where in the prompt its evidence lies, 0 to 1, and
    whether all of it lies outside of the sinks and of the window as they are at the first token of the question; None
    where no place is its evidence.
    """

    name: str
    exercise: Exercise
    length: int | None
    context_ids: tuple[int, ...]
    rows: tuple[AskedRow, ...]
    depths: tuple[float | None, ...]
    outside: tuple[bool | None, ...]

    @property
    def positions(self) -> int:
        """Positions that the longest branch reaches, with room for a generated answer."""
        spare = SPARE_TOKENS if self.exercise.answered else 0
        return len(self.context_ids) + max((len(row.ids) for row in self.rows), default=0) + spare

    @property
    def read_tokens(self) -> int:
        """Tokens that one budget reads after the context."""
        return sum(len(row.ids) for row in self.rows)

    def prompt(self, question: int) -> tuple[int, ...]:
        """The ids between the context and the answer to a question."""
        return next(row.ids[: each.start] for row in self.rows for each in row.references if each.question == question)


def wording(tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig, folder: Path) -> Wording:
    """The ids around questions and answers, from the chat template. Raises InputError as ``chat_frame`` does.

    Where the template cannot render two turns, or there is none, two line breaks stand between an answer and the next
    question, and the tokenizer's end of sequence ends an answer.
    """
    frame = chat_frame(tokenizer)
    stop = _stop_ids(tokenizer, config, folder)
    between = _between_turns(tokenizer) if tokenizer.chat_template else None
    next_ids = encode(tokenizer, between or "\n\n")
    end: tuple[int, ...] = () if tokenizer.eos_token_id is None else (int(tokenizer.eos_token_id),)
    if between and next_ids[0] in stop:  # a chat model ends its turn with a token of its own
        end = next_ids[:1]
    return Wording(frame, end, next_ids, stop | frozenset(end))


def ask(
    name: str,
    exercise: Exercise,
    length: int | None,
    tokenizer: PreTrainedTokenizerBase,
    words: Wording,
    rule: TrimRule,
    continued_tokens: int = CONTINUED_TOKENS,
) -> Asked:
    """An exercise as ids. ``length`` is the number of context tokens that was asked for, if one was.

    Of a continued text the last token of the context is read after the trim, because it predicts what follows; at most
    ``continued_tokens`` follow.
    """
    evidence = [question.evidence if exercise.answered else () for question in exercise.questions]
    ids, found = _tokenise(tokenizer, exercise.context, [span for spans in evidence for span in spans])
    prefix = words.frame.prefix_ids
    prompt_tokens = len(prefix) + len(ids)
    window_start = rule.window_start(prompt_tokens, prompt_tokens)
    tokens = iter((start + len(prefix), stop + len(prefix)) for start, stop in found)
    depths: list[float | None] = []
    outside: list[bool | None] = []
    for spans in evidence:
        places = [next(tokens) for _ in spans]
        depths.append(sum(a + b - 1 for a, b in places) / (2 * len(places) * prompt_tokens) if places else None)
        outside.append(all(a >= rule.sink_end and b <= window_start for a, b in places) if places else None)
    context = (*prefix, *ids)
    if exercise.continued:
        answer = encode(tokenizer, exercise.questions[0].answer)[:continued_tokens]
        rows = [AskedRow((context[-1], *answer[:-1]), (Reference(0, 1, tuple(answer)),))]
        context = context[:-1]
    else:
        rows = _rows(exercise, tokenizer, words)
    return Asked(
        name=name,
        exercise=exercise,
        length=length,
        context_ids=context,
        rows=tuple(rows),
        depths=tuple(depths),
        outside=tuple(outside),
    )


def _rows(exercise: Exercise, tokenizer: PreTrainedTokenizerBase, words: Wording) -> list[AskedRow]:
    """One row for each question; one for all questions of a conversation."""
    ids: list[int] = []
    rows: list[AskedRow] = []
    references: list[Reference] = []
    for number, question in enumerate(exercise.questions):
        if exercise.conversation and number:
            ids += [*words.next_ids, *encode(tokenizer, question.text)]
        else:
            ids += encode(tokenizer, "\n\n" + question.text)
        ids += words.frame.suffix_ids
        answer = encode(tokenizer, question.answer)
        references.append(Reference(number, len(ids), (*answer, *words.end_ids)))
        ids += answer
        if not exercise.conversation or number == len(exercise.questions) - 1:
            # the last token answers nothing: what it predicts is the end, or beyond it
            rows.append(AskedRow(tuple(ids if words.end_ids else ids[:-1]), tuple(references)))
            ids, references = [], []
    return rows


def _between_turns(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """What a chat template puts between an answer and the next question; None where it fails or hides the texts."""
    roles = ("user", "assistant", "user")
    messages = [{"role": role, "content": mark} for role, mark in zip(roles, _MARKS, strict=True)]
    try:
        text = tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True, enable_thinking=False
        )
    except Exception:  # a template is a program and fails in its own ways; one that takes a single turn is enough
        return None
    if not isinstance(text, str) or any(text.count(mark) != 1 for mark in _MARKS):
        return None
    between = text[text.index(_MARKS[1]) + len(_MARKS[1]) : text.index(_MARKS[2])]
    return between if text.index(_MARKS[1]) < text.index(_MARKS[2]) and between else None


def _stop_ids(tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig, folder: Path) -> frozenset[int]:
    """Ids that end a sequence for the tokenizer, the config or the generation config."""
    try:
        generation = json.loads((folder / "generation_config.json").read_text(encoding="utf-8")).get("eos_token_id")
    except (OSError, ValueError, AttributeError, RecursionError):
        generation = None
    named = (tokenizer.eos_token_id, getattr(config, "eos_token_id", None), generation)
    flat = [each for ids in named for each in (ids if isinstance(ids, Sequence) else [ids])]
    return frozenset(each for each in flat if type(each) is int)


def _tokenise(
    tokenizer: PreTrainedTokenizerBase, text: str, spans: Sequence[Span]
) -> tuple[tuple[int, ...], list[Span]]:
    """Ids of a text, and for each span of characters the tokens [start, stop) that touch it.

    A tokenizer without offsets counts the tokens of prefixes instead, one more on each side to be sure.
    """
    if not tokenizer.is_fast:
        ids = encode(tokenizer, text)
        counts = [tuple(len(encode(tokenizer, text[:place])) for place in span) for span in spans]
        return ids, [(max(0, start - 1), min(len(ids), stop + 1)) for start, stop in counts]
    found = tokenizer(
        text, add_special_tokens=False, return_attention_mask=False, return_offsets_mapping=True, verbose=False
    )
    starts = [start for start, _ in found["offset_mapping"]]
    stops = [stop for _, stop in found["offset_mapping"]]
    tokens = [(bisect.bisect_right(stops, start), bisect.bisect_left(starts, stop)) for start, stop in spans]
    return tuple(found["input_ids"]), tokens
