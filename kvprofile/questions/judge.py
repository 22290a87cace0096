"""How good an answer is, from 0 to 1: each reference compared by the question's measure, then any or all of them.

With ``any_of`` the best reference counts. Without, all are expected: by ``words`` an answer without one of them is
wrong, by every other measure the mean counts, as RULER counts one needle found of four. docs/texts-and-questions.md
says which benchmark uses what.
"""

from __future__ import annotations

import difflib
import re
import string
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Protocol

from kvprofile.errors import InputError

MOST_CHOICES = 26
FIRST_LETTER = "A"


class Judged(Protocol):
    """What of a question decides about an answer."""

    @property
    def expected(self) -> tuple[str, ...]:
        """The references."""

    @property
    def any_of(self) -> bool:
        """Whether one of them is enough."""

    @property
    def measure(self) -> str:
        """A name in ``MEASURES``."""

    @property
    def choices(self) -> tuple[str, ...]:
        """What was to choose from; the first is A."""


def score(question: Judged, answer: str) -> float:
    """How good an answer is, 0 to 1."""
    found = scores(question, answer)
    if question.any_of:
        return max(found)
    return min(found) if question.measure == "words" else sum(found) / len(found)


def scores(question: Judged, answer: str) -> list[float]:
    """How well an answer agrees with each reference, 0 to 1."""
    compare = MEASURES[question.measure].compare
    return [compare(answer, reference, question.choices) for reference in question.expected]


def is_right(question: Judged, answer: str) -> bool:
    """Whether an answer counts as right: entirely so or, by a measure of likeness, by more than half."""
    found = score(question, answer)
    return found > 0.5 if MEASURES[question.measure].likeness else found == 1.0


def describe(questions: Iterable[Judged]) -> str:
    """What accuracy means for these questions, in a phrase."""
    told = Counter(MEASURES[each.measure].told + _of_several(each) for each in questions)
    return "; ".join(phrase for phrase, _ in told.most_common())


def _of_several(question: Judged) -> str:
    if len(question.expected) == 1:
        return ""
    if question.any_of:
        return ", the best of several references"
    return ", all of several references" if question.measure == "words" else ", the mean over several references"


def require_measure(name: str) -> None:
    """Raise InputError for a measure whose library is not installed."""
    if name == "rouge-l" and find_spec("rouge_score") is None:
        raise InputError("summaries are judged by ROUGE-L; pip install 'kvprofile[bench]' brings it")


def holds(answer: str, expected: str) -> bool:
    """Whether ``answer`` contains ``expected`` as whole words; case and white space do not matter."""
    return bool(_as_words(_folded(expected)).search(_folded(answer)))


def letters(answer: str, choices: Sequence[str]) -> frozenset[str]:
    """The letters that an answer gives: alone, at its beginning, after 'answer is', or by the words of a choice.

    A letter that begins a sentence ('A river.') is not one. Empty where no letter is given.
    """
    if not choices:
        return frozenset()
    known = _letters_of(choices)
    text = answer.replace("*", "").strip()
    by_words = [each for each, choice in zip(known, choices, strict=True) if _bare(choice) == _bare(text)]
    if len(by_words) == 1 and _bare(text):
        return frozenset(by_words)
    some = rf"\(?[{known}]+(?![\w'\u2019])\)?"
    run = rf"(?P<run>{some}(?:\s*(?:,|&|and)?\s*{some})*)"
    for opening in (r"(?i:\b(?:answer|option|choice)s?(?:\s+(?:is|are))?\s*:?)\s*", r"\A[\s\"'`]*"):
        found = re.search(f"{opening}{run}(?P<rest>.*)", text, re.DOTALL)
        if found and (_ends_here(found["rest"]) or _follows(found["run"], found["rest"], known, choices)):
            return frozenset(each for each in found["run"] if each in known)
    bracketed = set(re.findall(rf"\(([{known}])\)", text))
    return frozenset(bracketed) if len(bracketed) == 1 else frozenset()


def letter(number: int) -> str:
    """The letter of a choice; the first, A, is number 0."""
    return chr(ord(FIRST_LETTER) + number)


@dataclass(frozen=True)
class Measure:
    """``compare(answer, reference, choices)`` from 0 to 1, and what its mean is.

    ``likeness``: few answers are entirely like a reference, so where answers are counted more than half is right.
    """

    told: str
    compare: Callable[[str, str, tuple[str, ...]], float]
    likeness: bool = False


def _words(answer: str, reference: str, _: Sequence[str]) -> float:
    return float(holds(answer, reference))


def _text(answer: str, reference: str, _: Sequence[str]) -> float:
    return float(reference.lower() in answer.lower())


def _letter(answer: str, reference: str, choices: Sequence[str]) -> float:
    """1 for the letters of the reference; a quarter for some of several and no wrong one, as L-Eval counts."""
    given, wanted = letters(answer, choices), frozenset(reference)
    return 1.0 if given == wanted else 0.25 if given and given < wanted else 0.0


def _first_number(answer: str, reference: str, _: Sequence[str]) -> float:
    return _same_number(re.findall(r"\d+\.\d+|\d+", answer)[:1], reference)


