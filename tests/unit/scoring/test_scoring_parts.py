"""Prompts, cache, kernels and statistics, each on its own."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvprofile.budget.profile import Geometry
from kvprofile.errors import InputError
from kvprofile.scoring import kernels
from kvprofile.scoring.aggregate import HeadStatistics, merge_documents
from kvprofile.scoring.attention import chunk_scores
from kvprofile.scoring.prompts import Frame, chat_frame, chunks, encode, frame_document, longest_repeat
from kvprofile.scoring.reconstruction_cache import ReconstructionCache

FRAME = Frame("p", "s", (1, 2), (3,), (10, 11), (20, 21, 22))


def test_first_chunk_asks_for_all_and_later_ones_quote_eight_tokens():
    document = frame_document("d", range(100, 125), FRAME)
    found = list(chunks(document, FRAME, 10))
    assert [(c.start, c.stop) for c in found] == [(0, 10), (10, 20), (20, 25)]
    assert found[0].repeat_ids == (10, 11, 3, *range(100, 110))
    assert found[1].repeat_ids == (20, 21, 22, *range(102, 110), 3, *range(110, 120))
    assert found[2].repeat_ids == (20, 21, 22, *range(112, 120), 3, *range(120, 125))
    assert max(len(c.repeat_ids) for c in found) <= longest_repeat(FRAME, 10)


def test_without_a_prefix_the_first_tokens_serve():
    bare = Frame("", "\n", (), (3,), (10,), (20,))
    document = frame_document("d", range(10), bare)
    assert document.prefix_ids == (0, 1, 2, 3)
    assert document.context_ids == (4, 5, 6, 7, 8, 9)


def test_template_is_rendered_with_a_fixed_date_and_without_thinking(tokenizer):
    template = (
        "{{ strftime_now('%Y') }}|{{ date_string }}|{{ enable_thinking }}|{% for m in messages %}{{ m['content'] }}"
        "{% endfor %}{% if add_generation_prompt %}>>{% endif %}"
    )
    kept = tokenizer.chat_template
    tokenizer.chat_template = template
    try:
        frame = chat_frame(tokenizer)
    finally:
        tokenizer.chat_template = kept
    assert frame.prefix == "2025|01 Jan 2025|False|"
    assert frame.suffix == ">>"
    assert frame.prefix_ids == encode(tokenizer, frame.prefix)


def test_bos_is_the_prefix_where_there_is_no_template(tokenizer):
    kept = tokenizer.chat_template
    tokenizer.chat_template, tokenizer.bos_token = None, "<|user|>"
    try:
        frame = chat_frame(tokenizer)
    finally:
        tokenizer.chat_template, tokenizer.bos_token = kept, None
    assert frame.prefix_ids == (1,)
    assert frame.suffix == "\n"


def test_cache_is_allocated_once_and_cut_back_without_copies():
    cache = ReconstructionCache(["full_attention"] * 2, capacity=20, window=None, step_tokens=8)
    key = torch.arange(8.0)[None, None, :, None].expand(1, 2, 8, 4)
    for _ in range(2):
        held, _ = cache.update(key, -key, 0)
    address = held.data_ptr()
    assert held.shape == (1, 2, 16, 4)
    cache.cut_back(10)
    held, values = cache.update(key[:, :, :3] + 100, -key[:, :, :3], 0)
    assert held.data_ptr() == address
    assert held[0, 0, :, 0].tolist() == [*range(8), 0, 1, 100, 101, 102]
    assert values.shape == held.shape
    assert cache.layers[0].allocations == 1
    cache.reset()
    assert cache.get_seq_length() == 0
    with pytest.raises(ValueError, match="cannot hold"):
        cache.update(torch.zeros(1, 2, 21, 4), torch.zeros(1, 2, 21, 4), 0)


@given(st.lists(st.integers(1, 9), min_size=1, max_size=8), st.integers(2, 6), st.integers(1, 9))
def test_sliding_layer_holds_what_a_new_token_may_see(steps, window, repeat):
    cache = ReconstructionCache(["sliding_attention"], capacity=1, window=window, step_tokens=9)
    layer = cache.layers[0]

    def positions(start, count):
        return torch.arange(float(start), start + count)[None, None, :, None]

    length = 0
    for count in steps:
        held, _ = cache.update(positions(length, count), positions(length, count), 0)
        first = int(held[0, 0, 0, 0])
        assert held[0, 0, :, 0].tolist() == list(range(first, length + count))
        assert first <= max(0, length - window + 1)
        length += count
    for _ in range(2):
        held, _ = cache.update(positions(length, repeat), positions(length, repeat), 0)
        assert held[0, 0, :, 0].tolist() == list(range(max(0, length - window + 1), length + repeat))
        layer.cut_back(length)
    assert layer.allocations == 1


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


def test_chunk_scores_are_the_largest_weight_over_rows_and_group():
    query, key = torch.randn(1, 4, 6, 8), torch.randn(1, 2, 5, 8)
    normaliser = torch.randn(1, 4, 6) + 4
    found = chunk_scores(query, key, normaliser, 0.3, None)
    weights = (query @ key.repeat_interleave(2, 1).transpose(-1, -2) * 0.3 - normaliser[..., None]).exp()
    expected = weights[0].amax(1).view(2, 2, 5).amax(1).clamp(max=1)
    torch.testing.assert_close(found, expected)


@given(st.lists(st.integers(1, 50), min_size=1, max_size=5), st.integers(0, 99))
def test_statistics_of_chunks_add_up(sizes, seed):
    generator = torch.Generator().manual_seed(seed)
    parts = [torch.rand(2, 3, size, generator=generator) ** 4 for size in sizes]
    total = HeadStatistics.of(parts[0])
    for part in parts[1:]:
        total = total + HeadStatistics.of(part)
    whole = torch.cat(parts, -1).double()
    torch.testing.assert_close(total.maximum.double(), whole.amax(-1))
    torch.testing.assert_close(total.mean(), whole.mean(-1))
    rank = math.ceil(0.99 * whole.shape[-1]) - 1
    exact = whole.sort(-1).values[..., rank].clamp_min(1e-9)
    torch.testing.assert_close(total.quantile(), exact, rtol=0.02, atol=1e-9)


def test_documents_are_merged_and_sliding_layers_left_null():
    geometry = Geometry(
        layers=2, attention_heads=2, kv_heads=2, head_size=4, layer_types=["sliding_attention", "full_attention"]
    )
    first = HeadStatistics.of(torch.tensor([[[0.2, 0.4], [0.1, 0.1]]]))
    second = HeadStatistics.of(torch.tensor([[[0.8, 0.0], [0.1, 0.3]]]))
    scores = merge_documents([first, second], geometry)
    assert scores.max == [[None, None], [0.8, 0.3]]
    assert scores.mean == [[None, None], [0.35, 0.15]]
    assert scores.spread == [[None, None], [0.2, 0.1]]
    assert merge_documents([first], geometry).spread is None


def test_a_model_cannot_be_scored_twice_at_once():
    from kvprofile.scoring.attention import recording
    from tests.helpers.models import random_model

    model = random_model("llama")
    geometry = Geometry(layers=3, attention_heads=4, kv_heads=2, head_size=16, layer_types=["full_attention"] * 3)
    with (
        recording(model, geometry),
        pytest.raises(RuntimeError, match="being scored already"),
        recording(model, geometry),
    ):
        pass


def test_a_config_that_lies_about_its_heads_is_refused(tokenizer):
    from kvprofile.scoring.attention import recording
    from kvprofile.scoring.reconstruction import Scorer
    from tests.helpers.models import random_model

    geometry = Geometry(layers=3, attention_heads=4, kv_heads=4, head_size=16, layer_types=["full_attention"] * 3)
    frame = chat_frame(tokenizer)
    model = random_model("llama")
    with recording(model, geometry) as recorder:
        scorer = Scorer(model, recorder, frame, document_tokens=40, chunk_tokens=16)
        with pytest.raises(InputError, match="layer 0 has 4 query heads and 2 KV heads of size 16"):
            list(scorer.score(frame_document("d", range(5, 25), frame)))
