"""The budget of the served model: which file, whether it is this model's, and which heads it keeps.

Runs once, in the process that configures the engine. Files are found by the model identity inside them, never by their
names. Knows nothing of vLLM; what vLLM is about to serve comes in as ``Served``.
"""

from __future__ import annotations

import base64
import json
from dataclasses import dataclass
from pathlib import Path

from kvprofile.budget import probe, servable, store
from kvprofile.budget.allocate import Constraints
from kvprofile.budget.profile import ModelIdentity, Profile
from kvprofile.budget.runtime_file import RuntimeFile
from kvprofile.budget.servable import ServableBudget
from kvprofile.budget.trim import ANCHORED, GRADED, WHOLE
from kvprofile.environment import PREFIX
from kvprofile.errors import InputError
from kvprofile.files import read_bytes
from kvprofile.runtime.attestation import is_attestation
from kvprofile.runtime.engine_budget import EngineBudget
from kvprofile.runtime.settings import Settings


@dataclass(frozen=True)
class Served:
    """What vLLM is about to serve. ``names``: hub id, folder and the names it is served under."""

    names: tuple[str, ...]
    layers: int
    attention_heads: int
    kv_heads: int
    head_size: int
    tensor_parallel_size: int

    def is_called(self, name: str) -> bool:
        """Whether ``name`` is a name of this model; of a local folder its last part counts, of a hub id the whole."""
        last = name.rpartition("/")[2]
        return any(own == name or (store.is_dir(Path(own)) and Path(own).resolve().name == last) for own in self.names)


def file_of(settings: Settings, served: Served) -> Path:
    """The budget file to serve with. Raises ValueError where none is named and the folder has not just one."""
    return settings.budget if settings.budget is not None else _search(settings.budget_dir, served)


def find(settings: Settings, served: Served) -> tuple[EngineBudget, str]:
    """The budget to serve with, and a phrase on where it comes from.

    Raises ValueError or kvprofile's InputError, one line each, where there is no file for the model, more than one, or
    one of another model.
    """
    path = file_of(settings, served)
    kept, weights = kept_by(path, settings, served.tensor_parallel_size)
    _require_same_model(path, kept.model, served)
    budget = EngineBudget(
        tuple(None if row[0] is None else tuple(share or 0.0 for share in row) for row in kept.heads),
        kept.sink_tokens if settings.sink_tokens is None else settings.sink_tokens,
        kept.recent_tokens if settings.recent_tokens is None else settings.recent_tokens,
        settings.window,
        None if weights is None else base64.b64encode(weights).decode(),
    )
    if not budget.heads:
        raise ValueError(f"{path}: no layer of {kept.model.name} has a budget, there is nothing to trim")
    layer = budget.uneven_layer(served.tensor_parallel_size)
    if layer is not None:
        raise ValueError(
            f"{path}: the full heads of layer {layer} are not dealt evenly to {served.tensor_parallel_size} ranks; "
            f"export it with --tensor-parallel-size {served.tensor_parallel_size}"
        )
    origin = f"{path} (retention {kept.retention_asked:g} asked, {budget.retention:.4f} realised)"
    return budget, origin if kept.reason is None else f"{origin}: {kept.reason}"


def kind_of(settings: Settings, found: Profile | RuntimeFile) -> str:
    """Whole or graded: as asked, else what the file has, as everywhere. Heads that keep everything are whole."""
    return settings.kind or (WHOLE if settings.retention == 1.0 else servable.default_kind(found))


def kept_by(path: Path, settings: Settings, tensor_parallel_size: int = 1) -> tuple[ServableBudget, bytes | None]:
    """What heads keep by a file and the settings, and of graded heads the bytes of the probe.

    Raises ValueError or kvprofile's InputError where they do not go together, or the probe is not the file's.
    """
    found = servable.read(path)
    kind = kind_of(settings, found)
    if isinstance(found, RuntimeFile):
        return _of_runtime_file(path, found, settings, kind), None
    if kind == GRADED and settings.window != ANCHORED:
        why = "has a probe, so it is" if settings.kind is None else "is to be"
        raise ValueError(
            f"{path} {why} served with graded heads, whose window stays where the prompt ends; "
            f"unset {PREFIX}WINDOW, or set {PREFIX}KIND=whole"
        )
    if settings.retention is None:
        stated = ", ".join(sorted(found.budgets, reverse=True))
        raise ValueError(f"{path} holds budgets for several retentions; set {PREFIX}RETENTION, for example {stated}")
    constraints = Constraints(tensor_parallel_size=tensor_parallel_size)
    kept = servable.of_profile(found, settings.retention, constraints, kind)
    return kept, probe.read(probe.path_of(path), found) if kind == GRADED else None


def _of_runtime_file(path: Path, found: RuntimeFile, settings: Settings, kind: str) -> ServableBudget:
    if kind == GRADED:
        raise ValueError(
            f"{path} is a runtime file, which holds whole heads; give a budget file ({PREFIX}BUDGET, or --profile of "
            f"verify), or do not ask for graded ones"
        )
    kept = servable.of_runtime_file(found)
    if settings.retention not in (None, kept.retention_asked):
        raise ValueError(
            f"{path} is for retention {kept.retention_asked:g}, {PREFIX}RETENTION asks for "
            f"{settings.retention:g}; unset it, or point {PREFIX}BUDGET to a profile"
        )
    return kept


def _search(folder: Path, served: Served) -> Path:
    """The one file in ``folder`` whose model is the served one."""
    wanted = " or ".join(served.names)
    if not store.is_dir(folder):
        raise ValueError(f"no budget for {wanted}: {folder} is not a folder; set {PREFIX}BUDGET or {PREFIX}BUDGET_DIR")
    files = [path for path in sorted(folder.glob("*.json")) if not is_attestation(path)]
    matches = [path for path in files if served.is_called(model_name(path) or "")]
    if not matches:
        raise ValueError(f"no budget for {wanted} in {folder}; set {PREFIX}BUDGET to a file, or score the model")
    if len(matches) > 1:
        listed = ", ".join(str(path) for path in matches)
        raise ValueError(f"{len(matches)} budgets for {wanted}: {listed}; set {PREFIX}BUDGET to one of them")
    return matches[0]


def model_name(path: Path) -> str | None:
    """The model that a file names; None for anything that is not a budget."""
    try:
        return str(json.loads(read_bytes(path))["model"]["name"])
    except (InputError, ValueError, KeyError, TypeError, RecursionError):
        return None


def _require_same_model(path: Path, model: ModelIdentity, served: Served) -> None:
    if not served.is_called(model.name):
        raise ValueError(
            f"{path} is for {model.name}, vLLM serves {' or '.join(served.names)}; if that is the same model, "
            f"say so with --served-model-name {model.name}"
        )
    for name in ("layers", "attention_heads", "kv_heads", "head_size"):
        stated, actual = getattr(model.geometry, name), getattr(served, name)
        if stated != actual:
            words = name.replace("_", " ")
            raise ValueError(f"{path} is for another model: {stated} {words}, vLLM serves one with {actual}")
