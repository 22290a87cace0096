"""KVzip's scores the naive way: whole attention matrices from eager attention, one pass for each chunk, no cache.

Written from the definition alone; it shares no code with kvprofile.scoring.
"""

from __future__ import annotations

import copy
from unittest import mock

import torch


def split_template(tokenizer):
    if tokenizer.chat_template is None:
        return "", "\n"
    message = [{"role": "user", "content": "@@@"}]
    text = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
    before, after = text.split("@@@")
    return before, after


def ids_of(tokenizer, text):
    return tokenizer.encode(text, add_special_tokens=False)


@torch.no_grad()
def token_scores(model, tokenizer, text_ids, chunk_tokens, learned_sinks=False):
    """Token scores [L, G, T] of every layer, and the number of prefix tokens."""
    model = copy.deepcopy(model)
    if not any("experts" in name for name, _ in model.named_parameters()):
        model = model.double()  # torch multiplies grouped experts in float32 at most
    before, after = split_template(tokenizer)
    context = list(text_ids)
    prefix = ids_of(tokenizer, before)
    if not prefix and tokenizer.bos_token_id is not None:
        prefix = [tokenizer.bos_token_id]
    if not prefix:
        prefix, context = context[:4], context[4:]
    suffix = ids_of(tokenizer, after)
    columns = []
    for a in range(0, len(context), chunk_tokens):
        b = min(a + chunk_tokens, len(context))
        if a == 0:
            ask = ids_of(tokenizer, "\n\nRepeat the previous context exactly.")
        else:
            ask = ids_of(tokenizer, "\n\nRepeat the part of the previous context exactly, starting with ")
            ask = ask + context[max(0, a - 8) : a]
        repeat = ask + suffix + context[a:b]
        everything = torch.tensor([prefix + context + repeat])
        with mock.patch("torch.nn.functional.softmax", _exact_softmax):
            attentions = model(everything, output_attentions=True, use_cache=False).attentions
        columns.append([_chunk(w[0], model, len(prefix), len(context), a, b, learned_sinks) for w in attentions])
    return torch.stack([torch.cat([c[layer] for c in columns], -1) for layer in range(len(columns[0]))]), len(prefix)


def _exact_softmax(logits, dim=-1, **_):
    """Eager attention rounds its weights to float32, where the share of a chunk can vanish; this one does not."""
    return torch.softmax(logits.double(), dim)


def _chunk(weights, model, p, t, a, b, learned_sinks):
    heads = weights.shape[0]
    rows = weights[:, p + t :]
    kept = torch.cat([rows[..., :p], rows[..., p + a : p + b], rows[..., p + t :]], -1)
    denominator = kept.sum(-1, keepdim=True)
    if learned_sinks:
        denominator = denominator + (1.0 - rows.sum(-1, keepdim=True))
    chunk = rows[..., p + a : p + b] / denominator
    best = chunk.amax(1)
    kv_heads = model.config.num_key_value_heads
    return best.view(kv_heads, heads // kv_heads, -1).amax(1)
