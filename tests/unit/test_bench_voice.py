"""Calibration of the voice verifier on what a model really wrote: noise between runs passes, another persona does not.

The outputs are those of ``scripts/write_voice_outputs.py``: three voices, eight answers a run, five runs with seeds of
their own. Two runs are the baseline that the verifier learns from; the others are compared with it.
"""

from __future__ import annotations

import json

import pytest

from kvprofile.bench.documents import Document, Question, load
from kvprofile.bench.verifiers.base import Case
from kvprofile.bench.verifiers.voice import Voice
from tests.models import ROOT

WRITE = Question(text="Write.", in_voice=True)
BASELINE = (0, 1)


@pytest.fixture(scope="module")
def written():
    """{(voice, seed): outputs}."""
    found = json.loads((ROOT / "tests" / "data" / "voice_outputs.json").read_text(encoding="utf-8"))["outputs"]
    return {(name, seed): texts for name, runs in found.items() for seed, texts in enumerate(runs)}


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


def test_runs_are_unlike_each_other_and_their_model(written):
    samples = " ".join(text for document in load(("bundled",)) for text in document.voice_samples)
    texts = [text for outputs in written.values() for text in outputs]
    assert len(texts) == 120
    assert len(set(texts)) > 60
    assert sum(text not in samples for text in texts) > 60  # sampling slips, so these are the model's own words


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
    assert "less 'contractions'" in warnings or "less contractions" in warnings
