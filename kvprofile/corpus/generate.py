"""Seeded text generators: endless filler of six kinds.

The same kind and seed give the same text on every machine. Corpora that people wrote live in ``corpora/``; facts to ask
for, hidden in such filler, are made by ``kvprofile.questions.tasks``.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator

_CONSONANTS = "bcdfghjklmnprstvwz"
_VOWELS = "aeiou"


def invented_word(rng: random.Random, syllables: int | None = None) -> str:
    """A pronounceable word that no vocabulary holds, so that only the context can tell its facts."""
    count = syllables or rng.choice((2, 2, 3))
    return "".join(rng.choice(_CONSONANTS) + rng.choice(_VOWELS) for _ in range(count))


_SUBJECTS = (
    "The harbour master", "A junior clerk", "The night train", "Every gardener", "The old archive",
    "Our supervisor", "The repair crew", "A careful reader", "The weather office", "The second draft",
    "The committee", "My neighbour", "The river ferry", "The lighthouse", "A visiting pianist",
    "The youngest baker", "An honest auditor", "The glass factory", "Her grandmother", "The empty theatre",
)  # fmt: skip
_VERBS = (
    "checks", "describes", "moves", "forgets", "repeats", "carries", "measures", "sorts", "praises", "repairs",
    "follows", "delays", "copies", "records", "ignores", "borrows", "returns", "paints", "weighs", "hides",
)  # fmt: skip
_OBJECTS = (
    "the blue ledger", "a quiet street", "the morning schedule", "two empty crates", "the long report",
    "a broken lamp", "the new policy", "some dry paper", "the garden wall", "every second page",
    "the spare key", "a faded map", "the market square", "an early train", "the winter stock",
    "three brass bells", "the wrong address", "a heavy curtain", "the last invoice", "an old recipe",
)  # fmt: skip
_TAILS = (
    "before noon.", "after the rain.", "without a word.", "in the usual way.", "for the third time.",
    "when nobody is looking.", "because the office asked.", "at the end of the day.", "as the manual says.",
    "near the station.", "with some regret.", "although it is late.", "until the bell rings.", "on most Tuesdays.",
)  # fmt: skip


def _prose(rng: random.Random) -> str:
    return f"{rng.choice(_SUBJECTS)} {rng.choice(_VERBS)} {rng.choice(_OBJECTS)} {rng.choice(_TAILS)}"


def _code(rng: random.Random) -> str:
    name, first, second = (invented_word(rng) for _ in range(3))
    constant, operator = rng.randrange(2, 100), rng.choice("+-*%")
    body = rng.choice(
        (
            f"    return {first} {operator} {second}",
            f"    total = {first} {operator} {constant}\n    return total - {second}",
            f"    if {first} > {second}:\n        return {constant}\n    return {first} {operator} {second}",
            f"    for index in range({constant}):\n        {first} = {first} {operator} index\n    return {first}",
        )
    )
    return f"def {name}({first}, {second}):\n{body}\n"


_PEOPLE = ("Mara", "Otto", "Ines", "Theo", "Ruth", "Liam", "Nora", "Emil")
_MOODS = ("calmly", "with a laugh", "in a low voice", "without looking up", "too quickly", "after a pause")
_RULES = (
    "keeps sentences short", "never uses exclamation marks", "greets people by name", "prefers plain verbs",
    "avoids jargon", "asks one question at a time", "quotes the source", "closes with a next step",
)  # fmt: skip


def _voice(rng: random.Random) -> str:
    person, other = rng.sample(_PEOPLE, 2)
    if rng.random() < 0.4:
        return f"{person} {rng.choice(_RULES)} and {rng.choice(_RULES)}."
    line = f"{rng.choice(_SUBJECTS)} {rng.choice(_VERBS)} {rng.choice(_OBJECTS)}"
    return f'"{line}," {person} tells {other} {rng.choice(_MOODS)}.'


_PARTS = ("valve", "filter", "pump", "sensor", "belt", "hinge", "fuse", "gasket", "rotor", "bracket")
_ACTIONS = ("Remove", "Clean", "Inspect", "Tighten", "Replace", "Grease", "Align", "Label")


def _manual(rng: random.Random) -> str:
    part, other = rng.sample(_PARTS, 2)
    return rng.choice(
        (
            f"Step {rng.randrange(1, 30)}. {rng.choice(_ACTIONS)} the {part} before you open the {other}.",
            f"Warning: the {part} stays hot for {rng.randrange(2, 60)} minutes.",
            f"Torque of the {part}: {rng.randrange(5, 90)} Nm. Interval: {rng.randrange(1, 24)} months.",
            f"If the {part} leaks, {rng.choice(_ACTIONS).lower()} the {other} and test again.",
        )
    )


_LEVELS = ("DEBUG", "INFO", "WARN", "ERROR")


def _tables(rng: random.Random) -> str:
    form = rng.randrange(3)
    if form == 0:
        return ",".join((invented_word(rng), str(rng.randrange(1000)), rng.choice(_PARTS), f"{rng.random() * 100:.2f}"))
    if form == 1:
        row = {"id": rng.randrange(10_000), "name": invented_word(rng), "ok": rng.random() < 0.5}
        return json.dumps(row)
    clock = f"{rng.randrange(24):02}:{rng.randrange(60):02}:{rng.randrange(60):02}"
    return f"{clock} {rng.choice(_LEVELS)} {rng.choice(_PARTS)}: {rng.choice(_ACTIONS).lower()} {rng.randrange(100)} ms"


_LANGUAGES: tuple[tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]], ...] = (
    (("Der Bäcker", "Die Lehrerin", "Mein Bruder"), ("sucht", "öffnet", "vergisst"),
     ("den alten Schlüssel.", "die grüne Tür.", "das kurze Lied.")),
    (("Le facteur", "La voisine", "Mon oncle"), ("cherche", "répare", "oublie"),
     ("la vieille horloge.", "le grand sac.", "une lettre fermée.")),
    (("El pescador", "La abuela", "Mi primo"), ("busca", "pinta", "guarda"),
     ("la mesa pequeña.", "un barco azul.", "el último pan.")),
    (("Il fornaio", "La pittrice", "Mio nonno"), ("cerca", "chiude", "conta"),
     ("la finestra alta.", "un libro giallo.", "le nove chiavi.")),
    (("Rybak", "Nauczycielka", "Mój sąsiad"), ("szuka", "maluje", "liczy"),
     ("starego klucza.", "zielone drzwi.", "dziewięć jabłek.")),
)  # fmt: skip


def _languages(rng: random.Random) -> str:
    return " ".join(rng.choice(part) for part in rng.choice(_LANGUAGES))


_BLOCKS: dict[str, tuple[Callable[[random.Random], str], str]] = {
    "prose": (_prose, " "),
    "code": (_code, "\n"),
    "voice": (_voice, " "),
    "manual": (_manual, "\n"),
    "tables": (_tables, "\n"),
    "languages": (_languages, " "),
}

KINDS: tuple[str, ...] = tuple(_BLOCKS)
"""Names of the kinds of filler, in the order of the corpora they resemble."""


def blocks(kind: str, rng: random.Random) -> Iterator[str]:
    """Endless sentences, functions or rows of one kind. Raises KeyError for an unknown kind."""
    make, _ = _BLOCKS[kind]
    while True:
        yield make(rng)


def separator(kind: str) -> str:
    """What stands between two blocks of a kind: a space in running text, a newline elsewhere."""
    return _BLOCKS[kind][1]


def generate_text(kind: str, seed: int, length: int, measure: Callable[[str], int] = len) -> str:
    """Filler of one kind, the shortest whole number of blocks whose ``measure`` reaches ``length``.

    ``measure`` maps text to its length in the caller's unit, characters by default; a token counter makes
    ``length`` a number of tokens. Raises ValueError for a length below 1, KeyError for an unknown kind.
    """
    if length < 1:
        raise ValueError(f"length must be at least 1, not {length}")
    source, joint = blocks(kind, random.Random(f"{kind}:{seed}")), separator(kind)
    text = ""
    missing = length
    while missing > 0:
        text = joint.join([text, *_take(source, max(1, missing // 64))]).removeprefix(joint)
        missing = length - measure(text)
    return text


def _take(source: Iterator[str], count: int) -> list[str]:
    return [next(source) for _ in range(count)]
