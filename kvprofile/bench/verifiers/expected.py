"""Whether an output is what its question expects: the references, a regular expression, a JSON schema."""

from __future__ import annotations

import json
import re
from typing import Any

from kvprofile.bench.verifiers.base import Case, Verifier
from kvprofile.errors import InputError
from kvprofile.questions.judge import is_right, scores
from kvprofile.records.record import Verdict


class Expected(Verifier):
    """The output agrees with the question's ``expected`` strings as ``evaluate`` judges: the same measures, any or all.

    The score is the best agreement with ``any_of``, else the mean.
    """

    name = "expected"

    def judge(self, case: Case) -> Verdict | None:
        """Pass where ``is_right``."""
        wanted = case.question.expected
        if not wanted:
            return None
        found = scores(case.question, case.output)
        passed = is_right(case.question, case.output)
        missing = [text for text, score in zip(wanted, found, strict=True) if score < 1]
        warnings = [] if passed else [f"missing: {', '.join(missing)}"]
        return self.verdict(passed, max(found) if case.question.any_of else sum(found) / len(found), warnings)


class Pattern(Verifier):
    """The question's ``pattern`` is found somewhere (Python's ``re``; ^ and $ are borders of lines)."""

    name = "pattern"

    def judge(self, case: Case) -> Verdict | None:
        """Pass where it is found. Raises InputError for a pattern that does not compile."""
        if case.question.pattern is None:
            return None
        try:
            found = re.search(case.question.pattern, case.output, re.MULTILINE) is not None
        except re.error as error:
            raise InputError(f"{case.document.name}: {case.question.pattern!r} is not a pattern: {error}") from error
        return self.verdict(found, float(found))


class JsonSchema(Verifier):
    """The output is JSON, in a code fence or bare, and fits the question's ``json_schema``."""

    name = "json-schema"

    def judge(self, case: Case) -> Verdict | None:
        """Pass where it fits; warnings name the first problems. Raises InputError for a schema that is not valid."""
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
            raise InputError(f"{case.document.name}: json_schema is not a schema: {error.message}") from error
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
