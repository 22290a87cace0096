"""The probe: which tokens of a context a graded head keeps, judged by what its cache holds of them.

For each KV head a linear function of a cached token's key and value, fitted to KVzip's scores of the corpora while they
were made (``scoring.probe_fit``). It is written next to the budget file, which knows its digest:
``models/kv_budget/<model>.probe.safetensors`` with one tensor ``weights`` [L', G, F] (float32), L' the profiled layers.

torch is imported where tensors are needed, so that reading budgets does without it.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from kvprofile.budget.profile import Geometry, Profile
from kvprofile.errors import InputError
from kvprofile.files import read_bytes, require_writable

if TYPE_CHECKING:
    import torch

FEATURES = "key pair norms, value, norms, position"
"""A rotary embedding turns pairs of a key's dimensions and leaves their lengths alone, so they need no turning back."""

TIE = 2.0**-10
"""Scores that are closer than about this are equal: a word that comes twice has one score, but for rounding."""

FLOOR = 1e-4
"""Added to scores before their logarithm: what is attended less than this is equally worthless."""

SUMS = ("gram", "moment", "square", "total")
"""What :func:`sums` gives."""

SUFFIX = ".probe.safetensors"
MAX_HEADER_BYTES = 2**20
MAX_FILE_BYTES = 256 * 1024 * 1024


def path_of(budget_file: Path) -> Path:
    """Where the probe of a budget file lies: next to it, under its name."""
    return budget_file.with_name(f"{budget_file.name.removesuffix('.json')}{SUFFIX}")


def digest(content: bytes) -> str:
    """The SHA-256 of a probe's file, as ``sha256sum`` prints it."""
    return hashlib.sha256(content).hexdigest()


def is_probe(path: Path) -> bool:
    """Whether a file is a probe that kvprofile wrote, by its header."""
    try:
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            notes = json.loads(file.read(min(size, MAX_HEADER_BYTES)))["__metadata__"]["kvprofile"]
            return "features" in json.loads(notes)
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return False


def sums_bytes(geometry: Geometry) -> int:
    """Bytes of the sums that a fit is made from while a model is scored, two sets of them.

    Half of F x F values in float64 for each profiled head, and little more; where values are as large as keys.
    """
    heads = len(geometry.profiled_layers) * geometry.kv_heads
    size = geometry.head_size // 2 + geometry.head_size + 7
    return 2 * heads * (4 * size * (size + 1) + 8 * size + 16)


def require_replaceable(path: Path, force: bool) -> None:
    """Raise InputError unless a probe may be written to ``path``: a new file, or one of kvprofile's own."""
    require_writable(path)
    if path.is_file() and not force and not is_probe(path):
        raise InputError(f"{path} exists and is not a probe; pass --force to replace it, or another --output")


def features(keys: torch.Tensor, values: torch.Tensor, first: int, prompt_tokens: int) -> torch.Tensor:
    """Features [G, m, F] (float32) of cached tokens at positions ``first``.. of a prompt.

    keys [G, m, D] and values [G, m, V] as the cache holds them. F is D/2 + V + 7: the lengths of (k_i, k_(i + D/2)),
    the value, the lengths of key and value, four functions of the place in the prompt, and a constant.
    """
    import torch

    place = torch.arange(first, first + keys.shape[1], device=keys.device, dtype=torch.float32)
    depth = place / prompt_tokens
    where = [depth, depth.square(), (1 + prompt_tokens - place).log(), (1 + place).log(), torch.ones_like(place)]
    return torch.cat([*_contents(keys, values), torch.stack(where, -1).expand(keys.shape[0], -1, -1)], -1)


def _contents(keys: torch.Tensor, values: torch.Tensor) -> list[torch.Tensor]:
    """The features [.., ..] of keys [.., D] and values [.., V] that do not look at the place, in their order."""
    squares, values = keys.float().square(), values.float()
    half = squares.shape[-1] // 2
    pairs = squares[..., :half] + squares[..., half : 2 * half]
    norms = [each.sum(-1, keepdim=True).sqrt_() for each in (squares, values.square())]
    return [pairs.sqrt_(), values, *norms]


def sums(
    keys: torch.Tensor, values: torch.Tensor, scores: torch.Tensor, first: int, prompt_tokens: int
) -> dict[str, torch.Tensor]:
    """What a fit needs of a layer's tokens, with y = log(score + FLOOR) of their scores [G, m], on the CPU.

    gram X'X [G, F, F] in float32, and in float64 moment X'y [G, F], square y'y [G] and total, the sum of y [G].
    """
    import torch

    x = features(keys, values, first, prompt_tokens)
    y = (scores.to(x.device).float() + FLOOR).log()
    found = {
        "gram": torch.matmul(x.transpose(1, 2), x),
        "moment": torch.matmul(x.transpose(1, 2), y[..., None])[..., 0].double(),
        "square": y.double().square().sum(-1),
        "total": y.double().sum(-1),
    }
    return {name: tensor.cpu() for name, tensor in found.items()}


