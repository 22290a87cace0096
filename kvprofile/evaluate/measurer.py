"""One exercise under many budgets: prefill once, then trim, read the reference answers and, where needed, generate.

Questions and budgets are read side by side, the full cache among them, so what it makes of a token is there when the
others are compared with it and need not be kept. Logits are read in slices, so that a long answer over a large
vocabulary needs little memory.

Answers are written by the full cache first. One that it gets entirely wrong is not written under the other budgets:
there is nothing in it that could be lost.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias, TypeVar

import torch
from transformers import PreTrainedTokenizerBase

from kvprofile.budget.dtypes import PLAIN
from kvprofile.budget.float8 import of_cache
from kvprofile.budget.profile import Matrix, mean_budget
from kvprofile.errors import InputError
from kvprofile.evaluate.branch import Branch
from kvprofile.evaluate.encoding import SPARE_TOKENS, Asked, AskedRow, Reference, Wording
from kvprofile.evaluate.item_store import SPANS, AnswerSpan
from kvprofile.evaluate.simulate import Simulation
from kvprofile.evaluate.token_choice import TokenChoice
from kvprofile.questions.judge import is_right, score

SLICE_LOGITS = 32 * 2**20
"""Logits, over all rows and positions, that are held at a time (128 MiB in float32)."""

SIXTEEN_BITS = 2
"""Bytes of a number that caches of 8-bit floats are compared with: what they would replace."""

MOST_HELD = 6.0
"""Contexts' worth of keys and values that graded budgets may hold at a time, besides the context itself."""

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
    spans: tuple[AnswerSpan, ...] | None = None


@dataclass
class _Reading:
    """The reference answer to one question under one budget, read slice by slice.

    choices [m] first choices, nll [m] and kl [m] in nats.
    """

    reference: Reference
    choices: list[int] = field(default_factory=list)
    nll: list[float] = field(default_factory=list)
    kl: list[float] = field(default_factory=list)

    def add(self, logits: torch.Tensor, full: torch.Tensor | None) -> torch.Tensor:
        """Take the next logits [k, V], and give them as log-probabilities.

        ``full`` are those of the full cache; None where this is the full cache.
        """
        done = len(self.choices)
        targets = torch.tensor(self.reference.answer_ids[done : done + len(logits)], device=logits.device)
        log_probs = torch.log_softmax(logits, -1)
        self.choices += log_probs.argmax(-1).tolist()
        self.nll += (-log_probs.gather(-1, targets[:, None])[:, 0]).tolist()
        if full is None:
            self.kl += [0.0] * len(logits)
        else:
            terms = torch.where(full.isneginf(), 0.0, full.exp() * (full - log_probs))
            self.kl += terms.sum(-1).clamp(min=0.0).tolist()
        return log_probs

    @property
    def right(self) -> list[bool]:
        """Which reference tokens are the first choice."""
        return [choice == token for choice, token in zip(self.choices, self.reference.answer_ids, strict=True)]

    def agreement(self, full: _Reading, here: slice) -> float:
        """Share of some reference tokens whose first choice is the full cache's."""
        same = [mine == theirs for mine, theirs in zip(self.choices[here], full.choices[here], strict=True)]
        return sum(same) / len(same)

    @property
    def agreed(self) -> int:
        """Reference tokens before the first that greedy decoding would not write."""
        right = self.right
        return len(right) if all(right) else right.index(False)


Budget: TypeAlias = tuple[Matrix, TokenChoice | None, str]
"""Shares [L][G] of heads, how those that keep a part choose their tokens, and the dtype of the cache."""

_Read: TypeAlias = tuple[int, int, _Reading, _Reading]
"""(number of the budget, row of the branch, its reading of an answer, the full cache's reading of it)."""


@dataclass
class _Together:
    """Rows read side by side under some budgets: row ``r`` of budget ``b`` is row ``b * len(rows) + r`` of the branch.

    ``readings`` [budget][row][reference]; the first budget is the full cache. It has a branch of its own where it is
    read ``apart``; then the next budget's rows are the first of the branch.
    """

    rows: Sequence[AskedRow]
    budgets: Sequence[int]
    readings: list[list[list[_Reading]]]
    apart: bool = False

    def each(self) -> Iterator[_Read]:
        """What was read, one by one."""
        for place, budget in enumerate(self.budgets):
            for row, readings in enumerate(self.readings[place]):
                for number, reading in enumerate(readings):
                    first = (place - self.apart) * len(self.rows)
                    yield budget, first + row, reading, self.readings[0][row][number]


