"""What all formats share: foreign scores on their way in, a profile on its way out, and reading files with care.

A foreign file is data: nothing in it is ever run, and everything wrong with it becomes an InputError of one line.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from pydantic import ValidationError

from kvprofile import __version__
from kvprofile.budget import store
from kvprofile.budget.allocate import Constraints, preset_budgets, ranking, require_retention
from kvprofile.budget.choice import (
    Choice,
    choose,
    choose_whole,
    ranking_scores,
    require_kind,
    require_scores,
    tie_breaks,
)
from kvprofile.budget.known_models import ModelFacts
from kvprofile.budget.profile import (
    DEFAULT_RECENT_TOKENS,
    DEFAULT_SINK_TOKENS,
    SLIDING_ATTENTION,
    WHOLE_VERSION,
    Geometry,
    HeadBudgets,
    ImportedFrom,
    Matrix,
    ModelIdentity,
    Profile,
    Runtime,
    Scores,
    Scoring,
    matrix_problems,
    mean_budget,
    round_significant,
)
from kvprofile.budget.trim import GRADED
from kvprofile.errors import InputError, plain
from kvprofile.files import read_bytes

SIGNIFICANT_DIGITS = 9
"""Enough to tell every float32 from its neighbours, so imported numbers come out as they went in."""


@dataclass(frozen=True)
class ForeignScores:
    """What a foreign file says, before it is known where it was published.

    scores: [L][G] in [0, 1], higher for heads that need the context more; null rows for layers without budgets.
    spread: [L][G], standard deviation between the files of one model, where there were several.
    dtype: of the numbers in the files.
    files: those that the numbers were read from.
    budgets: [L][G] by retention; None where the form holds scores only.
    ranks_presets: whether the presets without budgets of their own are allocated by ranking the scores.
    model: only where the form names its model.
    """

    method: str
    scores: Matrix
    dtype: str
    files: tuple[Path, ...]
    spread: Matrix | None = None
    budgets: Mapping[str, Matrix] | None = None
    ranks_presets: bool = True
    sink_tokens: int | None = None
    recent_tokens: int | None = None
    notes: str | None = None
    model: ModelIdentity | None = None


@dataclass(frozen=True)
class Origin:
    """Where foreign files were published. ``files`` are their names there; the local names unless given."""

    repository: str | None = None
    commit: str | None = None
    licence: str | None = None
    files: tuple[str, ...] = ()


@dataclass(frozen=True)
class Export:
    """A profile on its way out: its scores and, where the form holds budgets, the choice of heads.

    Raises InputError where ``retention`` is not in (0, 1].
    """

    profile: Profile
    constraints: Constraints = field(default_factory=Constraints)
    retention: float | None = None
    kind: str | None = None

    def __post_init__(self) -> None:
        if self.retention is not None:
            require_retention(self.retention)
        if self.kind is not None:
            require_kind(self.kind)

    @property
    def scores(self) -> Matrix:
        """The statistic that ranks heads, [L][G]. Raises InputError where the profile has no scores."""
        require_scores(self.profile)
        return ranking_scores(self.profile)

    def choice(self, retention: float) -> Choice:
        """The budgets at a retention under the constraints, fractions included where the file states them."""
        return choose(self.profile, retention, self.constraints, kind=self.kind)

    def whole(self, retention: float) -> Choice:
        """The whole heads at a retention under the constraints. Raises InputError for graded heads and fractions."""
        if self.kind == GRADED:
            raise InputError("this format holds whole heads; leave out --kind graded, or use csv or lu-kv")
        return choose_whole(self.profile, retention, self.constraints)

    def asked_retention(self) -> float:
        """The asked retention. Raises InputError where none was asked for."""
        if self.retention is None:
            raise InputError("this format holds the heads kept at one retention; give --retention, for example 0.5")
        return self.retention

    @property
    def unit_scores(self) -> Matrix:
        """Scores in [0, 1] as foreign forms hold them, [L][G]: losses, which know no bounds, become shares of ranks.

        The most important of n heads gets 1, the least 1/n.
        """
        if self.profile.scoring.statistic != "loss":
            return self.scores
        order = ranking(self.scores, tie_breaks(self.profile, self.profile.scoring.statistic))
        shares: Matrix = [[None] * len(row) for row in self.scores]
        for rank, (layer, head) in enumerate(order):
            shares[layer][head] = 1.0 - rank / len(order)
        return shares

    def dense_scores(self, format_name: str) -> list[list[float]]:
        """Scores without nulls, or InputError where layers without scores leave the format nothing to write."""
        scores = self.unit_scores
        empty = next((layer for layer, row in enumerate(scores) if any(value is None for value in row)), None)
        if empty is not None:
            kind = self.profile.model.geometry.layer_types[empty]
            raise InputError(
                f"{format_name} files have a number for every layer, but layer {empty} of {self.profile.model.name} "
                f"{'slides' if kind == SLIDING_ATTENTION else 'has no cache'} and has none; use --format vllm or csv"
            )
        return [[value for value in row if value is not None] for row in scores]


class Format(ABC):
    """One foreign form.

    holds: what a file of it carries: scores for all retentions, or budgets.
    holds_fractions: whether its budgets may be fractions of heads.
    """

    name: ClassVar[str]
    holds: ClassVar[str]
    holds_fractions: ClassVar[bool] = False
    names_its_model: ClassVar[bool] = False
    needs_retention: ClassVar[bool] = False

    @abstractmethod
    def read(self, paths: Sequence[Path], geometry: Geometry | None) -> ForeignScores:
        """Read the files of one model. ``geometry`` is None only where the form names its model.

        Raises InputError for whatever is wrong with a file.
        """

    @abstractmethod
    def write(self, export: Export, path: Path) -> None:
        """Write atomically to ``path``. Raises InputError; then nothing has changed."""

    def model_of(self, path: Path) -> str | None:
        """The model that an existing output names, or None where it names none or is not such a file."""
        del path
        return None

    def advice(self, export: Export) -> str | None:
        """One line on how the tool that reads the file will act on it, where that is not obvious."""
        del export
        return None


def import_profile(
    form: Format, paths: Sequence[Path], facts: ModelFacts | None, provenance: Origin, model: str | None = None
) -> Profile:
    """Foreign files of one model as a profile. Raises InputError for broken files or another model's files."""
    if facts is None and not form.names_its_model:
        raise InputError(f"{form.name} files do not name their model; give --model with its hub id")
    foreign = form.read(paths, facts.geometry if facts else None)
    found = foreign.model or identity_of(facts)
    if model is not None and store.is_dir(Path(model)):
        model = Path(model).resolve().name
    wanted = model or (facts.name if facts else found.name)
    if found.name != wanted:
        raise InputError(f"{paths[0]} is for {found.name}, not for {wanted}")
    if facts and found.geometry != facts.geometry:
        raise InputError(f"{paths[0]} is for {found.geometry.describe()}, {wanted} has {facts.geometry.describe()}")
    digests = ", ".join(hashlib.sha256(read_bytes(path)).hexdigest() for path in foreign.files)
    with validation_as_input_error("import"):
        source = ImportedFrom(
            format=form.name,
            repository=provenance.repository,
            file=", ".join(provenance.files or [plain(path.name) for path in foreign.files]),
            commit=provenance.commit,
            licence=provenance.licence,
            notes="; ".join(filter(None, [foreign.notes, f"sha256 {digests}"])),
        )
        return _profile(foreign, found, source)


