"""Verifiers on outputs whose verdict is known, and those that people bring."""

from __future__ import annotations

import sys

import pytest

from kvprofile.bench import verifiers
from kvprofile.bench.documents import BenchDocument, BenchQuestion
from kvprofile.bench.verifiers.base import Case
from kvprofile.bench.verifiers.steadiness import longest_loop
from kvprofile.bench.verifiers.voice import LEAST_OUTPUTS, NAMES, Voice, features
from kvprofile.errors import InputError


def case(output, reference=None, text="A document.", **question):
    asked = BenchQuestion(text="?", **question)
    return Case(BenchDocument(name="d", text=text, questions=(asked,)), asked, output, "0.5", 0, reference=reference)


def judge(name, *args, **kwargs):
    return verifiers.BUILT_IN[name]().judge(case(*args, **kwargs))


def test_expected_strings_are_whole_words():
    assert judge("expected", "It is 2415.", expected=("2415",)).passed
    missed = judge("expected", "It is 24157.", expected=("2415", "It"))
    assert (missed.passed, missed.score, missed.warnings) == (False, 0.5, ["missing: 2415"])
    assert judge("expected", "blue", expected=("red", "blue"), any_of=True).passed
    assert judge("expected", "anything") is None


def test_patterns():
    assert judge("pattern", "a\nRef: AB-12\nb", pattern=r"^Ref: [A-Z]{2}-\d+$").passed
    assert not judge("pattern", "Ref: ab-12", pattern=r"^Ref: [A-Z]{2}-\d+$").passed
    with pytest.raises(InputError, match="is not a pattern"):
        judge("pattern", "x", pattern="(")


SCHEMA = {
    "type": "object",
    "required": ["time"],
    "properties": {"time": {"type": "string", "pattern": "^\\d\\d:\\d\\d$"}},
}


@pytest.mark.parametrize(
    ("output", "passed", "said"),
    [
        ('{"time": "08:42"}', True, ""),
        ('Here:\n```json\n{"time": "08:42"}\n```', True, ""),
        ('{"time": "8:42"}', False, "$.time"),
        ("{}", False, "'time' is a required property"),
        ("The time is 08:42", False, "no JSON"),
    ],
)
def test_json_schemas(output, passed, said):
    found = judge("json-schema", output, json_schema=SCHEMA)
    assert found.passed is passed
    assert said in " ".join(found.warnings)


def test_broken_schemas_are_refused():
    with pytest.raises(InputError, match="json_schema is not a schema"):
        judge("json-schema", "{}", json_schema={"type": "thing"})


def test_agreement_with_the_baseline():
    told = "The ferry leaves at 8:42 from platform two."
    assert judge("agreement", told, told).score == 1.0
    near = judge("agreement", "The ferry leaves at 8:42, from platform two", told)
    assert near.passed
    assert 0.8 < near.score < 1
    far = judge("agreement", "I do not know what you mean by that, sorry.", told)
    assert not far.passed
    assert "chrF" in far.warnings[0]
    assert "ROUGE-L" in far.warnings[0]
    assert judge("agreement", "x", None) is None


def test_length_inflation():
    told = "One two three four five six seven eight nine ten."
    assert judge("length", f"{told} And five words more here", told).passed
    long = judge("length", f"{told} {told}", told)
    assert (long.passed, long.score) == (False, 2.0)
    assert long.warnings == ["20 words, the baseline's answer has 10"]


def test_loops_but_not_those_of_the_document():
    loop = "I see the sea again. " * 6
    found = judge("loops", f"It begins. {loop}")
    assert not found.passed
    assert "6 times" in found.warnings[0]
    assert judge("loops", loop, text=f"A song: {loop}").passed
    assert judge("loops", "no no no, said the man, and went home to his cat").passed
    assert judge("loops", "").passed


@pytest.mark.parametrize(
    ("words", "expected"),
    [("a b a b a b", (0, 2, 3)), ("x a a a a", (1, 1, 4)), ("a b c", (0, 0, 0)), ("q a b c a b c z", (1, 3, 2))],
)
def test_longest_loops(words, expected):
    assert longest_loop(words.split(), 10) == expected


OWN = """
def polite(document, question, output):
    return "please" in output, 0.5, ["mind your manners"] * ("please" not in output)
def broken(document, question, output):
    raise KeyError("whatever")
def plain(document, question, output):
    return len(output) > len(document)
def named(document, question, output):
    return {"passed": None, "warnings": [question]}
"""


def test_own_functions(tmp_path, monkeypatch):
    (tmp_path / "my_verifiers.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    polite, broken, plain, named = verifiers.choose(
        [f"my_verifiers:{n}" for n in ("polite", "broken", "plain", "named")]
    )
    found = polite.judge(case("give me"))
    assert (found.name, found.passed, found.score, found.warnings) == (
        "my_verifiers:polite", False, 0.5, ["mind your manners"],
    )  # fmt: skip
    assert polite.judge(case("give me, please")).passed
    assert broken.judge(case("x")).passed is None
    assert "KeyError" in broken.judge(case("x")).warnings[0]
    assert not plain.judge(case("short")).passed
    assert named.judge(case("x")).warnings == ["?"]
    for name in ("my_verifiers:nothing", "no_such_module:f", "my_verifiers:__doc__"):
        with pytest.raises(InputError, match="verifier"):
            verifiers.choose([name])
    with pytest.raises(InputError, match="no verifier 'nonsense'; give expected, pattern"):
        verifiers.choose(["nonsense"])


def test_own_programs():
    code = (
        "import json, sys; case = json.loads(sys.stdin.readline());"
        "print(json.dumps({'passed': 'ok' in case['output'], 'score': len(case['question'])}))"
    )
    (own,) = verifiers.choose([f'exec:{sys.executable} -c "{code}"'])
    assert own.judge(case("all ok")).passed
    assert own.judge(case("no")).score == 1
    (broken,) = verifiers.choose([f"exec:{sys.executable} -c 'raise SystemExit(3)'"])
    assert "exit code 3" in broken.judge(case("x")).warnings[0]
    (silent,) = verifiers.choose([f"exec:{sys.executable} -c pass"])
    assert silent.judge(case("x")).passed is None
    (absent,) = verifiers.choose(["exec:no-such-program-here"])
    with pytest.raises(InputError, match="no program no-such-program-here"):
        absent.judge(case("x"))


def test_voice_says_nothing_without_enough_of_the_baseline():
    question = BenchQuestion(text="?", in_voice=True)
    document = BenchDocument(name="d", text="x", questions=(question,))
    text = "We go down to the shore, and then we look at the boats. " * 4
    few = [Case(document, question, text, "baseline", 0, is_baseline=True)] * (LEAST_OUTPUTS - 1)
    voice = Voice()
    voice.prepare(few)
    found = voice.judge(few[0])
    assert found.passed is None
    assert f"from {LEAST_OUTPUTS} on" in found.warnings[0]
    assert voice.judge(case("Far too short", in_voice=True)).passed is None
    assert voice.judge(case(text)) is None


def test_style_features_are_named_and_finite():
    vector = features("Well! I'd go, \u201cnow\u201d; wouldn't you? It is 7:42\u2026")
    assert vector.shape == (len(NAMES),)
    assert (vector >= 0).all()
    assert (features("") == features("")).all()
