"""Seeded tasks: a context, questions about it, what an answer must contain, and where in the context that stands.

The same purpose, task and seed give the same exercise on every machine; two purposes ("evaluate", "train") share
templates and never a fact. Filler comes from :mod:`kvprofile.corpus.generate`. How a model is asked is not decided
here.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from kvprofile.corpus.generate import KINDS, blocks, invented_word, separator
from kvprofile.corpus.sources import documents_folder

Measure = Callable[[str], int]
"""Length of a text in the caller's unit, usually tokens."""

REPEAT = "Repeat the previous context exactly."

CONTINUED_TOKENS = 500
"""Most tokens of a continued text that are read, unless fewer are asked for."""

CONTINUED_CHARACTERS = 3600
"""Characters that follow a continued text: more than 500 tokens of them, by most tokenizers."""


@dataclass(frozen=True)
class Question:
    """One question: the reference answer, what a right answer holds, and the evidence as [start, stop) spans.

    Spans count characters of the context; none where it is not known what stands where. With ``any_of`` one of the
    expected strings is enough. ``measure`` and ``choices`` are those of ``judge``; choices shown are part of the text.
    """

    text: str
    answer: str
    expected: tuple[str, ...]
    evidence: tuple[tuple[int, int], ...]
    any_of: bool = False
    measure: str = "words"
    choices: tuple[str, ...] = ()


@dataclass(frozen=True)
class Exercise:
    """A context and its questions.

    In a conversation each question is asked after the answer to the one before. ``verbatim``: the whole context is
    asked back. ``continued``: nothing is asked; the answer is what follows the context, in the same turn.
    """

    task: str
    context: str
    questions: tuple[Question, ...]
    conversation: bool = False
    verbatim: bool = False
    continued: bool = False

    @property
    def answered(self) -> bool:
        """Whether answers can be right or wrong. Where not, the text is known, and only how well it is told counts."""
        return not (self.verbatim or self.continued)


@dataclass(frozen=True)
class _Fact:
    """Statements to place, in this order, and the question they answer."""

    statements: tuple[str, ...]
    question: str
    answer: str
    expected: tuple[str, ...]


def exercise(task: str, purpose: str, seed: int, length: int, questions: int, measure: Measure = len) -> Exercise:
    """The exercise of a task: a context of about ``length`` units of ``measure``, never more than a block longer.

    ``questions`` is the most that are asked; a short context holds fewer. Raises KeyError for an unknown task.
    """
    rng = random.Random(f"{purpose}:{task}:{seed}")
    return TASKS[task](rng, length, questions, measure)


def _weave(
    rng: random.Random,
    filler: Iterator[str],
    joint: str,
    statements: Sequence[str],
    length: int,
    measure: Measure,
    opening: str = "",
) -> tuple[str, list[tuple[int, int]]]:
    """Spread statements evenly, in their order, over filler; give the text and each statement's span."""
    room = length - sum(measure(joint + statement) for statement in statements) - (measure(opening) if opening else 0)
    between: list[str] = []
    while room > 0:
        between.append(next(filler))
        room -= measure(joint + between[-1])
    places = sorted(rng.random() for _ in statements)
    parts: list[tuple[str, bool]] = [(opening, False)] if opening else []
    told = 0
    for index in range(len(between) + 1):
        while told < len(statements) and places[told] * (len(between) + 1) < index + 1:
            parts.append((statements[told], True))
            told += 1
        if index < len(between):
            parts.append((between[index], False))
    text, spans = "", []
    for part, counts in parts:
        text += joint if text else ""
        if counts:
            spans.append((len(text), len(text) + len(part)))
        text += part
    return text, spans


def _facts(
    task: str,
    rng: random.Random,
    facts: list[_Fact],
    kind: str,
    length: int,
    questions: int,
    measure: Measure,
    conversation: bool = False,
) -> Exercise:
    """Place facts in filler of a kind and ask for some of them; every statement of one fact keeps its order."""
    tagged = sorted(
        (
            (place, fact, statement)
            for fact, found in enumerate(facts)
            for place, statement in zip(sorted(rng.random() for _ in found.statements), found.statements, strict=True)
        ),
        key=lambda entry: entry[0],
    )
    text, spans = _weave(rng, blocks(kind, rng), separator(kind), [s for _, _, s in tagged], length, measure)
    evidence: dict[int, list[tuple[int, int]]] = {}
    for (_, fact, _), span in zip(tagged, spans, strict=True):
        evidence.setdefault(fact, []).append(span)
    asked = rng.sample(range(len(facts)), min(questions, len(facts)))
    found = tuple(Question(facts[i].question, facts[i].answer, facts[i].expected, tuple(evidence[i])) for i in asked)
    return Exercise(task, text, found, conversation)


