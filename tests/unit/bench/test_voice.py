"""The voice verifier's two rates, on two kinds of outputs that differ with the seed.

Passages that people wrote, with words dropped and repeated; and what a language model over words, made from the
passages of one voice, writes when it is sampled. Large models scatter otherwise: docs/runbook-14b.md says how to look.
"""

from __future__ import annotations

import random
from collections import defaultdict

import pytest

from kvprofile.bench.documents import BenchDocument, BenchQuestion, load
from kvprofile.bench.verifiers.base import Case
from kvprofile.bench.verifiers.voice import Voice

WRITE = BenchQuestion(text="Write.", in_voice=True)
BASELINE = (0, 1)
"""Seeds, modulo five, that runs without budgets have."""


def noisy(text, seed):
    """Every twelfth word dropped, or another repeated in its place."""
    rng = random.Random(f"{seed}:{text}")
    words = text.split()
    for _ in range(max(1, len(words) // 12)):
        place = rng.randrange(len(words) - 1)
        if rng.random() < 0.5:
            del words[place]
        else:
            words.insert(place, words[rng.randrange(len(words))])
    return " ".join(words)


class Trigrams:
    """A word given the two before it, as often as in the passages; given one where two were seen to go on one way."""

    def __init__(self, passages):
        self.following = defaultdict(list)
        for passage in passages:
            words = ["", "", *passage.split()]
            for place in range(2, len(words)):
                self.following[words[place - 1],].append(words[place])
                self.following[words[place - 2], words[place - 1]].append(words[place])

    def write(self, rng, count):
        words = ["", ""]
        while len(words) < count + 2:
            found = self.following[words[-2], words[-1]]
            if len(set(found)) < 2 and rng.random() < 0.7:
                found = self.following[words[-1],]
            words += [rng.choice(found)] if found else ["", ""]
        return " ".join(filter(None, words))


def sampled(passages, seed):
    model = Trigrams(passages)
    return [model.write(random.Random(f"{seed}:{number}:{passages[0]}"), 90) for number in range(12)]


KINDS = {"noisy": lambda passages, seed: [noisy(text, seed) for text in passages], "sampled": sampled}


@pytest.fixture(scope="module", params=sorted(KINDS))
def written(request):
    """{(voice, seed): texts}."""
    write = KINDS[request.param]
    return {(d.name, seed): write(d.voice_samples, seed) for d in load(("bundled",)) for seed in range(50)}


def cases(written, voice, seed, about=None):
    """Outputs of a run in a voice, judged as answers about a document."""
    document = BenchDocument(name=about or voice, text="A guide.", questions=(WRITE,))
    baseline = seed % 5 in BASELINE
    return [Case(document, WRITE, text, "run", seed, is_baseline=baseline) for text in written[voice, seed]]


@pytest.fixture(scope="module")
def trials(written):
    """(verifier that knows two runs, names of voices, seeds of three other runs): ten times."""
    found = []
    for first in range(0, 50, 5):
        voice = Voice()
        names = sorted({name for name, _ in written})
        seeds = range(first, first + 5)
        known = [seed for seed in seeds if seed % 5 in BASELINE]
        voice.prepare([case for name in names for seed in known for case in cases(written, name, seed)])
        found.append((voice, names, [seed for seed in seeds if seed not in known]))
    return found


def flagged(judged):
    """(outputs called drift, outputs judged): some are too short to be judged."""
    verdicts = [voice.judge(case).passed for voice, case in judged]
    known = [passed for passed in verdicts if passed is not None]
    assert len(known) >= 0.9 * len(verdicts)
    return known.count(False), len(known)


def test_another_seed_is_not_called_drift(written, trials):
    """At most 5 % of what runs with other seeds say; these seeds did not make the limit."""
    drifted, judged = flagged(
        [
            (voice, case)
            for voice, names, seeds in trials
            for name in names
            for seed in seeds
            for case in cases(written, name, seed)
        ]
    )
    assert drifted <= 0.05 * judged


def test_a_swapped_persona_is(written, trials):
    """At least 95 % of what is said in any other voice."""
    drifted, judged = flagged(
        [
            (voice, case)
            for voice, names, seeds in trials
            for mine in names
            for other in names
            if other != mine
            for seed in seeds
            for case in cases(written, other, seed, about=mine)
        ]
    )
    assert drifted >= 0.95 * judged


def test_warnings_say_what_changed(written, trials):
    voice, _, (seed, *_) = trials[0]
    strangers = cases(written, "02-the-turnpike-house", seed, about="03-the-orchard-letter")
    warnings = " ".join(warning for case in strangers for warning in voice.judge(case).warnings)
    assert "drifted: " in warnings
