"""Attention in blocks is softmax, parts merge into the whole, and a fused kernel is tried before it is used."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvprofile.scoring import kernels


@settings(deadline=None)
@given(
    st.integers(1, 40), st.integers(0, 50), st.sampled_from([None, 5]), st.sampled_from([None, 7]), st.integers(0, 99)
)
def test_blocked_attention_equals_softmax(rows, before, softcap, window, seed):
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(1, 4, rows, 8, generator=generator)
    key, value = (torch.randn(1, 2, before + rows, 8, generator=generator) for _ in range(2))
    found = kernels.blocked(query, key, value, 0.5, query_start=before, key_start=0, softcap=softcap, window=window)
    logits = query @ key.repeat_interleave(2, 1).transpose(-1, -2) * 0.5
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    i, j = torch.arange(before, before + rows)[:, None], torch.arange(before + rows)[None]
    hidden = (j > i) | ((j <= i - window) if window else torch.zeros_like(j > i))
    logits = logits.masked_fill(hidden, -torch.inf)
    expected = logits.softmax(-1) @ value.repeat_interleave(2, 1)
    torch.testing.assert_close(found.output, expected, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(found.lse, logits.logsumexp(-1), atol=1e-5, rtol=1e-4)


@given(st.integers(1, 12), st.integers(1, 12), st.integers(0, 99))
def test_merged_parts_equal_the_whole(left, right, seed):
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(1, 2, 3, 8, generator=generator)
    key, value = (torch.randn(1, 2, left + right, 8, generator=generator) for _ in range(2))
    sinks = torch.randn(2, generator=generator)

    def part(first, stop):
        return kernels.blocked(
            query, key[:, :, first:stop], value[:, :, first:stop], 1.0, query_start=99, key_start=first
        )

    merged = kernels.merge([part(0, left), part(left, left + right)], sinks)
    logits = torch.cat([query @ key.transpose(-1, -2), sinks[None, :, None, None].expand(1, 2, 3, 1)], -1)
    torch.testing.assert_close(merged.output, logits.softmax(-1)[..., :-1] @ value, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(merged.lse, logits.logsumexp(-1), atol=1e-5, rtol=1e-4)


def test_fused_kernel_is_tried_before_it_is_trusted(monkeypatch):
    assert kernels.choose_fused(torch.device("cpu"), torch.float32, 32, 2)[0] is not None
    monkeypatch.setattr(kernels, "_fused_cpu", lambda query, *_: kernels.Part(query * 0, query[..., 0] * 0))
    kernel, reason = kernels.choose_fused(torch.device("cpu"), torch.float32, 32, 2)
    assert kernel is None
    assert "plain products" in reason
