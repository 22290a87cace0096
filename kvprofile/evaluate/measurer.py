"""One exercise under many budgets: prefill once, then trim, read the reference answers and, where needed, generate.

The first budget is the full cache; its probabilities are what the others are compared with, and are kept for the
exercise only. Logits are read in slices, so that a long answer over a large vocabulary needs little memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from transformers import PreTrainedTokenizerBase

from kvprofile.budget.profile import Matrix
from kvprofile.errors import InputError
from kvprofile.evaluate.branch import Branch
from kvprofile.evaluate.encoding import SPARE_TOKENS, Asked, AskedRow, Reference, Wording
from kvprofile.evaluate.simulate import Simulation
from kvprofile.questions.judge import is_right, score

KL_TOKENS = 128
"""Answer tokens of a question over which the divergence is measured."""

SLICE_POSITIONS = 512
"""Positions, over all rows, whose logits are held at a time."""

Element = TypeVar("Element")


@dataclass(frozen=True)
class QuestionOutcome:
    """What one budget made of one question; the fields are those of ``items.Item``."""

    retention_realised: float
    reference_tokens: int
    tokens_right: int
    exact: bool
    right: bool | None
    accuracy: float
    nll: float
    agreement: float
    kl: float
    generated: str | None
    generated_tokens: int | None


@dataclass
class _Reading:
    """The reference answer to one question under one budget, read slice by slice.

    choices [m] first choices, nll [m] and kl [<= KL_TOKENS] in nats, log_probs [<= KL_TOKENS, V] of the full cache.
    """

    reference: Reference
    choices: list[int] = field(default_factory=list)
    nll: list[float] = field(default_factory=list)
    kl: list[float] = field(default_factory=list)
    log_probs: list[torch.Tensor] = field(default_factory=list)

    def add(self, logits: torch.Tensor, full: _Reading | None) -> None:
        """Take the next logits [k, V]; without ``full`` this is the full cache, whose probabilities are kept."""
        done = len(self.choices)
        targets = torch.tensor(self.reference.answer_ids[done : done + len(logits)], device=logits.device)
        log_probs = torch.log_softmax(logits, -1)
        self.choices += log_probs.argmax(-1).tolist()
        self.nll += (-log_probs.gather(-1, targets[:, None])[:, 0]).tolist()
        compared = log_probs[: max(0, KL_TOKENS - done)]
        if full is None:
            self.log_probs.append(compared)
            self.kl += [0.0] * len(compared)
        elif len(compared):
            if len(full.log_probs) > 1:
                full.log_probs = [torch.cat(full.log_probs)]
            theirs = full.log_probs[0][done : done + len(compared)]
            terms = torch.where(theirs.isneginf(), 0.0, theirs.exp() * (theirs - compared))
            self.kl += terms.sum(-1).clamp(min=0.0).tolist()

    @property
    def right(self) -> list[bool]:
        """Which reference tokens are the first choice."""
        return [choice == token for choice, token in zip(self.choices, self.reference.answer_ids, strict=True)]


class Measurer:
    """Asks the questions of exercises under budgets, at most ``batch`` rows side by side."""

    def __init__(
        self, simulation: Simulation, tokenizer: PreTrainedTokenizerBase, words: Wording, batch: int,
        advance: Callable[[int], None], generate: bool = True,
    ) -> None:  # fmt: skip
        self.simulation, self.tokenizer, self.words, self.batch = simulation, tokenizer, words, batch
        self.advance, self.generate = advance, generate

    def measure(self, asked: Asked, budgets: Sequence[Matrix]) -> list[list[QuestionOutcome]]:
        """[budget][question]; the first budget is the full cache. Raises InputError where a probability is NaN.

        ``advance`` is told the tokens read, but not those generated.
        """
        simulation = self.simulation
        simulation.prefill(asked.context_ids)
        self.advance(len(asked.context_ids))
        found: list[list[QuestionOutcome]] = []
        full: list[_Reading] = []
        full_bytes = 0
        for heads in budgets:
            simulation.trim(heads)
            readings = self._read(asked, full)
            full, full_bytes = full or readings, full_bytes or simulation.nbytes()
            share = simulation.nbytes() / full_bytes
            written = self._generate(asked, readings)
            found.append(
                [
                    self._outcome(asked, reading, first, share, written.get(number))
                    for number, (reading, first) in enumerate(zip(readings, full, strict=True))
                ]
            )
            self.advance(asked.read_tokens)
        simulation.forget_context()
        return found

    def _read(self, asked: Asked, full: list[_Reading]) -> list[_Reading]:
        """Teacher forcing: every question and its reference answer."""
        found: dict[int, _Reading] = {}
        for rows in _batches(asked.rows, self.batch):
            readings = [[_Reading(reference) for reference in row.references] for row in rows]
            found |= {reading.reference.question: reading for row in readings for reading in row}
            for start, logits in _slices(self.simulation.start(len(rows)), rows):
                for row, piece in zip(readings, logits, strict=True):
                    for reading in row:
                        first = reading.reference.start - 1 - start  # logits at one position predict the next token
                        answer = piece[max(0, first) : max(0, first + len(reading.reference.answer_ids))]
                        if len(answer):
                            reading.add(answer, full[reading.reference.question] if full else None)
        return [found[number] for number in sorted(found)]

    def _generate(self, asked: Asked, readings: list[_Reading]) -> dict[int, list[int]]:
        """Greedy answers, by question, where the reference is not what greedy decoding writes.

        Up to the first token that differs the answer is the reference, so writing starts after that token.
        """
        if asked.exercise.verbatim or not self.generate:
            return {}
        written: dict[int, list[int]] = {}
        prompts: dict[int, tuple[int, ...]] = {}
        for number, reading in enumerate(readings):
            if not all(reading.right):
                same = reading.right.index(False)
                token = reading.choices[same]
                written[number] = list(reading.reference.answer_ids[:same])
                if token not in self.words.stop_ids:
                    written[number].append(token)
                    prompts[number] = (*asked.prompt(number), *written[number])
        for numbers in _batches(list(prompts), self.batch):
            left = [len(readings[n].reference.answer_ids) + SPARE_TOKENS - len(written[n]) for n in numbers]
            branch = self.simulation.start(len(numbers))
            for _ in _slices(branch, [AskedRow(prompts[number][:-1], ()) for number in numbers]):
                pass
            answers = branch.generate([prompts[number][-1:] for number in numbers], max(left), self.words.stop_ids)
            for number, answer, most in zip(numbers, answers, left, strict=True):
                written[number] += answer[:most]
        return written

    def _outcome(
        self, asked: Asked, reading: _Reading, full: _Reading, share: float, written: list[int] | None
    ) -> QuestionOutcome:
        nll, kl = (math.fsum(values) / len(values) for values in (reading.nll, reading.kl))
        if not (math.isfinite(nll) and math.isfinite(kl)):
            raise InputError(
                f"{asked.name}: the model gives probabilities that are not numbers; try --dtype float32 or bfloat16"
            )
        question = asked.exercise.questions[reading.reference.question]
        text = None if written is None else self.tokenizer.decode(written, skip_special_tokens=True)
        tokens, hits = len(reading.choices), sum(reading.right)
        right, length, accuracy = None, None, hits / tokens
        if written is not None and text is not None:
            right, length, accuracy = is_right(question, text), len(written), score(question, text)
        elif not asked.exercise.verbatim:
            right = hits == tokens
            accuracy = float(right)
            length = tokens - len(self.words.end_ids) if right else None
        return QuestionOutcome(
            retention_realised=share,
            reference_tokens=tokens,
            tokens_right=hits,
            exact=hits == tokens,
            right=right,
            accuracy=accuracy,
            nll=nll,
            agreement=sum(a == b for a, b in zip(reading.choices, full.choices, strict=True)) / tokens,
            kl=kl,
            generated=text,
            generated_tokens=length,
        )


def _slices(branch: Branch, rows: Sequence[AskedRow]) -> Iterator[tuple[int, list[torch.Tensor]]]:
    """Read rows a slice at a time: (first index, logits [k, V] of each row), k of 0 after a row's end."""
    step = max(1, SLICE_POSITIONS // len(rows))
    for start in range(0, max(len(row.ids) for row in rows), step):
        yield start, branch.read([row.ids[start : start + step] for row in rows])


def _batches(elements: Sequence[Element], most: int) -> Iterator[Sequence[Element]]:
    for start in range(0, len(elements), most):
        yield elements[start : start + most]
