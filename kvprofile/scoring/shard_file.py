"""The file that ``score --shard`` leaves, and the budget file that ``merge`` makes of all of them.

A safetensors file: its header says of which run and which shard it is, its tensors are what its documents add to the
profile and to the probe. Merging needs neither the model nor the texts.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open

from kvprofile import __version__
from kvprofile.budget.profile import GRADED_PRESETS, ModelIdentity, Runtime, Scoring
from kvprofile.errors import InputError
from kvprofile.files import PARTIAL, parse_json, write_atomically
from kvprofile.scoring.aggregate import DocumentScores
from kvprofile.scoring.assemble import Facts, Result, assemble
from kvprofile.scoring.probe_fit import ProbeFit
from kvprofile.scoring.shard import Shard

_HEADER = "kvprofile.shard"
_FORMAT = 1
_FIT = "fit."


@dataclass(frozen=True)
class ShardFile:
    """A finished shard as its header describes it: of how many ``documents`` in all, and of which run."""

    path: Path
    version: str
    shard: Shard
    documents: int
    run_key: str
    facts: Facts

    @property
    def read(self) -> range:
        """Numbers of its documents."""
        return self.shard.documents(self.documents)

    def scores(self) -> list[DocumentScores]:
        """Those of its documents, in their order."""
        with _opened(self.path) as tensors:
            names = ("maximum", "mean", "p99", "shares", "tokens")
            maximum, mean, p99, shares, tokens = (tensors.get_tensor(name) for name in names)
            loss = tensors.get_tensor("loss") if "loss" in tensors.keys() else None  # noqa: SIM118 - no dict
        return [
            DocumentScores(
                maximum[i],
                mean[i],
                p99[i],
                None if shares[i].isnan().any() else shares[i],
                None if loss is None else loss[i],
                int(tokens[i]),
            )
            for i in range(len(self.read))
        ]

    def fit(self) -> ProbeFit:
        """The sums of its documents."""
        with _opened(self.path) as tensors:
            found = {name: tensors.get_tensor(name) for name in tensors.keys() if name.startswith(_FIT)}  # noqa: SIM118
        return ProbeFit.of({name.removeprefix(_FIT): one for name, one in found.items()}, self.facts.model.geometry)


def write(header: ShardFile, documents: Sequence[DocumentScores], fit: ProbeFit) -> None:
    """Write a shard's file, atomically."""
    geometry = header.facts.model.geometry
    heads = (len(geometry.profiled_layers), geometry.kv_heads)
    nothing = torch.full((len(GRADED_PRESETS), *heads), torch.nan, dtype=torch.float64)
    tensors = {
        "maximum": _stack([one.maximum for one in documents], heads),
        "mean": _stack([one.mean for one in documents], heads),
        "p99": _stack([one.p99 for one in documents], heads),
        "shares": _stack([nothing if one.shares is None else one.shares for one in documents], nothing.shape),
        "tokens": torch.tensor([one.tokens for one in documents], dtype=torch.int64),
        **{f"{_FIT}{name}": tensor for name, tensor in fit.tensors().items()},
    }
    losses = [one.loss for one in documents if one.loss is not None]
    if losses:
        tensors["loss"] = torch.stack(losses)
    told = {
        "format": _FORMAT,
        "version": header.version,
        "shard": [header.shard.number, header.shard.of],
        "documents": header.documents,
        "run_key": header.run_key,
        "facts": _dumped(header.facts),
    }
    write_atomically(header.path, safetensors.torch.save(tensors, {_HEADER: json.dumps(told, sort_keys=True)}))


def read(path: Path) -> ShardFile:
    """A shard's header. Raises InputError for anything that is not a whole shard of this kvprofile."""
    if path.name.endswith(PARTIAL) and path.is_dir():
        raise InputError(f"{path} is the work of a shard that is not finished; run its score command again")
    with _opened(path) as tensors:
        told = (tensors.metadata() or {}).get(_HEADER)
    if told is None:
        raise InputError(f"{path} is not a shard; give files that 'kvprofile score --shard' has written")
    try:
        raw = parse_json(told.encode(), "shard")
        version = str(raw["version"])
        if version != __version__ or raw["format"] != _FORMAT:
            raise InputError(
                f"{path} was written by kvprofile {version}, this is {__version__}; use one version for all shards"
            )
        facts = raw["facts"]
        model = ModelIdentity.model_validate(facts["model"])
        described = Facts(model, Scoring.model_validate(facts["scoring"]), Runtime.model_validate(facts["runtime"]))
        shard = Shard.parse("/".join(map(str, raw["shard"])))
        return ShardFile(path, version, shard, int(raw["documents"]), str(raw["run_key"]), described)
    except (ValueError, KeyError, TypeError, ValidationError) as error:
        raise InputError(f"{path}: its header is not that of a shard; score the shard again") from error