@dataclass(frozen=True)
class Probe:
    """Weights [L', G, F] of the profiled ``layers``."""

    layers: tuple[int, ...]
    weights: torch.Tensor

    def scores(self, layer: int, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """Scores [G, ..] of a layer's tokens, keys [G, .., D] and values [G, .., V], by which those of a span compete.

        The place in the prompt, which a fit looks at too, is left out: it tells what a repeat of the text needs from
        what a reader needs, and knows how long the prompt is. Keys may lie in memory in any order of their dimensions.
        """
        import torch

        weights = self.weights[self.layers.index(layer)].to(keys.device)
        weights = weights.view(len(weights), *[1] * (keys.ndim - 2), -1)
        half, size = keys.shape[-1] // 2, values.shape[-1]
        # the features, none of them held longer than it is needed
        squares = keys.to(torch.float32, copy=True).square_()
        norms = squares.sum(-1).sqrt_()
        pairs = (squares[..., :half] + squares[..., half : 2 * half]).sqrt_()
        total = pairs.mul_(weights[..., :half]).sum(-1)
        total.addcmul_(norms, weights[..., half + size])
        values = values.to(torch.float32, copy=True)
        total += (values * weights[..., half : half + size]).sum(-1)
        total.addcmul_(values.square_().sum(-1).sqrt_(), weights[..., half + size + 1])
        return total.div_(TIE).round_().mul_(TIE)

    def to_bytes(self) -> bytes:
        """The file's bytes."""
        import safetensors.torch

        notes = {"features": FEATURES, "layers": list(self.layers), "shape": "profiled layers, KV heads, features"}
        return safetensors.torch.save({"weights": self.weights.contiguous()}, {"kvprofile": json.dumps(notes)})


def from_bytes(content: bytes) -> Probe:
    """A probe from its file's bytes. Raises ValueError for anything else."""
    import safetensors
    import safetensors.torch

    try:
        size = int.from_bytes(content[:8], "little")
        layers = json.loads(json.loads(content[8 : 8 + size])["__metadata__"]["kvprofile"])["layers"]
        return Probe(tuple(layers), safetensors.torch.load(content)["weights"])
    except (ValueError, KeyError, TypeError, safetensors.SafetensorError) as error:
        raise ValueError(f"not a probe of kvprofile: {error}") from error


def read(path: Path, profile: Profile) -> bytes:
    """The bytes of a profile's probe, checked without torch.

    Raises InputError where the profile has none, its file is missing, is not the one that the profile was written with,
    belongs to a kvprofile that looks at other features, or holds anything but weights for the profile's heads.
    """
    record = profile.probe
    if record is None:
        raise InputError(f"the budget file of {profile.model.name} has no probe; make one with 'kvprofile score'")
    if not path.is_file():
        raise InputError(
            f"no probe {path}, which graded budgets need; put it next to the budget file, or "
            "ask for whole heads (--kind whole, or LLM_KVZIP_KIND=whole where vLLM serves)"
        )
    content = read_bytes(path, MAX_FILE_BYTES)
    if digest(content) != record.sha256:
        raise InputError(
            f"{path} is not the probe that the budget file of {profile.model.name} was written with; take both files "
            "from one commit, or score again"
        )
    if record.features != FEATURES:
        raise InputError(f"{path} looks at {record.features!r}, this kvprofile at {FEATURES!r}; score again")
    geometry = profile.model.geometry
    shape = _shape_of(content)
    if shape is None:
        raise InputError(f"{path} does not hold the weights of a probe; score again")
    if shape[:2] != (len(geometry.profiled_layers), geometry.kv_heads):
        raise InputError(f"{path} is for {shape[0]} layers x {shape[1]} KV heads, not {geometry.describe()}")
    return content


def problem(budget_file: Path, profile: Profile) -> str | None:
    """Why a profile's graded budgets cannot be served from where its file is; None where they can, or it has none."""
    if profile.probe is None:
        return None
    try:
        read(path_of(budget_file), profile)
    except InputError as error:
        return str(error)
    return None


def _shape_of(content: bytes) -> tuple[int, ...] | None:
    """The shape of a file's weights, by its header alone; None where it is not a file of three-dimensional ones."""
    size = int.from_bytes(content[:8], "little")
    try:
        shape = tuple(int(each) for each in json.loads(content[8 : 8 + size])["weights"]["shape"])
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return shape if len(shape) == 3 else None


def load(path: Path, profile: Profile) -> Probe:
    """The probe of a profile. Raises InputError as ``read``, and for a file that is broken beyond its header."""
    content = read(path, profile)
    import safetensors
    import safetensors.torch

    try:
        weights = safetensors.torch.load(content)["weights"]
    except (safetensors.SafetensorError, ValueError) as error:
        raise InputError(f"{path} does not hold the weights of a probe ({error}); score again") from error
    return Probe(profile.model.geometry.profiled_layers, weights)
