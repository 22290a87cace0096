"""The runtime file that vLLM acts on: full heads of each layer at one retention. Its form is in runtime_file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from kvprofile import __version__
from kvprofile.budget import runtime_file, servable, store
from kvprofile.budget.formats.base import Export, ForeignScores, Format, single
from kvprofile.budget.profile import Geometry, retention_key
from kvprofile.budget.runtime_file import RuntimeFile, RuntimeModel, RuntimeProvenance
from kvprofile.errors import InputError
from kvprofile.files import read_bytes, sha256_of, write_atomically


class VLLM(Format):
    """Budgets at one retention; the file names its model."""

    name = "vllm"
    holds = "budgets"
    names_its_model = True
    needs_retention = True

    def read(self, paths: Sequence[Path], geometry: Geometry | None) -> ForeignScores:
        """Read one file: the budget comes back, the scores it was made from do not. Raises InputError."""
        del geometry  # the file states its own, import_profile compares
        path = single(paths, self.name)
        found = runtime_file.parse(read_bytes(path, runtime_file.MAX_FILE_BYTES), str(path))
        asked = found.provenance.retention_asked
        if asked <= 0.0:
            raise InputError(f"{path}: retention_asked is {asked:g}; a budget needs a retention above 0")
        heads = found.budgets()
        return ForeignScores(
            method=found.provenance.method,
            scores=heads,
            dtype="none",
            files=(path,),
            budgets={retention_key(asked): heads},
            ranks_presets=False,
            sink_tokens=found.sink_tokens,
            recent_tokens=found.recent_tokens,
            notes="a runtime file holds no scores: 1 stands for a full head, 0 for a trimmed one",
            model=found.model.identity(),
        )

    def write(self, export: Export, path: Path) -> None:
        """Write the runtime file at the asked retention."""
        write_atomically(path, runtime(export).to_bytes())

    def model_of(self, path: Path) -> str | None:
        """The model that a runtime file names."""
        try:
            return runtime_file.load(path).model.name
        except InputError:
            return None

    def advice(self, export: Export) -> str | None:
        """A warning where vLLM itself will not deal the query heads over that many ranks."""
        heads, size = export.profile.model.geometry.attention_heads, export.constraints.tensor_parallel_size
        return f"{heads} query heads do not divide over {size} ranks: vLLM refuses that size" if heads % size else None


def runtime(export: Export) -> RuntimeFile:
    """The runtime file of a profile at the asked retention. Raises InputError without one, and for fractions."""
    profile, constraints = export.profile, export.constraints
    budget = servable.of_profile(profile, export.asked_retention(), constraints)
    source = profile.scoring.imported_from
    return RuntimeFile(
        model=RuntimeModel.of(profile.model),
        full_heads=[None if row is None else list(row) for row in budget.full_heads],
        kv_head_order=None,
        sink_tokens=budget.sink_tokens,
        recent_tokens=budget.recent_tokens,
        provenance=RuntimeProvenance(
            kvprofile_version=__version__,
            profile_sha256=sha256_of(store.to_bytes(profile)),
            method=budget.method,
            statistic=budget.statistic,
            imported_from=(source.repository or source.file) if source else None,
            retention_asked=budget.retention_asked,
            retention_realised=budget.retention_realised,
            reason=budget.reason,
            floor=constraints.floor,
            tensor_parallel_size=constraints.tensor_parallel_size,
            pipeline_stages=list(constraints.pipeline_stages),
        ),
    )