def identity_of(facts: ModelFacts | None) -> ModelIdentity:
    """A model identity from facts alone: nothing was verified against a checkpoint. Raises InputError for None."""
    if facts is None:
        raise InputError("the model is not known; give --model with its hub id")
    with validation_as_input_error("model"):
        return ModelIdentity(
            name=facts.name,
            revision=None,
            architecture=facts.architecture,
            geometry=facts.geometry,
            geometry_sha256=facts.geometry.sha256(),
            tokenizer_sha256=None,
            weights_sha256=None,
        )


def _profile(foreign: ForeignScores, model: ModelIdentity, source: ImportedFrom) -> Profile:
    spread = None if foreign.spread is None else rounded(foreign.spread)
    scores = Scores(
        significant_digits=SIGNIFICANT_DIGITS, max=rounded(foreign.scores), mean=None, p99=None, spread=spread
    )
    budgets = preset_budgets(scores, "max") if foreign.ranks_presets else {}
    for key, heads in (foreign.budgets or {}).items():
        budgets[key] = HeadBudgets(heads=heads, retention_realised=mean_budget(heads))
    return Profile(
        schema_version=WHOLE_VERSION,
        kvprofile_version=__version__,
        model=model,
        scoring=Scoring(
            method=foreign.method,
            statistic="max",
            chunk_tokens=None,
            context_tokens=None,
            prompts_version=None,
            prefix=None,
            suffix=None,
            engine="imported",
            attention="unknown: imported",
            dtype=foreign.dtype,
            device="unknown: imported",
            seed=None,
            corpora=[],
            imported_from=source,
        ),
        scores=scores,
        budgets=budgets,
        runtime=Runtime(
            sink_tokens=DEFAULT_SINK_TOKENS if foreign.sink_tokens is None else foreign.sink_tokens,
            recent_tokens=DEFAULT_RECENT_TOKENS if foreign.recent_tokens is None else foreign.recent_tokens,
        ),
    )


def refuse_other(path: Path, found: str | None, model: str, *, force: bool) -> None:
    """Keep an existing output that is not known to be the same model's. ``found`` is the model it names.

    Raises InputError; a missing path, an empty folder or ``force`` passes.
    """
    if force or not store.exists(path) or found == model or (store.is_dir(path) and not any(path.iterdir())):
        return
    if found is None:
        raise InputError(
            f"{path} exists and names no model, so it may be another model's; pass --force or another --output"
        )
    raise InputError(f"{path} is for {found}, not for {model}; pass --force to replace it or choose another --output")


def require_matrix(path: Path, matrix: Matrix, geometry: Geometry) -> None:
    """Raise InputError unless the numbers fit the geometry and lie in [0, 1]; all problems in one line."""
    found = list(matrix_problems("it", matrix, geometry))
    if found:
        more = f" and {len(found) - 3} more problems" if len(found) > 3 else ""
        raise InputError(f"{path}: {'; '.join(found[:3])}{more}")


def require_geometry(geometry: Geometry | None) -> Geometry:
    """The geometry, which formats that do not name their model cannot do without. Raises InputError for None."""
    if geometry is None:
        raise InputError("the model is not known; give --model with its hub id")
    return geometry


def single(paths: Sequence[Path], name: str) -> Path:
    """The one path a format takes. Raises InputError for any other number."""
    if len(paths) != 1:
        raise InputError(f"{name} takes one path, {len(paths)} were given")
    return paths[0]


def rounded(matrix: Matrix) -> Matrix:
    """Scores [L][G] as a profile stores them."""
    return [[None if v is None else round_significant(v, SIGNIFICANT_DIGITS) for v in row] for row in matrix]


@contextmanager
def validation_as_input_error(what: str) -> Iterator[None]:
    """Turn pydantic's errors into InputError with one phrase for each."""
    try:
        yield
    except ValidationError as error:
        raise InputError(f"{what}: {'; '.join(store.phrases(error))}") from error
