"""The probe's fit: sums over context tokens while they are scored, and a ridge regression from them at the end.

For each KV head: features of a cached token to the logarithm of its score (``budget.probe``). The sums need no token to
be kept, and there are two of each, for every other document, so that either half can tell how well the other half's fit
does on documents it has not seen.
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

Place = tuple[int, int]
"""(document, chunk)."""


@dataclass
class ProbeFit:
    """Sums over the tokens of the ``places`` added so far.

    ``sums``, once there are any: those of ``probe.sums`` with axes [2, L'] before theirs, and tokens [2], how many
    there were for each head.
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
            for name, tensor in found.items():
                if name not in self.sums:
                    shape = (HALVES, len(self.geometry.profiled_layers), *tensor.shape)
                    self.sums[name] = tensor.new_zeros(shape)
                self.sums[name][half, number] += tensor
        if tokens:
            self.sums.setdefault("tokens", torch.zeros(HALVES, dtype=torch.int64))[half] += tokens
        self.places.add(place)
        self.broken = False

    def solve(self) -> tuple[torch.Tensor, list[float | None]]:
        """Weights [L', G, F] of all tokens, and by layer how much of y a half's fit explains in the other (R^2).

        Layer by layer, so that little is held in float64. Raises ValueError where nothing was added.
        """
        if not self.tokens:
            raise ValueError("no token was added")
        weights = []
        r2: list[float | None] = [None] * self.geometry.layers
        for number, layer in enumerate(self.geometry.profiled_layers):
            gram, moment = self.sums["gram"][:, number].double(), self.sums["moment"][:, number]
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


def _ridge(gram: torch.Tensor, moment: torch.Tensor, tokens: int) -> torch.Tensor:
    """Weights [..., F] that fit best, each feature's but the constant's held back by its own mean square."""
    hold = gram.diagonal(dim1=-2, dim2=-1) * RIDGE
    hold[..., -1] = 0.0  # the constant
    found: torch.Tensor = torch.linalg.solve(gram + torch.diag_embed(hold + 1e-6 * tokens), moment[..., None])
    return found[..., 0]
