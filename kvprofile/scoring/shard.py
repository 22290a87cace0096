"""Which documents of a run one of several processes scores, and the file that it leaves."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from kvprofile.errors import InputError

MOST_SHARDS = 100_000
_NAME = re.compile(r"\.shard-(\d+)-of-(\d+)\.safetensors$")


@dataclass(frozen=True, order=True)
class Shard:
    """Part ``number``, counted from 1, ``of`` so many: every so-manieth document of all corpora, in their order."""

    number: int
    of: int

    @classmethod
    def parse(cls, text: str) -> Shard:
        """From I/N. Raises InputError for anything else."""
        found = re.fullmatch(r"(\d{1,6})/(\d{1,6})", text.strip())
        if not found or not 1 <= int(found[1]) <= int(found[2]) <= MOST_SHARDS:
            raise InputError(f"--shard {text}: give I/N with I from 1 to N, like 3/16")
        return cls(int(found[1]), int(found[2]))

    def __str__(self) -> str:
        return f"{self.number}/{self.of}"

    def documents(self, count: int) -> range:
        """Numbers, from 0, of its documents of so many."""
        return range(self.number - 1, count, self.of)

    def path(self, output: Path) -> Path:
        """Its file, next to the budget file that will come of all."""
        return output.with_name(f"{output.name}.shard-{self.number}-of-{self.of}.safetensors")

    def beside(self, other: Path) -> Path | None:
        """Its file next to that of another shard; None where that has a name of someone else's choice."""
        named = _NAME.sub("", other.name)
        return None if named == other.name else self.path(other.with_name(named))