def _last_number(answer: str, reference: str, _: Sequence[str]) -> float:
    return _same_number(re.findall(r"-?\d+\.\d+|-?\d+", re.sub(r"(?<=\d),(?=\d)", "", answer))[-1:], reference)


def _same_number(found: Sequence[str], reference: str) -> float:
    """Digits as they stand, because 007 is not 7, but 7.0 is."""
    wanted = reference.strip()
    if not found:
        return 0.0
    try:
        return float(found[0] == wanted or ("." in found[0] + wanted and float(found[0]) == float(wanted)))
    except ValueError:
        return 0.0


def _numbers(answer: str, reference: str, _: Sequence[str]) -> float:
    """Share of the answer's numbers that are the reference's first (LongBench's counts and retrieval)."""
    found, wanted = re.findall(r"\d+", answer), re.findall(r"\d+", reference)
    return found.count(wanted[0]) / len(found) if found and wanted else 0.0


def _class(answer: str, reference: str, choices: Sequence[str]) -> float:
    """1 over the classes that the first line names, if the right one is there (LongBench).

    A class whose name is part of the right one's is not counted against it.
    """
    line = answer.lstrip("\n").partition("\n")[0]
    named = [each for each in choices if each in line and (each == reference or each not in reference)]
    return 1 / len(named) if reference in named else 0.0


def _f1(answer: str, reference: str, _: Sequence[str]) -> float:
    return _overlap(_normal(answer).split(), _normal(reference).split())


def _f1_characters(answer: str, reference: str, _: Sequence[str]) -> float:
    """F1 of characters, for languages without spaces (InfiniteBench's Chinese questions)."""
    return _overlap(*([c for c in text.lower() if c.isalnum()] for text in (answer, reference)))


def _overlap(found: list[str], wanted: list[str]) -> float:
    same = (Counter(found) & Counter(wanted)).total()
    return 2 * same / (len(found) + len(wanted)) if same else 0.0


def _rouge_l(answer: str, reference: str, _: Sequence[str]) -> float:
    from rouge_score.rouge_scorer import RougeScorer

    return float(RougeScorer(["rougeL"]).score(reference, answer)["rougeL"].fmeasure)


def _edit(answer: str, reference: str, _: Sequence[str]) -> float:
    """Likeness of the first line that is code and no comment (LongBench's completions)."""
    lines = (line for line in answer.lstrip("\n").split("\n") if not any(mark in line for mark in ("`", "#", "//")))
    return difflib.SequenceMatcher(None, next(lines, ""), reference).ratio()


MEASURES: dict[str, Measure] = {
    "words": Measure("share of answers that hold the reference as whole words", _words),
    "text": Measure("share of answers that hold the reference as text", _text),
    "letter": Measure("share of answers that give the right letter", _letter),
    "number": Measure("share of answers whose first number is right", _first_number),
    "last-number": Measure("share of answers whose last number is right", _last_number),
    "numbers": Measure("share of the numbers in answers that are right", _numbers),
    "class": Measure("share of answers that name the right class and no other", _class),
    "f1": Measure("mean F1 of words", _f1, likeness=True),
    "f1-characters": Measure("mean F1 of characters", _f1_characters, likeness=True),
    "rouge-l": Measure("mean ROUGE-L", _rouge_l, likeness=True),
    "edit": Measure("mean likeness of the next line of code", _edit, likeness=True),
}
"""Ways to compare an answer with a reference, by the names that files and ``--columns`` use."""

WITHOUT_CHOICES = tuple(name for name in MEASURES if name not in ("letter", "class"))
"""Those that need nothing but the answer and the reference."""


def _letters_of(choices: Sequence[str]) -> str:
    return "".join(letter(number) for number in range(len(choices)))


def _ends_here(rest: str) -> bool:
    """Whether what follows a letter shows that it stood for itself."""
    return re.match(r"\s*(\Z|\n|[.):;,\"'`\]]|\s[-\u2013\u2014])", rest) is not None


def _follows(run: str, rest: str, known: str, choices: Sequence[str]) -> bool:
    """Whether the words of its choice follow a letter: 'B the red door'."""
    words = _bare(choices[known.index(run)]) if run in known else ""
    return bool(words) and _bare(rest).startswith(words)


def _bare(text: str) -> str:
    """Words alone: lower case, without what surrounds them."""
    return _folded(text).strip(string.punctuation + " ")


def _normal(text: str) -> str:
    """SQuAD's normal form: lower case, no punctuation, no articles."""
    bare = "".join(each for each in text.lower() if each not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", bare)


def _folded(text: str) -> str:
    return " ".join(text.split()).casefold()


def _as_words(text: str) -> re.Pattern[str]:
    """``text`` where no Latin letter or digit continues it: 2415 is not in 24157."""
    before = r"(?<![a-z0-9])" if re.match(r"[a-z0-9]", text) else ""
    after = r"(?![a-z0-9])" if re.search(r"[a-z0-9]\Z", text) else ""
    return re.compile(f"{before}{re.escape(text)}{after}")
