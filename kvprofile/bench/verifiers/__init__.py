"""Verifiers: each judges one output, (document, question, output) -> passed, score, warnings.

Judging happens after measuring and changes no measurement, so a record can be judged again by other verifiers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from kvprofile.bench.scenario import BASELINE, BenchPlan
from kvprofile.bench.verifiers.base import Case, Verifier
from kvprofile.bench.verifiers.expected import Expected, JsonSchema, Pattern
from kvprofile.bench.verifiers.own import COMMAND, Command, Function
from kvprofile.bench.verifiers.steadiness import Agreement, Length, Loops
from kvprofile.bench.verifiers.voice import Voice
from kvprofile.errors import InputError
from kvprofile.records.record import Leg, Request, Verdict

BUILT_IN: dict[str, Callable[[], Verifier]] = {
    "expected": Expected,
    "pattern": Pattern,
    "json-schema": JsonSchema,
    "agreement": Agreement,
    "length": Length,
    "loops": Loops,
    "voice": Voice,
}
"""Verifiers by name. Where a question asks for nothing of its kind, a verifier says nothing: all are the default."""


def choose(names: Sequence[str]) -> list[Verifier]:
    """Verifiers by name, ``package.module:function`` or ``exec:PROGRAM``. Raises InputError for unknown ones."""
    return [_choose(name) for name in names or tuple(BUILT_IN)]


def judge(plan: BenchPlan, legs: Sequence[Leg]) -> list[Leg]:
    """The legs with verdicts on every output."""
    verifiers = choose(plan.verifiers)
    documents = {document.name: document for document in plan.documents}
    questions = {(d.name, question.text): question for d in plan.documents for question in d.questions}
    references = _references(legs)

    def case(leg: Leg, request: Request) -> Case | None:
        place = (request.document or "", request.question or "")
        if request.error is not None or request.output is None or place not in questions:
            return None
        return Case(
            document=documents[place[0]],
            question=questions[place],
            output=request.output,
            leg=leg.name,
            repetition=leg.repetition,
            finish_reason=request.finish_reason,
            reference=_reference(references, leg, request),
            is_baseline=leg.name == BASELINE,
        )

    # [legs][requests], None where there is no output to judge
    cases = [[case(leg, request) for request in leg.requests] for leg in legs]
    # verifiers that compare learn first what the baseline's answers are like
    usual = [each for row in cases for each in row if each is not None and each.is_baseline]
    for verifier in verifiers:
        verifier.prepare(usual)
    # every verdict goes next to its request
    return [
        leg.model_copy(
            update={
                "requests": [
                    request if each is None else request.model_copy(update={"verdicts": _verdicts(verifiers, each)})
                    for request, each in zip(leg.requests, row, strict=True)
                ]
            }
        )
        for leg, row in zip(legs, cases, strict=True)
    ]


def _verdicts(verifiers: Sequence[Verifier], case: Case) -> list[Verdict]:
    return [verdict for verifier in verifiers if (verdict := verifier.judge(case)) is not None]


_Key = tuple[str | None, str | None, int]


def _references(legs: Sequence[Leg]) -> dict[_Key, str]:
    """The baseline's outputs by document, question and number among the requests of a leg."""
    found: dict[_Key, str] = {}
    for leg in legs:
        if leg.name == BASELINE and leg.status == "ok":
            for request in leg.requests:
                if request.output is not None:
                    found[request.document, request.question, leg.repetition] = request.output
    return found


def _reference(references: dict[_Key, str], leg: Leg, request: Request) -> str | None:
    """The same repetition's baseline; of a baseline, another repetition's."""
    repetitions = sorted({repetition for _, _, repetition in references})
    if leg.name == BASELINE:
        others = [repetition for repetition in repetitions if repetition != leg.repetition]
    else:
        others = [leg.repetition, *(repetition for repetition in repetitions if repetition != leg.repetition)]
    for repetition in others:
        found = references.get((request.document, request.question, repetition))
        if found is not None:
            return found
    return None


def _choose(name: str) -> Verifier:
    if name in BUILT_IN:
        return BUILT_IN[name]()
    if name.startswith(COMMAND):
        return Command(name)
    if ":" in name:
        return Function(name)
    raise InputError(f"no verifier {name!r}; give {', '.join(BUILT_IN)}, package.module:function or {COMMAND}PROGRAM")
