"""Whether an output holds what its question expects: strings as whole words, a regular expression, a JSON schema."""

from __future__ import annotations

import json
import re
from typing import Any

from kvprofile.bench.verifiers.base import Case, Verifier
from kvprofile.errors import InputError
from kvprofile.questions.judge import holds
from kvprofile.records.record import Verdict


class Expected(Verifier):
    """The question's ``expected`` strings occur as whole words; the score is the share that does."""

    name = "expected"

    def judge(self, case: Case) -> Verdict | None:
        """Pass where all (or with any_of one) are there."""
        wanted = case.question.expected
        if not wanted:
            return None
        found = [holds(case.output, text) for text in wanted]
        passed = any(found) if case.question.any_of else all(found)
        missing = [text for text, there in zip(wanted, found, strict=True) if not there]
        warnings = [] if passed else [f"missing: {', '.join(missing)}"]
        return self.verdict(passed, float(passed) if case.question.any_of else sum(found) / len(found), warnings)


class Pattern(Verifier):
    """The question's ``pattern`` is found somewhere (Python's ``re``; ^ and $ are borders of lines)."""

    name = "pattern"

    def judge(self, case: Case) -> Verdict | None:
        """Pass where it is found. Raises InputError where the pattern is none."""
        if case.question.pattern is None:
            return None
        try:
            found = re.search(case.question.pattern, case.output, re.MULTILINE) is not None
        except re.error as error:
            raise InputError(f"{case.document.name}: {case.question.pattern!r} is no pattern: {error}") from error
        return self.verdict(found, float(found))


class JsonSchema(Verifier):
    """The output is JSON, in a code fence or bare, and fits the question's ``json_schema``."""

    name = "json-schema"

    def judge(self, case: Case) -> Verdict | None:
        """Pass where it fits; warnings name the first problems. Raises InputError where the schema is none."""
        if case.question.json_schema is None:
            return None
        import jsonschema
        from referencing import Registry
        from referencing.exceptions import Unresolvable

        schema = case.question.json_schema
        try:
            kind = jsonschema.validators.validator_for(schema)
            kind.check_schema(schema)
        except jsonschema.SchemaError as error:
            raise InputError(f"{case.document.name}: json_schema is none: {error.message}") from error
        checker = kind(schema, registry=Registry())  # else jsonschema fetches a $ref from wherever it points
        try:
            value = _json_in(case.output)
            problems = [f"{error.json_path}: {error.message}"[:200] for error in checker.iter_errors(value)]
        except Unresolvable as error:
            raise InputError(f"{case.document.name}: json_schema refers to {error.ref}, which is not in it") from error
        except (ValueError, RecursionError):
            return self.verdict(False, 0.0, ["no JSON"])
        return self.verdict(not problems, float(not problems), problems[:3])


def _json_in(text: str) -> Any:
    """The JSON that a text is, or that its one code fence holds. Raises ValueError."""
    fenced = re.findall(r"```(?:json)?\s*\n(.*?)```", text, re.DOTALL)
    return json.loads(fenced[0] if len(fenced) == 1 else text)
