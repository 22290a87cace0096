"""What verifiers have in common: the case they judge, and their verdict."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

from kvprofile.bench.documents import BenchDocument, BenchQuestion
from kvprofile.records.record import Verdict


@dataclass(frozen=True)
class Case:
    """One output and what it is about. ``reference`` is the baseline's output to the same question, if there is one.

    Of a baseline's output the reference is that of another repetition: what differs there is noise.
    """

    document: BenchDocument
    question: BenchQuestion
    output: str
    leg: str
    repetition: int
    finish_reason: str | None = None
    reference: str | None = None
    is_baseline: bool = False


class Verifier(ABC):
    """Judges outputs one by one. ``prepare`` sees the baseline's outputs first."""

    name: str

    def prepare(self, baseline: Sequence[Case]) -> None:
        """Learn what is usual. Nothing, unless a verifier compares with it."""
        del baseline

    @abstractmethod
    def judge(self, case: Case) -> Verdict | None:
        """The verdict; None where this verifier has nothing to say about such a case."""

    def verdict(self, passed: bool | None, score: float | None = None, warnings: Sequence[str] = ()) -> Verdict:
        """A verdict under this verifier's name."""
        return Verdict(name=self.name, passed=passed, score=score, warnings=list(warnings))
