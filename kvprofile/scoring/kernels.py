"""Attention of queries to one span of keys, with the log-sum-exp of the logits, and merging of such parts.

Parts are what makes exact scoring cheap: the context needs no mask, and the sums over prefix, chunk and repeat,
which normalise the scores, come from the same kernels that compute the layer's output.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

KEY_BLOCK = 2048
ROW_BLOCK = 256
MOST_LOGITS = 4 * 2**20
"""Sizes of a block of logits where no fused kernel applies (16 MiB at most); they bound memory, not results."""

Visible = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""(query positions [B, n, 1], key positions [m]) -> which keys each query sees [B, n, m]."""


@dataclass(frozen=True)
class Part:
    """Output [1, H, n, D] over some keys and the log-sum-exp [1, H, n] (float32) of their logits."""

    output: torch.Tensor
    lse: torch.Tensor


Fused = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, float, bool], Part]


def merge(parts: list[Part], sinks: torch.Tensor | None = None) -> Part:
    """One part over the keys of all. ``sinks`` [H] are logits of learned sinks, which take weight and give no value.

    Raises ValueError for no parts.
    """
    if len(parts) == 1 and sinks is None:
        return parts[0]
    # a part's share of a row is exp(its log-sum-exp - that over all keys), [1, H, n]
    total = merge_lse([part.lse for part in parts], sinks)
    output: torch.Tensor | None = None
    for part in parts:
        weight = (part.lse - total).exp()[..., None]
        output = part.output.float() * weight if output is None else output.addcmul_(part.output.float(), weight)
    if output is None:
        raise ValueError("nothing to merge")
    return Part(output.to(parts[0].output.dtype), total)


def merge_lse(lses: list[torch.Tensor], sinks: torch.Tensor | None = None) -> torch.Tensor:
    """Log-sum-exp [1, H, n] over the keys of all parts and the learned sinks [H]."""
    total = torch.logsumexp(torch.stack(lses), dim=0) if len(lses) > 1 else lses[0]
    return total if sinks is None else torch.logaddexp(total, sinks.float()[None, :, None])


def blocked(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scaling: float,
    *,
    query_start: int,
    key_start: int,
    softcap: float | None = None,
    window: int | None = None,
) -> Part:
    """Causal attention by plain products in float32, for every case a fused kernel does not take.

    query [1, H, n, D] at positions query_start.., key and value [1, G, m, D] at positions key_start... A query
    sees keys at its own position and before it and, with a window, only the last ``window`` of them. Every row must
    see a key.
    """

    def in_window(row: torch.Tensor, column: torch.Tensor) -> torch.Tensor:
        return (column <= row) & (column > row - (window or 0))

    parts = []
    for first in range(0, query.shape[2], ROW_BLOCK):
        # a block of rows, and the keys that any of them sees
        rows = query[:, :, first : first + ROW_BLOCK]
        start, stop = query_start + first, query_start + first + rows.shape[2]
        seen = slice(max(0, start - window + 1 - key_start) if window else 0, stop - key_start)
        positions = torch.arange(start, stop, device=query.device)[None]
        visible = in_window if window else None
        begin = key_start + seen.start
        parts.append(
            merge(
                list(
                    over_keys(
                        rows, key[:, :, seen], value[:, :, seen], scaling, positions, begin, start, visible, softcap
                    )
                )
            )
        )
    return Part(torch.cat([p.output for p in parts], 2), torch.cat([p.lse for p in parts], 2))


def logits_of(query: torch.Tensor, key: torch.Tensor, scaling: float, softcap: float | None) -> torch.Tensor:
    """Logits [1, G, g * n, m] in float32 of query [1, G, g * n, D] and key [1, G, m, D]."""
    logits = torch.matmul(query.float(), key.float().transpose(-1, -2)).mul_(scaling)
    if softcap is not None:
        logits.div_(softcap).tanh_().mul_(softcap)
    return logits


