"""Verifiers that people bring: a function in Python, or a program that reads and writes JSON lines."""

from __future__ import annotations

import importlib
import json
import shlex
import subprocess
from collections.abc import Mapping
from typing import Any

from kvprofile.bench.verifiers.base import Case, Verifier
from kvprofile.errors import InputError, plain
from kvprofile.records.record import Verdict

COMMAND = "exec:"
ANSWER_TIMEOUT_S = 60.0


class Function(Verifier):
    """``package.module:function``, called with (document, question, output), three texts.

    It gives a bool, a (passed, score) or (passed, score, warnings), or a mapping of these names; None for no verdict.
    """

    def __init__(self, reference: str) -> None:
        module, _, name = reference.partition(":")
        try:
            found = getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError, ValueError) as error:
            raise InputError(f"no verifier {reference}: {error}; give package.module:function") from error
        if not callable(found):
            raise InputError(f"verifier {reference} is not a function")
        self.name, self._call = reference, found

    def judge(self, case: Case) -> Verdict | None:
        """What the function says; where it raises, no verdict and the reason as a warning."""
        try:
            found = self._call(case.document.text, case.question.text, case.output)
            return _verdict(self.name, found)
        except Exception as error:  # it is somebody's own, and one output less must not end a benchmark
            return self.verdict(None, None, [plain(f"{type(error).__name__}: {error}")[:300]])


class Command(Verifier):
    """``exec:PROGRAM ARGUMENTS``: each case as a JSON line on its stdin, a JSON line back.

    In: {"document", "question", "output"}. Out: true, false, null or {"passed", "score", "warnings"}. It is run
    for each case, without a shell.
    """

    def __init__(self, reference: str) -> None:
        self.name = reference
        self._arguments = shlex.split(reference.removeprefix(COMMAND))
        if not self._arguments:
            raise InputError("exec: names no program")

    def judge(self, case: Case) -> Verdict | None:
        """Ask the program about one case; where it fails, no verdict. Raises InputError where there is no program."""
        line = json.dumps({"document": case.document.text, "question": case.question.text, "output": case.output})
        try:
            run = subprocess.run(  # noqa: S603 - the user's own program, no shell
                self._arguments,
                input=line + "\n",
                capture_output=True,
                text=True,
                timeout=ANSWER_TIMEOUT_S,
                check=False,
            )
        except FileNotFoundError as error:
            raise InputError(f"verifier {self.name}: no program {self._arguments[0]}") from error
        except (OSError, subprocess.TimeoutExpired) as error:
            return self.verdict(None, None, [plain(error)[:300]])
        if run.returncode != 0:
            return self.verdict(None, None, [plain(f"exit code {run.returncode}: {run.stderr.strip()[-300:]}")])
        try:
            return _verdict(self.name, json.loads(run.stdout.splitlines()[0]))
        except (ValueError, IndexError, TypeError) as error:
            return self.verdict(None, None, [f"no verdict in its output: {plain(error)}"])


def _verdict(name: str, found: Any) -> Verdict | None:
    if found is None:
        return None
    if isinstance(found, Mapping):
        unknown = set(found) - {"passed", "score", "warnings"}
        if unknown:
            raise TypeError(f"unknown {min(map(str, unknown))!r} in a verdict")
        return Verdict(
            name=name, passed=found.get("passed"), score=found.get("score"), warnings=list(found.get("warnings", ()))
        )
    if isinstance(found, bool):
        return Verdict(name=name, passed=found)
    passed, score, *rest = found
    return Verdict(name=name, passed=passed, score=score, warnings=list(rest[0]) if rest else [])
