"""The voice verifier on passages that people wrote, with words dropped and repeated at random for the noise of a run.

What models write scatters more: calibration on a model that can write in a voice is still to be done.
"""

from __future__ import annotations

import random

import pytest

from kvprofile.bench.documents import Document, Question, load
from kvprofile.bench.verifiers.base import Case
from kvprofile.bench.verifiers.voice import Voice

WRITE = Question(text="Write.", in_voice=True)
BASELINE = (0, 1)


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


@pytest.fixture(scope="module")
def written():
    """{(voice, seed): texts}."""
    return {(d.name, seed): [noisy(t, seed) for t in d.voice_samples] for d in load(("bundled",)) for seed in range(5)}


def cases(written, voice, seed, about=None):
    """Outputs of a run in a voice, judged as answers about a document."""
    document = Document(name=about or voice, text="A guide.", questions=(WRITE,))
    return [Case(document, WRITE, text, "run", seed, is_baseline=seed in BASELINE) for text in written[voice, seed]]


@pytest.fixture(scope="module")
def voice(written):
    found = Voice()
    found.prepare([case for name, seed in written if seed in BASELINE for case in cases(written, name, seed)])
    return found


def flagged(voice, found):
    """(outputs called drift, outputs judged): some are too short to be judged."""
    verdicts = [voice.judge(case).passed for case in found]
    judged = [passed for passed in verdicts if passed is not None]
    assert len(judged) >= 0.9 * len(found)
    return judged.count(False), len(judged)


def test_another_seed_is_not_called_drift(written, voice):
    """At most 5 % of what runs with other seeds say; these seeds did not make the limit."""
    drifted, judged = flagged(
        voice, [case for name, seed in written if seed not in BASELINE for case in cases(written, name, seed)]
    )
    assert drifted <= 0.05 * judged


def test_a_swapped_persona_is(written, voice):
    """At least 95 % of what is said in any other voice."""
    names = sorted({name for name, _ in written})
    drifted, judged = flagged(
        voice,
        [
            case
            for mine in names
            for other in names
            if other != mine
            for seed in range(5)
            if seed not in BASELINE
            for case in cases(written, other, seed, about=mine)
        ],
    )
    assert drifted >= 0.95 * judged


def test_warnings_say_what_changed(written, voice):
    strangers = cases(written, "02-the-turnpike-house", 3, about="03-the-orchard-letter")
    warnings = " ".join(warning for case in strangers for warning in voice.judge(case).warnings)
    assert "drifted: " in warnings
