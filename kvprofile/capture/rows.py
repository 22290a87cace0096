"""The weights that some rows give to some keys, and what of them is kept: float32, whatever the model's dtype.

The numbers of ``kvprofile.scoring.attention`` (KVzip, arXiv 2505.23416, equation 3), computed from logits alone,
because vLLM's kernels do not tell their log-sum-exp. Each logit is exponentiated once: a row's exponentials give its
normaliser, and divided by it the weights.
"""

from __future__ import annotations

import torch

MOST_LOGITS = 4 * 2**20
"""Most logits held at once (16 MiB), whatever context and chunk."""


def largest_weights(
    query: torch.Tensor,
    keys: torch.Tensor,
    scored: slice,
    visible: int,
    scaling: float,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Largest softmax weight [G, m] that any row and any query head of the group gives to each scored key.

    query [n, H, D]; keys [G, K, D], of which row i sees the first ``visible`` + i; ``scored`` are m of those that
    all rows see. ``sinks`` [H] are logits of learned sinks, which take weight.
    """
    rows, heads, size = query.shape
    kv_heads = keys.shape[0]
    group = heads // kv_heads
    keys = keys.float().transpose(1, 2)
    best = keys.new_zeros(kv_heads, scored.stop - scored.start)
    at_once = max(1, MOST_LOGITS // (heads * keys.shape[2]))
    learned = None if sinks is None else sinks.float().view(kv_heads, group, 1, 1)
    for first in range(0, rows, at_once):
        some = query[first : first + at_once].float()
        count, seen = len(some), visible + first + len(some) - 1
        folded = some.view(count, kv_heads, group, size).permute(1, 2, 0, 3).reshape(kv_heads, group * count, size)
        logits = torch.matmul(folded, keys[:, :, :seen]).mul_(scaling)
        if softcap:
            logits.div_(softcap).tanh_().mul_(softcap)
        logits = logits.view(kv_heads, group, count, seen)
        future = torch.ones(count, count, dtype=torch.bool, device=logits.device).triu_(1)
        logits[..., seen - count :].masked_fill_(future, -torch.inf)
        top = logits.amax(-1, keepdim=True)
        if learned is not None:
            top = torch.maximum(top, learned)
        total = logits.sub_(top).exp_().sum(-1, keepdim=True)
        if learned is not None:
            total += (learned - top).exp_()
        weights = logits[..., scored].div_(total)
        torch.maximum(best, weights.amax((1, 2)), out=best)
    return best.clamp_(max=1.0)


def summarise(states: torch.Tensor) -> dict[str, torch.Tensor]:
    """What keys or values [G, n, D] are like, for each head: mean vector [G, D], norms [G], in float32."""
    states = states.float()
    norms = states.norm(dim=-1)
    return {
        "mean": states.mean(1),
        "norm_mean": norms.mean(-1),
        "norm_std": norms.std(-1, correction=0),
        "norm_min": norms.amin(-1),
        "norm_max": norms.amax(-1),
    }