def _until_full(
    rng: random.Random, make: Callable[[Iterator[str]], _Fact], room: float, measure: Measure
) -> list[_Fact]:
    """Facts about names that never occur twice until their statements fill ``room``; at least one."""
    names, facts = _names(rng), list[_Fact]()
    while room > 0 or not facts:
        facts.append(make(names))
        room -= sum(measure(f" {statement}") for statement in facts[-1].statements)
    return facts


def _names(rng: random.Random) -> Iterator[str]:
    seen: set[str] = set()
    while True:
        name = invented_word(rng).capitalize()
        if name not in seen:
            seen.add(name)
            yield name


_NOUNS = ("code", "number", "password", "badge", "locker", "ticket")


def _number(rng: random.Random) -> str:
    return "".join(rng.choice("0123456789") for _ in range(rng.choice((4, 5))))


def _record(rng: random.Random, name: str) -> _Fact:
    value, noun = _number(rng), rng.choice(_NOUNS)
    record = f"{name}={value}"
    statement = rng.choice((f"The {noun} is [{record}].", f"Use {noun} [{record}] there.", f"[{record}] is a {noun}."))
    return _Fact((statement,), f"What is [{name}]?", record, (value,))


def _needle(rng: random.Random, length: int, questions: int, measure: Measure) -> Exercise:
    facts = _until_full(rng, lambda names: _record(rng, next(names)), 0.1 * length, measure)
    return _facts("needle", rng, facts, rng.choice(KINDS), length, questions, measure)


def _multi_key(rng: random.Random, length: int, questions: int, measure: Measure) -> Exercise:
    facts = _until_full(rng, lambda names: _record(rng, next(names)), 0.5 * length, measure)
    return _facts("multi_key", rng, facts, "prose", length, questions, measure)


def _multi_turn(rng: random.Random, length: int, questions: int, measure: Measure) -> Exercise:
    facts = _until_full(rng, lambda names: _record(rng, next(names)), 0.3 * length, measure)
    return _facts("multi_turn", rng, facts, rng.choice(KINDS), length, questions, measure, conversation=True)


def _multi_value(rng: random.Random, length: int, questions: int, measure: Measure) -> Exercise:
    def make(names: Iterator[str]) -> _Fact:
        name = next(names)
        values = tuple(_number(rng) for _ in range(2))
        records = [f"{name}={value}" for value in values]
        answer = ", ".join(records)
        return _Fact(tuple(f"[{record}] holds." for record in records), f"List every [{name}].", answer, values)

    facts = _until_full(rng, make, 0.2 * length, measure)
    return _facts("multi_value", rng, facts, "prose", length, questions, measure)


def _lookup(rng: random.Random, length: int, questions: int, measure: Measure) -> Exercise:
    def make(names: Iterator[str]) -> _Fact:
        name = next(names)
        value = _number(rng)
        row = f'{{"{name}": {value}}}'
        return _Fact((row,), f"Which row has {name}?", row, (value,))

    facts = _until_full(rng, make, 0.5 * length, measure)
    return _facts("lookup", rng, facts, "tables", length, questions, measure)


def _variables(rng: random.Random, length: int, questions: int, measure: Measure) -> Exercise:
    def make(names: Iterator[str]) -> _Fact:
        name = next(names)
        value, other = _number(rng), next(names)
        first, second = f"{other} = {value}", f"{name} = {other}"
        return _Fact((first, second), f"Trace {name}.", f"{second}; {first}", (value,))

    facts = _until_full(rng, make, 0.2 * length, measure)
    return _facts("variables", rng, facts, "code", length, questions, measure)


def _functions(rng: random.Random, length: int, questions: int, measure: Measure) -> Exercise:
    def make(names: Iterator[str]) -> _Fact:
        name = next(names)
        function = next(blocks("code", rng))
        body = function[function.index("(") :].rstrip("\n")
        source = f"def {name}{body}"
        return _Fact((source + "\n",), f"Show the function {name}.", source, (body.split("\n", 1)[1].strip(),))

    facts = _until_full(rng, make, 0.6 * length, measure)
    return _facts("functions", rng, facts, "code", length, questions, measure)


_SENTENCES = (
    ("{name} opens locker {value}.", "Which locker does {name} open?"),
    ("{name} wears badge {value}.", "Which badge does {name} wear?"),
    ("{name} sends ticket {value}.", "Which ticket does {name} send?"),
    ("{name} lives in room {value}.", "Which room does {name} live in?"),
)


def _prose(rng: random.Random, length: int, questions: int, measure: Measure) -> Exercise:
    def make(names: Iterator[str]) -> _Fact:
        name = next(names)
        value, (statement, question) = _number(rng), rng.choice(_SENTENCES)
        said = statement.format(name=name, value=value)
        return _Fact((said,), question.format(name=name), said, (value,))

    facts = _until_full(rng, make, 0.2 * length, measure)
    return _facts("prose", rng, facts, "prose", length, questions, measure)


