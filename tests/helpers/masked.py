"""Budgets the naive way: one pass over everything with a boolean mask for each head, in float64, no cache.

Written from the semantics alone; it shares no code with kvprofile.evaluate.
"""

from __future__ import annotations

import copy

import torch
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface


def visible(query, key, sinks, recent, block, anchor=None):
    """Whether a trimmed head's query at a position sees a key: whole blocks, one token at a time."""
    if key > query:
        return False
    if key < -(-sinks // block) * block:
        return True
    first = query if anchor is None else min(query, anchor)
    return key // block >= (first + 1 - recent) // block


@torch.no_grad()
def logits(model, ids, context_tokens, heads, sinks, recent, block, window, choose=None, store=None):
    """Logits [len(ids), V] where the rows after the context obey the budget ``heads`` [L][G].

    ``choose`` gives the positions that a head keeps which keeps a part of the middle: of (layer, head, share, the
    context's keys and values [context_tokens, D]). ``store`` gives what becomes of keys and values in a cache.
    """
    anchor = context_tokens if window == "anchored" else None
    model = copy.deepcopy(model)
    if not any("experts" in name for name, _ in model.named_parameters()):
        model = model.double()  # torch multiplies grouped experts in float32 at most
    count = len(ids)
    causal = torch.ones(count, count, dtype=torch.bool).tril()
    trimmed = torch.tensor([[visible(i, j, sinks, recent, block, anchor) for j in range(count)] for i in range(count)])
    trimmed[:context_tokens] = causal[:context_tokens]

    def attend(module, query, key, value, _mask=None, scaling=None, softcap=None, sliding_window=None, s_aux=None, **_):
        group = query.shape[1] // key.shape[1]
        budget = heads[module.layer_idx]
        if store is not None:
            key, value = store(key), store(value)
        kept = {}
        for head, share in enumerate(budget):
            if share not in (0.0, 1.0, None):
                states = (tensor[0, head, :context_tokens] for tensor in (key, value))
                kept[head] = trimmed.clone()
                kept[head][context_tokens:, choose(module.layer_idx, head, share, *states)] = True
        key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
        weights = query @ key.mT * (scaling or query.shape[-1] ** -0.5)
        if softcap:
            weights = softcap * torch.tanh(weights / softcap)
        for head in range(query.shape[1]):
            allowed = trimmed if budget[head // group] == 0.0 else kept.get(head // group, causal)
            if sliding_window and budget[head // group] is None:
                distance = torch.arange(count)[:, None] - torch.arange(count)
                allowed = causal & (distance < sliding_window)
            weights[:, head] = weights[:, head].masked_fill(~allowed, -torch.inf)
        if s_aux is not None:
            column = s_aux.to(weights.dtype)[None, :, None, None].expand(1, -1, count, 1)
            weights = torch.cat([weights, column], -1).softmax(-1)[..., :-1]
        else:
            weights = weights.softmax(-1)
        return (weights.to(value.dtype) @ value).transpose(1, 2).contiguous(), None

    AttentionInterface.register("naive_masked", attend)
    AttentionMaskInterface.register("naive_masked", lambda *_, **__: None)
    model.set_attn_implementation("naive_masked")
    return model(torch.tensor([list(ids)]), use_cache=False).logits[0].float()
