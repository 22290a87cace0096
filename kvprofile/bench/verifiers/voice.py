"""Whether an output still sounds like the voice its document asks for.

Style is a vector of rates that hardly depend on what is said: lengths of sentences and words, punctuation, function
words. The voice's centre is the mean over its samples and the baseline's own outputs; each rate is scaled by how much
baseline outputs scatter. The limit is conformal (Vovk et al. 2005): the distance that at most 4 % of baseline outputs
exceed, each measured by a centre and a scatter made without it. So noise between runs is not called drift; and
with too few baseline outputs to know that, nothing is called drift at all.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kvprofile.bench.verifiers.base import Case, Verifier
from kvprofile.records.record import Verdict

FALSE_ALARMS = 0.04
"""Aimed at; a run has few answers, and a twentieth must not be passed."""

LEAST_WORDS = 25
"""Fewer words say too little about style."""

MOST_SCATTER = 3.0
"""No rate counts for more: an answer that derails has rates far from everything."""

LEAST_OUTPUTS = math.ceil(1 / FALSE_ALARMS) - 1
"""With fewer baseline outputs no limit keeps false alarms that rare."""

_FUNCTION_WORDS = (
    "a", "an", "the", "this", "that", "these", "those", "i", "you", "he", "she", "it", "we", "they", "me", "him", "her",
    "us", "them", "my", "your", "his", "its", "our", "their", "mine", "yours", "and", "or", "but", "so", "if",
    "because", "as", "than", "then", "when", "while", "where", "who", "which", "what", "how", "not", "no", "never",
    "only", "just", "very", "too", "also", "of", "to", "in", "on", "at", "by", "for", "with", "from", "about", "into",
    "over", "after", "before", "under", "up", "down", "out", "off", "again", "is", "are", "was", "were", "be", "been",
    "am", "do", "does", "did", "have", "has", "had", "can", "could", "will", "would", "shall", "should", "may", "might",
    "must", "there", "here", "all", "some", "any", "each", "every", "one", "two", "more", "most", "much", "many",
    "other", "well", "yes", "oh",
)  # fmt: skip
_MARKS = ",;:.!?-\u2014\u2013\u2026()\"'\u201c\u201d\u2018\u2019*/"

Vector = npt.NDArray[np.float64]


class Voice(Verifier):
    """Distance of an output's style from its voice, over the limit: 1 is the limit. For questions ``in_voice``."""

    name = "voice"

    def __init__(self) -> None:
        self._voices: dict[str, _Centre] = {}
        self._scatter = _Scatter(np.zeros(len(NAMES)), 0)
        self._limit: float | None = None

    def prepare(self, baseline: Sequence[Case]) -> None:
        """Learn each document's voice, how much the baseline scatters around it, and where drift begins."""
        outputs: dict[str, list[Vector]] = {}
        samples: dict[str, list[Vector]] = {}
        for case in baseline:
            if _applies(case):
                outputs.setdefault(case.document.name, []).append(features(case.output))
                samples[case.document.name] = [features(text) for text in _long(case.document.voice_samples)]
        self._voices = {name: _Centre.of(samples[name], found) for name, found in outputs.items()}
        apart = [vector - self._voices[name].without(vector) for name, found in outputs.items() for vector in found]
        self._scatter = _Scatter(np.square(apart).sum(axis=0), len(apart))
        if len(apart) < LEAST_OUTPUTS:
            return
        distances = sorted(_distance(each, self._scatter.without(each)) for each in apart)
        rank = math.ceil((1 - FALSE_ALARMS) * (len(distances) + 1))
        self._limit = distances[min(rank, len(distances)) - 1]

    def judge(self, case: Case) -> Verdict | None:
        """Pass within the limit. No verdict on short outputs or without enough of the baseline's."""
        if not case.question.in_voice:
            return None
        if not _applies(case):
            return self.verdict(None, None, [f"fewer than {LEAST_WORDS} words say too little about style"])
        centre = self._voices.get(case.document.name)
        if self._limit is None or centre is None:
            known = f"{self._scatter.count} baseline answers in a voice"
            return self.verdict(None, None, [f"{known}; from {LEAST_OUTPUTS} on drift can be told"])
        vector = features(case.output)
        if case.is_baseline:
            apart = vector - centre.without(vector)
            scale = self._scatter.without(apart)
        else:
            apart, scale = vector - centre.mean, self._scatter.scale
        score = _distance(apart, scale) / self._limit
        warnings = [] if score <= 1 else [f"drifted: {', '.join(_furthest(apart, scale))}"]
        return self.verdict(score <= 1, score, warnings)