class Measurer:
    """Asks the questions of exercises under budgets, at most ``batch`` rows side by side, but always two budgets."""

    def __init__(
        self, simulation: Simulation, tokenizer: PreTrainedTokenizerBase, words: Wording, batch: int,
        advance: Callable[[int], None], generate: bool = True,
    ) -> None:  # fmt: skip
        self.simulation, self.tokenizer, self.words, self.batch = simulation, tokenizer, words, batch
        self.advance, self.generate = advance, generate

    def measure(self, asked: Asked, budgets: Sequence[Budget]) -> list[list[QuestionOutcome]]:
        """[budget][question]; the first budget is the full cache. Raises InputError where a probability is NaN.

        Budgets of a cache of 8-bit floats are measured after the others: what they hold was read in such a cache, while
        the full cache that they are compared with is read beside them as it is. ``advance`` is told the tokens read,
        but not those generated, nor those that a choice of tokens reads.
        """
        for choice in {id(choice): choice for _, choice, _ in budgets if choice and choice.reads_context}.values():
            choice.read(asked.context_ids)
        found: list[dict[int, QuestionOutcome]] = [{} for _ in budgets]
        for cache in dict.fromkeys(cache for *_, cache in budgets):
            numbers = [number for number, budget in enumerate(budgets) if budget[2] == cache]
            simulation = self.simulation if cache == PLAIN else self.simulation.beside(of_cache(cache))
            simulation.prefill(asked.context_ids)
            self.advance(len(asked.context_ids))
            self._measure_cache(asked, budgets, numbers, simulation, found)
            if simulation is not self.simulation:
                simulation.forget()
        self.simulation.forget()
        return [[outcomes[number] for number in sorted(outcomes)] for outcomes in found]

    def _measure_cache(
        self, asked: Asked, budgets: Sequence[Budget], numbers: Sequence[int], simulation: Simulation,
        found: list[dict[int, QuestionOutcome]],
    ) -> None:  # fmt: skip
        """Measure the budgets of these numbers, whose context ``simulation`` holds, into ``found``."""
        plain = self.simulation
        apart = simulation is not plain
        if apart:
            plain.trim_each([budgets[0][0]])
            numbers = [0, *numbers]
        rows = sorted(asked.rows, key=lambda row: -len(row.ids))  # rows of like length need little padding
        held = [_held(budgets[number]) for number in numbers]
        for part, some in enumerate(_with_first(held, max(2, self.batch))):
            chosen = [numbers[each] for each in some]
            mine = chosen[apart:]
            heads, choices, _ = zip(*(budgets[number] for number in mine), strict=True)
            simulation.trim_each(heads, choices=choices)
            bytes_of_full = plain.nbytes(0) * (SIXTEEN_BITS if apart else 1)
            shares = {each: simulation.nbytes(n) / bytes_of_full for n, each in enumerate(mine)}
            for together in _batches(rows, max(1, self.batch // len(chosen))):
                branch, read = self._read(asked, together, chosen, simulation)
                each = list(read.each())
                if not part and not apart:  # the full cache counts once
                    self._judge(asked, branch, [one for one in each if one[0] == 0], shares, found)
                known = {number for number, outcome in found[0].items() if outcome.accuracy > 0}
                others = [one for one in each if one[0] != 0]
                self._judge(asked, branch, others, shares, found, known)
                self.advance((len(chosen) - (part > 0 or apart)) * sum(len(row.ids) for row in together))

    def _judge(
        self, asked: Asked, branch: Branch, read: Sequence[_Read], shares: Mapping[int, float],
        found: list[dict[int, QuestionOutcome]], worth: Container[int] | None = None,
    ) -> None:  # fmt: skip
        """Put what budgets made of questions into ``found``; answers are written to those of ``worth`` (None: all)."""
        written = self._write(
            asked, branch, [one for one in read if worth is None or one[2].reference.question in worth]
        )
        for budget, row, reading, full in read:
            number = reading.reference.question
            found[budget][number] = self._outcome(asked, reading, full, shares[budget], written.get((row, number)))

    def _read(
        self, asked: Asked, rows: Sequence[AskedRow], budgets: Sequence[int], simulation: Simulation
    ) -> tuple[Branch, _Together]:
        """Teacher forcing: questions and their reference answers, under the budgets that ``simulation`` holds.

        The first of ``budgets`` is the full cache, which the plain simulation holds. Gives the branch of the others.
        """
        apart = simulation is not self.simulation
        empty = [[[_Reading(each) for each in row.references] for row in rows] for _ in budgets]
        read = _Together(rows, budgets, empty, apart)
        branch = simulation.start(len(rows), self.generate and asked.exercise.answered)
        slices = self._slices(branch, list(rows), len(budgets) - apart, len(budgets))
        if apart:
            full_rows = self._slices(self.simulation.start(len(rows)), list(rows), 1, len(budgets))
            slices = ((start, [*full, *logits]) for (start, full), (_, logits) in zip(full_rows, slices, strict=True))
        for start, logits in slices:
            for row, readings in enumerate(read.readings[0]):
                for number, reading in enumerate(readings):
                    first = reading.reference.start - 1 - start  # logits at one position predict the next token
                    here = slice(max(0, first), max(0, first + len(reading.reference.answer_ids)))
                    full: torch.Tensor | None = None
                    for place in range(len(budgets)):
                        answer = logits[place * len(rows) + row][here]
                        if len(answer):
                            log_probs = read.readings[place][row][number].add(answer, full)
                            full = log_probs if full is None else full
        return branch, read

    def _slices(
        self, branch: Branch, rows: list[AskedRow], budgets: int, together: int
    ) -> Iterator[tuple[int, list[torch.Tensor]]]:
        """Read rows a slice at a time: (first index, logits [k, V] of each row), k of 0 after a row's end.

        What stands before all answers is read at once, and nothing is given for it. ``together`` budgets are read
        slice by slice, those of another branch among them.
        """
        start = min(row.references[0].start for row in rows) - 1
        if start:
            branch.read([row.ids[:start] for row in rows] * budgets, logits=False)
        vocabulary = self.simulation.model.get_output_embeddings().weight.shape[0]
        step = max(1, SLICE_LOGITS // (vocabulary * len(rows) * together))
        for first in range(start, max(len(row.ids) for row in rows), step):
            yield first, branch.read([row.ids[first : first + step] for row in rows] * budgets)

    def _write(self, asked: Asked, branch: Branch, read: Sequence[_Read]) -> dict[tuple[int, int], list[int]]:
        """Greedy answers, by row of the branch and question, where greedy decoding does not write the reference.

        Up to the first token that differs the answer is the reference, so writing starts after that token, on what the
        row has read before it.
        """
        if not (asked.exercise.answered and self.generate):
            return {}
        written: dict[tuple[int, int], list[int]] = {}
        begun: list[tuple[int, _Reading]] = []
        for _, row, reading, _ in read:
            same = reading.agreed
            if same < len(reading.choices):
                answer = written[row, reading.reference.question] = list(reading.reference.answer_ids[:same])
                if reading.choices[same] not in self.words.stop_ids:
                    answer.append(reading.choices[same])
                    begun.append((row, reading))
        for some in _batches(begun, max(2, self.batch)):
            lengths = [len(asked.context_ids) + reading.reference.start + reading.agreed for _, reading in some]
            answers = branch.fork([row for row, _ in some], lengths).generate(
                [(reading.choices[reading.agreed],) for _, reading in some],
                [len(reading.choices) + SPARE_TOKENS - reading.agreed - 1 for _, reading in some],
                self.words.stop_ids,
            )
            for (row, reading), answer in zip(some, answers, strict=True):
                written[row, reading.reference.question] += answer
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
        elif asked.exercise.answered:
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
            agreement=reading.agreement(full, slice(0, tokens)),
            kl=kl,
            generated=text,
            generated_tokens=length,
            spans=tuple(_spans(reading, full)) if asked.exercise.continued else None,
        )


def _spans(reading: _Reading, full: _Reading) -> Iterator[AnswerSpan]:
    """The figures of a reading for each of ``SPANS`` that it reaches."""
    for first, most in SPANS:
        last = min(most or len(reading.choices), len(reading.choices))
        if first <= last:
            here = slice(first - 1, last)
            nll, kl = (math.fsum(values[here]) / (last - first + 1) for values in (reading.nll, reading.kl))
            right = sum(reading.right[here])
            yield AnswerSpan(first, last, right, nll, reading.agreement(full, here), kl)


def _held(budget: Budget) -> float:
    """Contexts' worth of keys and values that a budget holds alone: whole heads share theirs with other budgets."""
    heads, choice, _ = budget
    return 0.0 if choice is None else mean_budget(heads)


def _with_first(held: Sequence[float], most: int) -> Iterator[list[int]]:
    """The numbers of budgets, at most ``most`` at a time, the first of all with each of them.

    ``held`` are the contexts' worth that each holds; together they are at most MOST_HELD, or one budget.
    """
    part = [0]
    for number in range(1, len(held)):
        full = len(part) == most or (len(part) > 1 and sum(held[each] for each in part) + held[number] > MOST_HELD)
        if full:
            yield part
            part = [0]
        part.append(number)
    yield part


def _batches(elements: Sequence[Element], most: int) -> Iterator[Sequence[Element]]:
    for start in range(0, len(elements), most):
        yield elements[start : start + most]
