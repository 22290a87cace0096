"""The budget file and the probe, from documents that are scored: by one process, or by several that shared them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from kvprofile import __version__
from kvprofile.budget import store
from kvprofile.budget.allocate import preset_budgets
from kvprofile.budget.probe import FEATURES, FLOOR, Probe, digest, is_probe
from kvprofile.budget.probe import path_of as probe_path
from kvprofile.budget.profile import (
    GRADED_VERSION,
    WHOLE_VERSION,
    ModelIdentity,
    ProbeRecord,
    Profile,
    Runtime,
    Scoring,
)
from kvprofile.files import write_atomically
from kvprofile.scoring.aggregate import DocumentScores, merge_documents
from kvprofile.scoring.methods import METHODS
from kvprofile.scoring.probe_fit import ProbeFit
from kvprofile.scoring.shares import graded_budgets


@dataclass(frozen=True)
class Facts:
    """What a budget file says of its run besides the results."""

    model: ModelIdentity
    scoring: Scoring
    runtime: Runtime


@dataclass(frozen=True)
class Result:
    """A profile, and the bytes of its probe's file, where it has one."""

    profile: Profile
    probe: bytes | None

    def write(self, output: Path) -> None:
        """Write the budget file to ``output`` and the probe next to it."""
        if self.probe is not None:
            write_atomically(probe_path(output), self.probe)
        store.save(self.profile, output)
        if self.probe is None and is_probe(probe_path(output)):  # of the file that was there before
            probe_path(output).unlink()

    def written(self, output: Path) -> str:
        """What to tell about it: 'a.json and a.probe.safetensors'."""
        return f"{output}" if self.probe is None else f"{output} and {probe_path(output).name}"


def assemble(facts: Facts, documents: Sequence[DocumentScores], fit: ProbeFit) -> Result:
    """The profile of documents in their order, and the probe of the sums over all of them.

    No probe, and whole budgets, where no document has tokens between sinks and window.
    """
    geometry, scoring = facts.model.geometry, facts.scoring
    scores = merge_documents(documents, geometry)
    record, content = _probe(facts, fit) if fit.tokens else (None, None)
    if record is None:
        budgets = preset_budgets(scores, scoring.statistic)
    else:
        budgets = graded_budgets([one.shares for one in documents if one.shares is not None], geometry)
    made = Profile(
        schema_version=WHOLE_VERSION if record is None else GRADED_VERSION,
        kvprofile_version=__version__,
        model=facts.model,
        scoring=scoring,
        scores=scores,
        budgets=budgets,
        probe=record,
        runtime=facts.runtime,
    )
    return Result(made, content)


def _probe(facts: Facts, fit: ProbeFit) -> tuple[ProbeRecord, bytes]:
    """The probe fitted to all tokens between sinks and window: what the budget file says of it, and its file."""
    weights, r2 = fit.solve()
    content = Probe(facts.model.geometry.profiled_layers, weights).to_bytes()
    target = f"log({METHODS[facts.scoring.method].token_score} + {FLOOR:g})"
    return ProbeRecord(sha256=digest(content), features=FEATURES, target=target, tokens=fit.tokens, r2=r2), content
