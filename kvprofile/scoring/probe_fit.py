"""The probe's fit: sums over context tokens while they are scored, and a ridge regression from them at the end.

For each KV head: features x [F] of a cached token (``budget.probe``) to y = log(token score + FLOOR). The sums X'X, X'y
and y'y need no token to be kept, and there are two of each, for every other document, so that either half can tell how
well the other half's fit does on documents it has not seen.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch

from kvprofile.budget.probe import features
from kvprofile.budget.profile import Geometry

FLOOR = 1e-4
"""Added to scores before their logarithm: what is attended less than this is equally worthless."""

RIDGE = 1e-3
"""Of each feature's mean square, added to the diagonal of X'X / n."""

HALVES = 2

Place = tuple[int, int]
"""(document, chunk)."""


@dataclass
class ProbeFit:
    """Sums over the tokens of the ``places`` added so far.

    ``sums``, once there are any: gram [2, L', G, F, F] (float32), moment [2, L', G, F], square [2, L', G] and total
    [2, L', G] (float64) are X'X, X'y, y'y and the sum of y; tokens [2] how many there were for each head.
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
        return int(self.sums["tokens"].sum()) if self.sums else 0

    def add(self, place: Place, layers: Iterable[tuple[torch.Tensor, torch.Tensor]], scores: torch.Tensor) -> None:
        """Add a chunk: keys and values [G, m, D] of each profiled layer as the cache holds them, scores [L', G, m].

        A chunk without tokens (m = 0) counts as added; one that was added already is left out. Interrupted, the sums
        are ``broken``: they hold a part of the chunk.
        """
        if place in self.places:
            return
        self.broken = True
        half, count = place[0] % HALVES, scores.shape[-1]
        for number, (keys, values) in enumerate(layers if count else ()):
            x = features(keys, values)
            y = (scores[number].to(x.device).float() + FLOOR).log()
            if not self.sums:
                self.sums = self._room(x.shape[-1])
            self.sums["gram"][half, number] += torch.matmul(x.transpose(1, 2), x).cpu()
            self.sums["moment"][half, number] += torch.matmul(x.transpose(1, 2), y[..., None])[..., 0].cpu()
            self.sums["square"][half, number] += y.double().square().sum(-1).cpu()
            self.sums["total"][half, number] += y.double().sum(-1).cpu()
        if count:
            self.sums["tokens"][half] += count
        self.places.add(place)
        self.broken = False

    def _room(self, size: int) -> dict[str, torch.Tensor]:
        shape = (HALVES, len(self.geometry.profiled_layers), self.geometry.kv_heads)
        return {
            "gram": torch.zeros(*shape, size, size),
            "moment": torch.zeros(*shape, size, dtype=torch.float64),
            "square": torch.zeros(shape, dtype=torch.float64),
            "total": torch.zeros(shape, dtype=torch.float64),
            "tokens": torch.zeros(HALVES, dtype=torch.int64),
        }

    def solve(self) -> tuple[torch.Tensor, list[float | None]]:
        """Weights [L', G, F] of all tokens, and by layer how much of y a half's fit explains in the other (R^2).

        Raises ValueError where nothing was added.
        """
        if not self.tokens:
            raise ValueError("no token was added")
        gram = self.sums["gram"].double()
        weights = _ridge(gram.sum(0), self.sums["moment"].sum(0), self.tokens)
        return weights.float(), self._held_out(gram)

    def _held_out(self, gram: torch.Tensor) -> list[float | None]:
        rows: list[float | None] = [None] * self.geometry.layers
        moment, square, total, tokens = (self.sums[name] for name in ("moment", "square", "total", "tokens"))
        if not tokens.all():
            return rows
        explained = []
        for mine, other in ((0, 1), (1, 0)):
            weights = _ridge(gram[mine], moment[mine], int(tokens[mine]))
            # |y - Xw|^2 = y'y - 2 w'X'y + w'X'X w, against the variance of y
            fitted = torch.einsum("lgf,lgfk,lgk->lg", weights, gram[other], weights)
            wrong = square[other] - 2 * (weights * moment[other]).sum(-1) + fitted
            spread = square[other] - total[other].square() / tokens[other]
            explained.append(1.0 - wrong / spread.clamp_min(1e-12))
        mean = torch.stack(explained).mean(0).mean(-1)
        for layer, value in zip(self.geometry.profiled_layers, mean.tolist(), strict=True):
            rows[layer] = round(value, 4)
        return rows

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
