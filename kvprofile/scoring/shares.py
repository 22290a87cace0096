"""How many tokens each head keeps: shares of heads at a retention, from the token scores of whole documents.

All entries of a document between sinks and window, of all layers and heads, compete for the retention; a head's share
is the part of its own that is kept. So heads that look things up everywhere get more, and every document keeps exactly
the retention. Shares are the mean over documents.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from kvprofile.budget.profile import GRADED_PRESETS, Geometry, HeadBudgets, Matrix, mean_budget, retention_key

UNITS = 100_000
"""Shares are written in steps of one of so many, so that their mean is the retention."""


def document_shares(histogram: torch.Tensor, retention: float) -> torch.Tensor:
    """Shares [L', G] (float64) of a document at a retention.

    ``histogram`` [L', G, BINS] counts the token scores of each head between sinks and window, equally many for each.
    Within the bin that holds the threshold every head keeps the same part.
    """
    counts = histogram.double()
    positions = counts[0, 0].sum()
    falling = counts.flatten(0, 1).sum(0).flip(0).cumsum(0)  # entries of the highest 1, 2, 3 ... bins
    wanted = retention * falling[-1]
    border = int((falling < wanted).sum())  # how many of the highest bins are kept whole
    above = falling[border - 1] if border else falling.new_zeros(())
    border = min(border, len(falling) - 1)
    at = counts.shape[-1] - 1 - border
    part = (wanted - above) / (falling[border] - above)
    return (counts[..., at + 1 :].sum(-1) + part * counts[..., at]) / positions


def preset_shares(histogram: torch.Tensor) -> torch.Tensor:
    """Shares [P, L', G] of a document at every preset."""
    return torch.stack([document_shares(histogram, retention) for retention in GRADED_PRESETS])


def graded_budgets(documents: Sequence[torch.Tensor], geometry: Geometry) -> dict[str, HeadBudgets]:
    """Graded budgets at every preset, from the ``preset_shares`` of documents with tokens between sinks and window."""
    found = {}
    for place, retention in enumerate(GRADED_PRESETS):
        shares = torch.stack([document[place] for document in documents]).mean(0)
        heads = _matrix(_in_units(shares.flatten(), retention).view_as(shares), geometry)
        found[retention_key(retention)] = HeadBudgets(heads=heads, retention_realised=round(mean_budget(heads), 9))
    return found


def _in_units(shares: torch.Tensor, retention: float) -> torch.Tensor:
    """Shares [n] in whole units whose mean is the retention to the nearest unit: largest remainders are rounded up."""
    units = shares * UNITS
    whole = units.floor()
    missing = math.floor(retention * len(shares) * UNITS + 0.5) - int(whole.sum())
    first = (units - whole).argsort(descending=True, stable=True)[: max(0, missing)]
    whole[first] += 1
    return whole.clamp(max=UNITS) / UNITS


def _matrix(shares: torch.Tensor, geometry: Geometry) -> Matrix:
    """Rows for all layers, null for those not profiled."""
    rows = iter(shares.tolist())
    profiled = set(geometry.profiled_layers)
    return [
        [round(value, 5) for value in next(rows)] if layer in profiled else [None] * geometry.kv_heads
        for layer in range(geometry.layers)
    ]
