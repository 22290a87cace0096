"""The parts of looking into vLLM that need no engine: weights of rows, layouts of blocks, marks, merging of ranks."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvprofile.capture import layout, rows
from kvprofile.capture.marks import Mark
from kvprofile.capture.merge import merge
from kvprofile.client import VLLMClient
from kvprofile.errors import InputError
from kvprofile.scoring import engine
from kvprofile.scoring.vllm_engine import _argument


def naive_weights(query, keys, scored, visible, scaling, softcap=None, sinks=None):
    """One row, one head at a time."""
    count, heads, _ = query.shape
    group = heads // len(keys)
    best = torch.zeros(len(keys), scored.stop - scored.start, dtype=torch.float64)
    for head in range(heads):
        for row in range(count):
            logits = keys[head // group, : visible + row].double() @ query[row, head].double() * scaling
            if softcap:
                logits = softcap * torch.tanh(logits / softcap)
            if sinks is not None:
                logits = torch.cat([logits, sinks[head : head + 1].double()])
            weights = logits.softmax(0)[scored]
            best[head // group] = torch.maximum(best[head // group], weights)
    return best


@pytest.mark.parametrize("most", [rows.MOST_LOGITS, 200])
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("sinks", [False, True])
def test_largest_weights(most, softcap, sinks, monkeypatch):
    monkeypatch.setattr(rows, "MOST_LOGITS", most)
    generator = torch.Generator().manual_seed(3)
    query = torch.randn(11, 6, 8, generator=generator) * 3
    keys = torch.randn(2, 25, 8, generator=generator)
    learned = torch.randn(6, generator=generator) * 4 if sinks else None
    found = rows.largest_weights(query, keys, slice(4, 12), 15, 0.5, softcap, learned)
    expected = naive_weights(query, keys, slice(4, 12), 15, 0.5, softcap, learned)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, atol=1e-6, rtol=1e-5)


def test_rows_do_not_see_later_keys():
    query, keys = torch.ones(2, 1, 4), torch.ones(1, 6, 4)
    keys[0, 5] = 100.0  # the second row alone sees it
    first = rows.largest_weights(query[:1], keys[:, :5], slice(0, 3), 5, 1.0)
    torch.testing.assert_close(first, torch.full((1, 3), 0.2))
    torch.testing.assert_close(rows.largest_weights(query, keys, slice(0, 3), 5, 1.0), first)


def test_numbers_that_are_none_stay_visible():
    query, keys = torch.ones(2, 1, 4), torch.ones(1, 6, 4)
    keys[0, 1] = torch.nan
    assert rows.largest_weights(query, keys, slice(0, 3), 5, 1.0).isnan().any()


def test_summaries():
    states = torch.tensor([[[3.0, 4.0], [0.0, 1.0]]])
    found = rows.summarise(states.to(torch.bfloat16))
    assert found["mean"].tolist() == [[1.5, 2.5]]
    assert [found[f"norm_{name}"].item() for name in ("mean", "std", "min", "max")] == [3.0, 2.0, 1.0, 5.0]


class Straight:
    """A backend with keys and values side by side, in blocks of 4 tokens for 2 heads of size 3."""

    forward_includes_kv_cache_update = False

    def get_name(self):
        return "STRAIGHT"

    def do_kv_cache_update(self, _layer, key, value, cache, slots):
        for row, slot in enumerate(slots.tolist()):
            cache[slot // 4, :, slot % 4] = torch.cat([key[row], value[row]], -1)


class Transposed(Straight):
    """Keys of a block transposed, values behind them."""

    def do_kv_cache_update(self, _layer, key, value, cache, slots):
        for row, slot in enumerate(slots.tolist()):
            place = cache[slot // 4].view(2, 24)
            place[:, torch.arange(3) * 4 + slot % 4] = key[row]
            place[:, 12 + slot % 4 * 3 : 15 + slot % 4 * 3] = value[row]


class Forgetful(Straight):
    def do_kv_cache_update(self, _layer, key, value, cache, slots):
        super().do_kv_cache_update(_layer, key * 0, value, cache, slots)


class Inside(Straight):
    forward_includes_kv_cache_update = True


def toy_layer(backend):
    return SimpleNamespace(head_size=3, attn_backend=backend(), impl=backend())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_layouts_are_found_by_asking(dtype):
    for backend in (Straight, Transposed):
        cache = torch.zeros(5, 2, 4, 6, dtype=dtype)
        layer = toy_layer(backend)
        found = layout.probe(layer, cache)
        assert not cache.any(), "the cache itself was written"
        keys, values = torch.randn(2, 11, 2, 3).to(dtype)
        table = torch.tensor([3, 1, 4])
        slots = torch.tensor([table[i // 4] * 4 + i % 4 for i in range(11)])
        layer.impl.do_kv_cache_update(layer, keys, values, cache, slots)
        for start, stop in ((0, 11), (3, 9), (4, 8), (10, 11)):
            assert torch.equal(found.keys(cache, table, start, stop), keys[start:stop].transpose(0, 1))
            assert torch.equal(found.values(cache, table, start, stop), values[start:stop].transpose(0, 1))


@pytest.mark.parametrize(("backend", "reason"), [(Forgetful, "a place of its own"), (Inside, "inside its kernel")])
def test_layouts_that_cannot_be_followed(backend, reason):
    with pytest.raises(ValueError, match=reason):
        layout.probe(toy_layer(backend), torch.zeros(5, 2, 4, 6))


def test_large_blocks_need_several_digits():
    class Large(Straight):
        def do_kv_cache_update(self, _layer, key, value, cache, slots):
            cache[0, :, slots] = torch.cat([key, value], -1).transpose(0, 1)

    cache = torch.zeros(2, 2, 256, 512, dtype=torch.bfloat16)
    layer = SimpleNamespace(head_size=256, attn_backend=Large(), impl=Large())
    found = layout.probe(layer, cache)
    assert torch.equal(found.key_places.view(256, 256)[:, 0], torch.arange(256) * 512)


@given(st.text(), st.integers(0, 2**40), st.integers(0, 2**20), st.none() | st.tuples(st.integers(0), st.integers(0)))
def test_marks_cross_processes(key, context, prefix, chunk):
    mark = Mark(key, context, prefix, chunk)
    carried = json.loads(json.dumps(mark.as_extra_args()))
    assert Mark.of(SimpleNamespace(extra_args={**carried, "other": 1})) == mark
    for unmarked in (None, SimpleNamespace(extra_args=None), SimpleNamespace(extra_args={"other": 1})):
        assert Mark.of(unmarked) is None


def part(first_head, layers, kv_heads=4, covered=((0, 5),), problems=()):
    notes = {"first_head": first_head, "kv_heads": kv_heads, "covered": covered, "problems": problems}
    tensors = {f"{index}.scores": torch.tensor(values) for index, values in layers.items()}
    return safetensors.torch.save(tensors, metadata={"kvprofile": json.dumps(notes)})


def test_ranks_bring_heads_and_stages_bring_layers():
    found = merge(
        [
            part(0, {0: [[0.1], [0.2]]}),
            part(2, {0: [[0.3], [0.4]]}),
            part(0, {7: [[0.5], [0.6]]}),
            part(2, {7: [[0.7], [0.8]]}),
        ]
    )
    torch.testing.assert_close(found.layers[0]["scores"], torch.tensor([[0.1], [0.2], [0.3], [0.4]]))
    torch.testing.assert_close(found.layers[7]["scores"], torch.tensor([[0.5], [0.6], [0.7], [0.8]]))
    assert found.problems == []


def test_copies_of_a_head_have_different_queries():
    found = merge([part(0, {0: [[0.1, 0.9]]}, kv_heads=1), part(0, {0: [[0.4, 0.2]]}, kv_heads=1)])
    torch.testing.assert_close(found.layers[0]["scores"], torch.tensor([[0.4, 0.9]]))


def test_ranks_that_disagree_are_a_problem():
    found = merge([part(0, {}), part(2, {}, covered=((0, 4),), problems=("x",)), part(0, {}, problems=("x",))])
    assert found.problems == ["x", "ranks computed different rows"]


@pytest.mark.parametrize(
    ("covered", "missing"),
    [
        ([(0, 9)], False),
        ([(4, 9)], False),
        ([(5, 9)], True),
        ([(0, 6), (6, 9)], False),
        ([(6, 9), (2, 6)], False),
        ([(0, 6), (7, 9)], True),
        ([(0, 8)], True),
        ([], True),
    ],
)
def test_rows_that_were_never_computed(covered, missing):
    found = merge([part(0, {}, covered=covered)])
    assert found.missing(4, 9) is missing


def description(**config):
    return SimpleNamespace(config=SimpleNamespace(**config))


INT8 = {"quant_method": "compressed-tensors"}


@pytest.mark.parametrize(
    ("asked", "config", "method", "installed", "expected", "words"),
    [
        ("auto", {}, "kvzip", True, "hf", "exact on any machine"),
        ("auto", {"quantization_config": INT8}, "kvzip", True, "vllm", "quantised (compressed-tensors)"),
        ("auto", {"quantization_config": INT8}, "kvzip", False, "hf", "vLLM is not installed here"),
        ("auto", {"quantization_config": INT8}, "gate", True, "hf", "--method gate needs gradients"),
        ("hf", {"quantization_config": INT8}, "kvzip", True, "hf", "asked for"),
        ("vllm", {}, "kvzip-mean", True, "vllm", "asked for"),
    ],
)
def test_the_engine_is_chosen_with_a_reason(asked, config, method, installed, expected, words, monkeypatch):
    monkeypatch.setattr(engine, "vllm_is_installed", lambda: installed)
    chosen, reason = engine.choose_engine(asked, description(**config), method)
    assert chosen == expected
    assert words in reason


@pytest.mark.parametrize(
    ("asked", "method", "installed", "words"),
    [
        ("tgi", "kvzip", True, "known: auto, hf, vllm"),
        ("vllm", "gate", True, "--method gate needs gradients"),
        ("vllm", "kvzip", False, "not installed here"),
    ],
)
def test_engines_that_cannot_be(asked, method, installed, words, monkeypatch):
    monkeypatch.setattr(engine, "vllm_is_installed", lambda: installed)
    with pytest.raises(InputError, match=words):
        engine.choose_engine(asked, description(), method)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("block_size=64", ("block_size", 64)),
        ("--quantization=awq", ("quantization", "awq")),
        ("max-num-batched-tokens=2048", ("max_num_batched_tokens", 2048)),
        ('hf_overrides={"a": [1, true]}', ("hf_overrides", {"a": [1, True]})),
        ("enforce_eager=false", ("enforce_eager", False)),
    ],
)
def test_arguments_of_vllm(text, expected):
    assert _argument(text) == expected


@pytest.mark.parametrize(
    ("text", "words"),
    [("block_size", "NAME=VALUE"), ("=3", "NAME=VALUE"), ("a b=3", "NAME=VALUE"), ("dtype=float16", "sets it itself")],
)
def test_arguments_that_are_none(text, words):
    with pytest.raises(InputError, match=words):
        _argument(text)


@pytest.mark.loopback
def test_a_server_is_not_looked_into():
    with VLLMClient("m", url="http://127.0.0.1:9") as client, pytest.raises(InputError, match="is a server"):
        client.capture_prompt("text")
