"""Outputs and schemas without end."""

from __future__ import annotations

import pytest

from kvprofile.bench.documents import BenchDocument, BenchQuestion
from kvprofile.bench.verifiers import BUILT_IN
from kvprofile.bench.verifiers.base import Case
from kvprofile.bench.verifiers.expected import JsonSchema
from kvprofile.errors import InputError


def case(question, output):
    return Case(BenchDocument(name="x", text="x", questions=(question,)), question, output, "baseline", 0)


@pytest.mark.parametrize(
    ("schema", "output", "passed"),
    [
        ({"type": "array"}, "[" * 10**5, False),
        ({"$ref": "#"}, "[[[[]]]]", False),
        ({"items": {"$ref": "#"}}, "[" * 900 + "]" * 900, False),
        ({"type": "number"}, "9" * 5000, False),
    ],
)
def test_endless_outputs_and_schemas_do_not_fit(schema, output, passed):
    question = BenchQuestion(text="?", json_schema=schema)
    verdict = JsonSchema().judge(case(question, output))
    assert verdict.passed is passed


@pytest.mark.parametrize("address", ["http://127.0.0.1:9/x.json", "https://example.org/x.json", "file:///etc/passwd"])
def test_a_schema_cannot_fetch_anything(address):
    question = BenchQuestion(text="?", json_schema={"$ref": address})
    with pytest.raises(InputError, match=r"^x: json_schema refers to .*, which is not in it$"):
        JsonSchema().judge(case(question, "{}"))


def test_outputs_of_a_million_characters_are_judged():
    """Compared whole, two of them take more memory than there is."""
    question = BenchQuestion(text="?", expected=("alpha",))
    document = BenchDocument(name="x", text="x", questions=(question,))
    text = "alpha beta gamma delta " * 2**16
    judged = Case(document, question, text, "0.5", 0, "stop", text[::-1])
    found = {name: make().judge(judged) for name, make in BUILT_IN.items()}
    assert found["expected"].passed
    assert found["agreement"].score is not None
    assert not found["loops"].passed
