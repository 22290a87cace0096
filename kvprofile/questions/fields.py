"""From the fields of a row to questions: texts checked, answers any or all, choices shown, chat templates taken off."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from kvprofile.errors import InputError
from kvprofile.questions.judge import MOST_CHOICES, letter
from kvprofile.questions.tasks import Question

_SPECIAL = (
    r"(?:<\|[^<>|\n]{1,40}\|>|<\uff5c[^<>\uff5c\n]{1,40}\uff5c>|</?s>|\[/?INST\]"
    r"|<(?:start|end)_of_turn>|<[A-Z]+(?:_[A-Z0-9]+)+>)"
)
_ROLE = r"(?:(?:user|User|USER|system|System|assistant|Assistant|ASSISTANT|model)\b[ \t]*:?)?"
_TAIL = re.compile(rf"(?:\s*{_SPECIAL}\s*{_ROLE})+\s*\Z|\s*\b(?:ASSISTANT|Assistant):\s*\Z")
_HEAD = re.compile(rf"\A(?:\s*{_SPECIAL}\s*{_ROLE})+\s*")

ANSWER_WITH_LETTER = "Answer with the letter alone."
ANSWER_WITH_LETTERS = "Answer with the letter alone, or with all letters where several are right."


@dataclass
class Source:
    """Where a row stands, as errors name it, what may tell its part of a benchmark, and what is worth telling."""

    where: str
    hints: tuple[str, ...] = ()
    notes: Counter[str] = field(default_factory=Counter)

    def note(self, told: str) -> None:
        """Count something that was done with a row."""
        self.notes[told] += 1


def text_of(value: object, source: Source, what: str) -> str:
    """A field as text; numbers are written out. Raises InputError for anything else, or nothing."""
    text = str(value) if isinstance(value, int | float) and not isinstance(value, bool) else value
    if not isinstance(text, str) or not text.strip():
        raise InputError(f"{source.where} has no {what}, or one that is not text")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"{source.where} holds half a surrogate pair in its {what}, which is not text") from error
    return text


def context_of(value: object, source: Source) -> str:
    """The text that questions are about, without the opening of a chat template."""
    text = text_of(value, source, "context")
    bare = _HEAD.sub("", text)
    if bare != text:
        source.note("the opening of a chat template was taken off")
    return text_of(bare, source, "context")


def without_template_end(text: str) -> str:
    """A question without the special tokens and roles that a chat template put at its end."""
    return _TAIL.sub("", text)


def question_of(
    text: object, answers: object, source: Source, *, any_of: bool, measure: str = "words", **more: Any
) -> Question:
    """A question whose ``answers``, one or a list, are alternatives (``any_of``; the first is read) or all expected.

    What a chat template put at the end of the question is taken off, and noted. ``more`` are fields of ``Question``.
    """
    asked = text_of(text, source, "question")
    bare = without_template_end(asked)
    if bare != asked:
        source.note("the end of a question was another model's chat template, which was taken off")
    expected = references_of(answers, source)
    reference = expected[0] if any_of else ", ".join(expected)
    return Question(
        **{
            "text": text_of(bare, source, "question"),
            "answer": reference,
            "expected": expected,
            "evidence": (),
            "any_of": any_of,
            "measure": measure,
            **more,
        }
    )


def references_of(answers: object, source: Source) -> tuple[str, ...]:
    """One answer or a list of them. Raises InputError where there is none, or one that is not text."""
    listed = answers if isinstance(answers, list | tuple) else [answers]
    if not listed:
        raise InputError(f"{source.where} has no answer")
    return tuple(text_of(answer, source, "answer") for answer in listed)


def choice_question(text: object, choices: object, right: object, source: Source, *, shown: bool = False) -> Question:
    """A multiple-choice question, judged by the letter. ``right`` is the letter, or the words of the choice.

    Choices are listed after the question unless it holds them already (``shown``).
    """
    listed = choices if isinstance(choices, list | tuple) else []
    if not 2 <= len(listed) <= MOST_CHOICES:
        raise InputError(f"{source.where} has {len(listed)} choices; a question takes 2 to {MOST_CHOICES}")
    options = tuple(text_of(choice, source, "choice").strip() for choice in listed)
    known = [letter(number) for number in range(len(options))]
    given = references_of(right, source)[-1].strip()  # InfiniteBench gives the words, then the letter
    by_words = [each for each, option in zip(known, options, strict=True) if option == given]
    wanted = given if set(given) <= set(known) else by_words[0] if len(by_words) == 1 else ""
    if not wanted:
        raise InputError(f"{source.where}: the answer {given[:40]!r} is neither a letter nor the words of a choice")
    asked = text_of(text, source, "question").strip()
    if not shown:
        lines = (f"{each}. {option}" for each, option in zip(known, options, strict=True))
        asked = "\n".join([asked, "", *lines])
    asked = f"{asked}\n\n{ANSWER_WITH_LETTER if len(wanted) == 1 else ANSWER_WITH_LETTERS}"
    return question_of(asked, "".join(sorted(wanted)), source, any_of=False, measure="letter", choices=options)


def choices_in(text: str) -> list[str]:
    """The choices that a question lists as ``A. ...`` or ``(A) ...``, from A on without a gap; empty without two."""
    found = re.findall(r"(?m)^[ \t]*\(?([A-Z])[.)][ \t]*(.+?)[ \t]*$", text)
    kept: list[str] = []
    for mark, words in found:
        if mark == letter(len(kept)):
            kept.append(words)
    return kept if len(kept) > 1 else []
