"""The probe's fit: sums over context tokens while they are scored, and a ridge regression from them at the end.

For each KV head: features of a cached token to the logarithm of its score (``budget.probe``). The sums need no token to
be kept, and there are two of each, for every other document, so that either half can tell how well the other half's fit
does on documents it has not seen.

Sums do not depend on the order in which chunks are added: each chunk's are rounded to steps that are powers of two, so
that adding them up in float64 is exact. Several processes may each add some documents, and their sums be added.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch

from kvprofile.budget.profile import Geometry

RIDGE = 1e-3
"""Of each feature's mean square, added to the diagonal of X'X / n."""

LEAST_SPREAD = 1e-6
"""Of y'y: variance below that is rounding."""

HALVES = 2

STEP_BITS = 16
"""Steps are this many powers of two finer than a chunk's mean square (of products: the geometric mean of two). So 53
bits hold the sum of 10^8 tokens exactly as long as no chunk's mean square is below 1/1000 of the mean of all."""

Place = tuple[int, int]
"""(document, chunk)."""


@dataclass
class ProbeFit:
    """Sums over the tokens of the ``places`` added so far.

    ``sums``, once there are any: those of ``probe.sums`` in float64 with axes [2, L'] before theirs, of the gram the
    upper triangle only, and tokens [2], how many there were for each head.
    """

    geometry: Geometry
    sums: dict[str, torch.Tensor] = field(default_factory=dict)
    places: set[Place] = field(default_factory=set)
    broken: bool = False

    @property
    def nbytes(self) -> int:
        """Bytes that the sums take."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.sums.values())

    @property
    def tokens(self) -> int:
        """Tokens added, for each head."""
        return int(self.sums["tokens"].sum()) if "tokens" in self.sums else 0

    def add(self, place: Place, layers: Iterable[Mapping[str, torch.Tensor]], tokens: int) -> None:
        """Add a chunk: the ``probe.sums`` of so many tokens in each profiled layer.

        A chunk without tokens counts as added; one that was added already is left out. Interrupted, the sums are
        ``broken``: they hold a part of the chunk.
        """
        if place in self.places:
            return
        self.broken = True
        half = place[0] % HALVES
        for number, found in enumerate(layers if tokens else ()):
            for name, tensor in _in_steps(found, tokens).items():
                if name not in self.sums:
                    shape = (HALVES, len(self.geometry.profiled_layers), *tensor.shape)
                    self.sums[name] = tensor.new_zeros(shape)
                self.sums[name][half, number] += tensor
        if tokens:
            self.sums.setdefault("tokens", torch.zeros(HALVES, dtype=torch.int64))[half] += tokens
        self.places.add(place)
        self.broken = False

    def join(self, other: ProbeFit) -> None:
        """Add the sums of other places. Raises ValueError where both hold a place."""
        if self.places & other.places:
            raise ValueError("a chunk was added twice")
        for name, tensor in other.sums.items():
            self.sums[name] = self.sums[name] + tensor if name in self.sums else tensor
        self.places |= other.places

    def solve(self) -> tuple[torch.Tensor, list[float | None]]:
        """Weights [L', G, F] of all tokens, and by layer how much of y a half's fit explains in the other (R^2).

        Layer by layer, so that little is held in float64. Raises ValueError where nothing was added.
        """
        if not self.tokens:
            raise ValueError("no token was added")
        weights = []
        size = self.sums["moment"].shape[-1]
        r2: list[float | None] = [None] * self.geometry.layers
        for number, layer in enumerate(self.geometry.profiled_layers):
            gram, moment = _square(self.sums["gram"][:, number], size), self.sums["moment"][:, number]
            weights.append(_ridge(gram.sum(0), moment.sum(0), self.tokens).float())
            r2[layer] = self._held_out(gram, number)
        return torch.stack(weights), r2

    def _held_out(self, gram: torch.Tensor, number: int) -> float | None:
        """What a layer's fits to either half explain of the other, all heads together; None where nothing varies."""
        moment, square, total = (self.sums[name][:, number] for name in ("moment", "square", "total"))
        tokens = self.sums["tokens"]
        if not tokens.all():
            return None
        wrong = spread = 0.0
        for mine, other in ((0, 1), (1, 0)):
            weights = _ridge(gram[mine], moment[mine], int(tokens[mine]))
            # |y - Xw|^2 = y'y - 2 w'X'y + w'X'X w, against the variance of y
            fitted = torch.einsum("gf,gfk,gk->g", weights, gram[other], weights)
            wrong += float((square[other] - 2 * (weights * moment[other]).sum(-1) + fitted).sum())
            spread += float((square[other] - total[other].square() / tokens[other]).sum())
        return round(1.0 - wrong / spread, 4) if spread > LEAST_SPREAD * float(square.sum()) else None

    def tensors(self) -> dict[str, torch.Tensor]:
        """Everything, to be written to a file."""
        return {**self.sums, "places": torch.tensor(sorted(self.places), dtype=torch.int64).view(-1, 2)}

    @classmethod
    def of(cls, tensors: Mapping[str, torch.Tensor], geometry: Geometry) -> ProbeFit:
        """What ``tensors`` gave. Raises KeyError for anything else."""
        places = {(int(document), int(chunk)) for document, chunk in tensors["places"].tolist()}
        sums = {name: tensor for name, tensor in tensors.items() if name != "places"}
        return cls(geometry, sums, places)


def _in_steps(found: Mapping[str, torch.Tensor], tokens: int) -> dict[str, torch.Tensor]:
    """The ``probe.sums`` of so many tokens, rounded to steps, in float64; of the gram the upper triangle.

    By Cauchy and Schwarz no sum of products exceeds the root of its two sums of squares, which set its step.
    """
    gram, square = found["gram"].double(), found["square"]
    x = _exponent(gram.diagonal(dim1=-2, dim2=-1) / tokens)
    y = _exponent(square / tokens)
    rows, columns = torch.triu_indices(*gram.shape[-2:])
    return {
        "gram": _rounded(gram[..., rows, columns], x[..., rows] + x[..., columns]),
        "moment": _rounded(found["moment"], x + y[..., None]),
        "square": _rounded(square, y + y),
        "total": _rounded(found["total"], x[..., -1] + y),
    }


def _exponent(mean_square: torch.Tensor) -> torch.Tensor:
    """The power of two above its root."""
    return torch.frexp(mean_square.sqrt()).exponent.long()


def _rounded(values: torch.Tensor, exponent: torch.Tensor) -> torch.Tensor:
    step = ((exponent - STEP_BITS).clamp(-1000, 1000) + 1023 << 52).view(torch.float64)  # 2 to that power, exactly
    return (values.double() / step).round() * step


def _square(triangle: torch.Tensor, size: int) -> torch.Tensor:
    """The symmetric matrices [..., F, F] of their upper triangles."""
    rows, columns = torch.triu_indices(size, size)
    found = triangle.new_empty(*triangle.shape[:-1], size, size)
    found[..., rows, columns] = triangle
    found[..., columns, rows] = triangle
    return found


def _ridge(gram: torch.Tensor, moment: torch.Tensor, tokens: int) -> torch.Tensor:
    """Weights [..., F] that fit best, each feature's but the constant's held back by its own mean square."""
    hold = gram.diagonal(dim1=-2, dim2=-1) * RIDGE
    hold[..., -1] = 0.0  # the constant
    found: torch.Tensor = torch.linalg.solve(gram + torch.diag_embed(hold + 1e-6 * tokens), moment[..., None])
    return found[..., 0]