_MANNERS = (
    "short sentences", "plain verbs", "a warm tone", "no jargon", "one question at a time", "quoted sources",
    "dry humour", "a clear next step", "names in full", "metric units", "numbers in words", "a calm voice",
)  # fmt: skip


def _persona(rng: random.Random, length: int, questions: int, measure: Measure) -> Exercise:
    first, second = rng.sample(_MANNERS, 2)
    name, closing = (invented_word(rng, 3).capitalize() for _ in range(2))
    wishes = f"The guide asks for {first} and {second}."
    facts = (
        (f"You are [{name}].", "Who are you?", f"You are [{name}].", (name,)),
        (wishes, "What did the guide ask for?", wishes, (first, second)),
        (f"Sign with [{closing}].", "How do you sign?", f"Sign with [{closing}].", (closing,)),
    )
    guide = " ".join(statement for statement, *_ in facts)
    text, _ = _weave(rng, blocks("voice", rng), " ", (), length, measure, opening=guide)
    found = [
        Question(question, answer, expected, ((guide.index(statement), guide.index(statement) + len(statement)),))
        for statement, question, answer, expected in facts
    ]
    rng.shuffle(found)
    return Exercise("persona", text, tuple(found[:questions]))


def _counting(rng: random.Random, length: int, questions: int, measure: Measure) -> Exercise:
    def make(names: Iterator[str]) -> _Fact:
        name = next(names)
        count = rng.randrange(1, 6)
        return _Fact((f"{name} rings.",) * count, f"How many times does {name} ring?", str(count), (str(count),))

    facts = _until_full(rng, make, 0.2 * length, measure)
    return _facts("counting", rng, facts, "prose", length, questions, measure)


def _repeat(rng: random.Random, length: int, _questions: int, measure: Measure) -> Exercise:
    kind = rng.choice(KINDS)
    text, _ = _weave(rng, blocks(kind, rng), separator(kind), (), length, measure)
    return Exercise("repeat", text, (Question(REPEAT, text, (text,), ((0, len(text)),)),), verbatim=True)


_CHARACTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"


def _strings(rng: random.Random, length: int, _questions: int, measure: Measure) -> Exercise:
    def words() -> Iterator[str]:
        while True:
            yield "".join(rng.choice(_CHARACTERS) for _ in range(rng.randrange(4, 10)))

    text, _ = _weave(rng, words(), " ", (), length, measure)
    return Exercise("strings", text, (Question(REPEAT, text, (text,), ((0, len(text)),)),), verbatim=True)


def _continuation(rng: random.Random, length: int, _questions: int, measure: Measure) -> Exercise:
    """Real text that goes on: a bundled document up to some word, and what follows there.

    Where a document is too short for the length, it begins after the others.
    """
    folder = documents_folder()
    texts = [path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.md")) if path.name != "README.md"]
    rng.shuffle(texts)
    *others, text = texts
    most = len(text) - CONTINUED_CHARACTERS
    least = min(len(_end(text[:most], length, measure)), most // 2)
    place = rng.choice([found.start() for found in re.finditer(r"\s+(?=\S)", text) if least <= found.start() <= most])
    context = _end("\n\n".join([*others, text[:place]]), length, measure)
    answer = text[place : place + CONTINUED_CHARACTERS]
    return Exercise("continuation", context, (Question("", answer, (answer,), ()),), continued=True)


def _end(text: str, length: int, measure: Measure) -> str:
    """The end of a text, from a word on: about ``length`` units or, of a shorter one, all of it."""
    size = min(len(text), length)
    while size < len(text) and (found := measure(text[-size:])) < length:
        size = min(len(text), size * length // max(1, found) + 16)
    return text[max(0, text.rfind(" ", 0, len(text) - size + 1)) :].lstrip()


TASKS: dict[str, Callable[[random.Random, int, int, Measure], Exercise]] = {
    "needle": _needle,
    "multi_key": _multi_key,
    "multi_value": _multi_value,
    "lookup": _lookup,
    "variables": _variables,
    "functions": _functions,
    "prose": _prose,
    "persona": _persona,
    "counting": _counting,
    "multi_turn": _multi_turn,
    "repeat": _repeat,
    "strings": _strings,
    "continuation": _continuation,
}
"""Every task by name. ``repeat`` and ``strings`` ask for the whole context back, ``continuation`` for what follows it;
the others ask for facts in it."""

DEFAULT_TASKS = (
    "needle", "multi_key", "lookup", "variables", "functions", "prose", "persona", "multi_turn", "repeat",
)  # fmt: skip
"""What ``kvprofile evaluate`` asks unless told otherwise."""