def _distance(apart: Vector, scale: Vector) -> float:
    """Mean over all rates, each in its own scatter: many small differences are a voice, a large one an accident."""
    return float(np.abs(_clipped(apart, scale)).mean())


def _clipped(apart: Vector, scale: Vector) -> Vector:
    return np.clip(apart / scale, -MOST_SCATTER, MOST_SCATTER)


def _furthest(apart: Vector, scale: Vector) -> list[str]:
    scaled = _clipped(apart, scale)
    order = np.argsort(-np.abs(scaled))[:3]
    return [f"{'more' if scaled[place] > 0 else 'less'} {NAMES[place]}" for place in order]


@dataclass(frozen=True)
class _Scatter:
    """How far baseline outputs are from their voices: ``squares`` of each rate, summed over ``count`` outputs."""

    squares: Vector
    count: int

    @property
    def scale(self) -> Vector:
        """Root mean square of each rate, and a little more."""
        return np.asarray(np.sqrt(self.squares / max(1, self.count)) + _floor())

    def without(self, apart: Vector) -> Vector:
        """The scale as it would be without one of its outputs."""
        return _Scatter(np.maximum(self.squares - apart**2, 0), self.count - 1).scale


@dataclass(frozen=True)
class _Centre:
    """The mean of a voice's samples and of ``count`` vectors in all."""

    mean: Vector
    count: int

    @classmethod
    def of(cls, samples: Sequence[Vector], outputs: Sequence[Vector]) -> _Centre:
        return cls(np.mean([*samples, *outputs], axis=0), len(samples) + len(outputs))

    def without(self, vector: Vector) -> Vector:
        """The mean as it would be without one of its vectors."""
        if self.count < 2:
            return self.mean
        return np.asarray((self.mean * self.count - vector) / (self.count - 1))


NAMES = (
    "words in a sentence", "variation of sentences", "letters in a word", "different words", "capitals", "digits",
    "contractions", "questions", *(f"'{mark}'" for mark in _MARKS), *(f"'{word}'" for word in _FUNCTION_WORDS),
)  # fmt: skip
"""What the entries of a style vector are."""


def features(text: str) -> Vector:
    """Style of a text, [len(NAMES)]: square roots of rates, which scatter alike whether they are small or large."""
    words = re.findall(r"[^\W\d_]+(?:['\u2019][^\W\d_]+)?", text)
    lower = [word.lower().replace("\u2019", "'") for word in words]
    count = max(1, len(words))
    sentences = [
        len(part.split()) for part in re.split(r"[.!?\u2026]+[\s\"'\u201d\u2019)]*", text) if part.strip()
    ] or [0]
    counted = Counter(lower)
    marks = Counter(text)
    rates = [
        np.mean(sentences) / 30,
        np.std(sentences) / 30,
        np.mean([len(word) for word in words] or [0]) / 10,
        len(set(lower[:60])) / max(1, len(lower[:60])),
        sum(word[:1].isupper() for word in words) / count,
        sum(character.isdigit() for character in text) / max(1, len(text)),
        sum("'" in word for word in lower) / count,
        text.count("?") / len(sentences),
        *(marks[mark] / count for mark in _MARKS),
        *(counted[word] / count for word in _FUNCTION_WORDS),
    ]
    return np.sqrt(np.asarray(rates, dtype=np.float64))


def _floor() -> float:
    """The least scatter counted: what one occurrence in 500 words makes, so that a rare mark alone is no drift."""
    return math.sqrt(1 / 500)


def _applies(case: Case) -> bool:
    return case.question.in_voice and len(case.output.split()) >= LEAST_WORDS


def _long(samples: Sequence[str]) -> list[str]:
    return [text for text in samples if len(text.split()) >= LEAST_WORDS]