def is_finished(wanted: ShardFile, force: bool) -> bool:
    """Whether the file of a shard is there already, of the same run; the attention kernel is not yet known.

    Raises InputError where there is something else that should not be replaced without ``force``.
    """
    if not wanted.path.exists():
        return False
    try:
        found = read(wanted.path)
    except InputError as error:
        if force:
            return False
        raise InputError(f"{error}; or pass --force to replace {wanted.path.name}") from error
    return found.shard == wanted.shard and _why_foreign(found, wanted) is None


def merge(paths: Sequence[Path]) -> Result:
    """The budget file and probe of one run, from all of its shards in any order.

    Raises InputError where a shard is missing, doubled, not finished or of another run.
    """
    files = complete([read(path) for path in paths])
    documents: dict[int, DocumentScores] = {}
    facts = next((one.facts for one in files if one.read), files[0].facts)
    fit = ProbeFit(facts.model.geometry)
    for one in files:
        try:
            documents.update(zip(one.read, one.scores(), strict=True))
            fit.join(one.fit())
        except (SafetensorError, KeyError, ValueError, IndexError, RuntimeError) as error:
            raise InputError(f"{one.path} does not hold what a shard holds; score shard {one.shard} again") from error
    return assemble(facts, [documents[index] for index in sorted(documents)], fit)


def complete(files: Sequence[ShardFile]) -> list[ShardFile]:
    """The shards in their order. Raises InputError unless they are all of one run, each once."""
    first, found = files[0], dict[Shard, ShardFile]()
    for one in files:
        if one.shard.of != first.shard.of:
            raise InputError(
                f"{first.path} is shard {first.shard}, {one.path} is shard {one.shard}; give the shards of one division"
            )
        if one.shard in found:
            raise InputError(f"{found[one.shard].path} and {one.path} are both shard {one.shard}; give each once")
        found[one.shard] = one
    main = next((one for one in files if one.read), first)
    for one in files:
        why = _why_foreign(main, one)
        if why:
            raise InputError(f"{one.path} belongs to another run than {main.path}: {why}; score it again")
    missing = [Shard(i, first.shard.of) for i in range(1, first.shard.of + 1) if Shard(i, first.shard.of) not in found]
    if missing:
        numbers = ", ".join(str(one.number) for one in missing[:10]) + (" ..." if len(missing) > 10 else "")
        begun = [one for one in missing if (path := one.beside(first.path)) and _partial(path).exists()]
        note = f" ({begun[0]} was begun and is not finished)" if begun else ""
        raise InputError(
            f"missing of {first.shard.of} shards: {numbers}{note}; run 'kvprofile score ... --shard {missing[0]}', or "
            "name its file"
        )
    return [found[shard] for shard in sorted(found)]


def _why_foreign(main: ShardFile, other: ShardFile) -> str | None:
    """What shows that another shard is of another run; None where nothing does."""
    facts, others = _dumped(main.facts), _dumped(other.facts)
    if not others["scoring"]["attention"]:  # no model was loaded
        others["scoring"]["attention"] = facts["scoring"]["attention"]
    difference = _difference(facts, others)
    if difference or (other.run_key, other.documents) != (main.run_key, main.documents):
        return difference or "texts, templates or settings of the engine differ"
    return None


def _partial(path: Path) -> Path:
    return path.with_name(path.name + PARTIAL)


def _stack(tensors: list[torch.Tensor], shape: Sequence[int]) -> torch.Tensor:
    return torch.stack(tensors) if tensors else torch.empty(0, *shape)


def _dumped(facts: Facts) -> dict[str, Any]:
    return {name: getattr(facts, name).model_dump(mode="json") for name in ("model", "scoring", "runtime")}


def _difference(one: Any, other: Any, place: str = "") -> str | None:
    """The first place where two headers differ, with what stands there in the second and in the first."""
    if isinstance(one, dict) and isinstance(other, dict):
        places = [(str(key), one.get(key), other.get(key)) for key in sorted({*one, *other})]
    elif isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        places = [(str(key), *pair) for key, pair in enumerate(zip(one, other, strict=True))]
    else:
        return None if one == other else f"{place.lstrip('.')} is {_short(other)}, not {_short(one)}"
    inner = (_difference(mine, yours, f"{place}.{key}") for key, mine, yours in places)
    return next((found for found in inner if found), None)


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    if not path.exists():
        raise InputError(f"{path}: no such file")
    if not path.is_file():
        raise InputError(f"{path} is not a shard; give files that 'kvprofile score --shard' has written")
    try:
        tensors = safe_open(path, "pt")
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path} is cut off or is not a shard; copy it again, or score the shard again") from error
    with tensors:
        yield tensors