def fold_groups(query: torch.Tensor, kv_heads: int) -> torch.Tensor:
    """[1, H, n, D] -> [1, G, g * n, D]: the query heads of a KV head become rows of one product."""
    _, heads, rows, size = query.shape
    return query.reshape(1, kv_heads, heads // kv_heads * rows, size)


def over_keys(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scaling: float,
    positions: torch.Tensor,
    key_start: int,
    lowest: int,
    sees: Visible | None,
    softcap: float | None,
) -> Iterator[Part]:
    """Attention by plain products, the keys taken in blocks so that few logits exist at once.

    query [B, H, n, D] at positions [B, n], none below ``lowest``; key and value [B or 1, G, m, D] at key_start.. .
    ``sees`` None is causal. A row that sees nothing of a block has weight 0 in the merge.
    """
    batch, heads, count, size = query.shape
    kv_heads = key.shape[1]
    shared = key.shape[0] == 1 and batch > 1
    folded = query.reshape(batch, kv_heads, -1, size)
    if shared:  # the rows of all sequences become rows of one product
        folded = folded.transpose(0, 1).reshape(1, kv_heads, -1, size)
    block = max(16, min(KEY_BLOCK, MOST_LOGITS // (batch * heads * count)))
    for start in range(0, key.shape[2], block):
        keys, values = key[:, :, start : start + block], value[:, :, start : start + block]
        first, stop = key_start + start, key_start + start + keys.shape[2]
        # logits of every row and key of the block, [B, H, n, block]
        logits = logits_of(folded, keys, scaling, softcap)
        if shared:
            logits = logits.view(kv_heads, batch, -1, stop - first).transpose(0, 1)
        logits = logits.reshape(batch, heads, count, stop - first)
        # hide keys that a row does not see; a block before every row needs no mask
        if sees is not None or stop > lowest + 1:
            seen = (sees or _causal)(positions[..., None], torch.arange(first, stop, device=query.device))
            logits.masked_fill_(~seen[:, None], -torch.inf)
        # softmax within the block, [B, G, g * n, block]; -1e30 keeps rows that see nothing free of NaN
        lse = logits.logsumexp(-1)
        weights = (logits - lse.clamp_min(-1e30)[..., None]).exp_().view(batch, kv_heads, -1, stop - first)
        if shared:
            weights = weights.transpose(0, 1).reshape(1, kv_heads, -1, stop - first)
        # weighted values, [B, H, n, D] in the end
        output = torch.matmul(weights, values.float())
        if shared:
            output = output.view(kv_heads, batch, -1, output.shape[-1]).transpose(0, 1)
        yield Part(output.reshape(batch, heads, count, -1).to(query.dtype), lse)


def _causal(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    return key <= query


def _fused_cpu(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float, causal: bool) -> Part:
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return Part(*kernel(query, key, value, 0.0, causal, attn_mask=None, scale=scaling))


def _fused_cuda(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float, causal: bool) -> Part:
    group = query.shape[1] // key.shape[1]
    if causal:
        key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
        folded = query
    else:
        folded = fold_groups(query, key.shape[1])
    if query.dtype == torch.float32:
        efficient = torch.ops.aten._scaled_dot_product_efficient_attention
        output, lse, *_ = efficient(folded, key, value, None, True, 0.0, causal, scale=scaling)
    else:
        flash = torch.ops.aten._scaled_dot_product_flash_attention
        output, lse, *_ = flash(folded, key, value, 0.0, causal, False, scale=scaling)
    lse = lse[..., : folded.shape[2]]
    return Part(output.reshape(*query.shape[:-1], -1), lse.reshape(query.shape[:-1]).float())


def choose_fused(device: torch.device, dtype: torch.dtype, head_size: int, group: int) -> tuple[Fused | None, str]:
    """A fused kernel that agrees with ``blocked`` on this device, dtype and shape, or None; and the reason.

    The kernels are torch's own and not part of its public interface, so each is tried on random numbers first.
    """
    kernel = {"cpu": _fused_cpu, "cuda": _fused_cuda}.get(device.type)
    if kernel is None:
        return None, f"plain products: no fused kernel known for {device.type}"
    generator = torch.Generator().manual_seed(0)

    def sample(heads: int, tokens: int) -> torch.Tensor:
        return torch.randn(1, heads, tokens, head_size, generator=generator).to(device, dtype)

    query, key, value = sample(2 * group, 48), sample(2, 48), sample(2, 48)
    tolerance = 1e-4 if dtype == torch.float32 else 4e-2
    scaling = head_size**-0.5
    try:
        # against plain products, once with the query's own keys (causal) and once with keys before it
        for causal in (True, False):
            start = 0 if causal else 48
            expected = blocked(query, key, value, scaling, query_start=start, key_start=0)
            found = kernel(query, key, value, scaling, causal)
            for ours, theirs in ((found.output, expected.output), (found.lse, expected.lse)):
                torch.testing.assert_close(ours.float(), theirs.float(), atol=tolerance, rtol=tolerance)
    except (RuntimeError, AssertionError, AttributeError, NotImplementedError, TypeError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        return None, f"plain products: torch's fused kernel does not serve this shape ({first})"
    return kernel, f"torch's fused kernel on {device.type}"
