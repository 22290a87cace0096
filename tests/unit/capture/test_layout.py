"""Where a backend keeps keys and values of a cache, found by asking it to write."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from kvprofile.capture import layout


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


class Packed(Straight):
    """Numbers of a block in pairs of dimensions, so that no step from one to the next is the same everywhere."""

    order = torch.tensor([0, 5, 1, 4, 2, 3]).repeat(4) + torch.arange(4).repeat_interleave(6) * 6

    def do_kv_cache_update(self, _layer, key, value, cache, slots):
        for row, slot in enumerate(slots.tolist()):
            block = cache[slot // 4].view(2, 24)
            block[:, self.order[slot % 4 * 6 : slot % 4 * 6 + 6]] = torch.cat([key[row], value[row]], -1)


class Forgetful(Straight):
    def do_kv_cache_update(self, _layer, key, value, cache, slots):
        super().do_kv_cache_update(_layer, key * 0, value, cache, slots)


class Inside(Straight):
    forward_includes_kv_cache_update = True


class Rounding(Packed):
    """A cache of 8-bit floats with a scale for keys and another for values."""

    def do_kv_cache_update(self, layer, key, value, cache, slots):
        stored = [
            (numbers.float() / scale).to(torch.float8_e5m2).view(torch.uint8)
            for numbers, scale in ((key, layer._k_scale_float), (value, layer._v_scale_float))
        ]
        super().do_kv_cache_update(layer, *stored, cache, slots)


def toy_layer(backend):
    return SimpleNamespace(head_size=3, attn_backend=backend(), impl=backend(), kv_cache_dtype="auto")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_caches_of_8_bit_floats_are_read_as_numbers_and_moved_as_they_are(dtype):
    layer, cache = toy_layer(Rounding), torch.zeros(5, 2, 4, 6, dtype=torch.uint8)
    layer.kv_cache_dtype, layer._k_scale_float, layer._v_scale_float = "fp8_e5m2", 0.037, 1.9
    found = layout.probe(layer, cache, dtype)
    keys, values = torch.randn(2, 4, 2, 3).to(dtype)
    layer.impl.do_kv_cache_update(layer, keys, values, cache, torch.arange(8, 12))
    stored = found.whole_blocks(cache, torch.tensor([2]))
    for numbers, given in zip(found.numbers(*stored), (keys, values), strict=True):
        assert torch.allclose(numbers[:, 0], given.transpose(0, 1).float(), rtol=0.13, atol=1e-5)
    found.write(cache, torch.tensor([0]), *(each.flatten(1, 2) for each in stored))
    assert torch.equal(cache[0], cache[2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_layouts_are_found_by_asking(dtype):
    for backend in (Straight, Transposed, Packed):
        cache = torch.zeros(5, 2, 4, 6, dtype=dtype)
        layer = toy_layer(backend)
        found = layout.probe(layer, cache, cache.dtype)
        assert not cache.any(), "the cache itself was written"
        keys, values = torch.randn(2, 11, 2, 3).to(dtype)
        table = torch.tensor([3, 1, 4])
        slots = torch.tensor([table[i // 4] * 4 + i % 4 for i in range(11)])
        layer.impl.do_kv_cache_update(layer, keys, values, cache, slots)
        for start, stop in ((0, 11), (3, 9), (4, 8), (10, 11)):
            assert torch.equal(found.keys(cache, table, start, stop), keys[start:stop].transpose(0, 1))
            assert torch.equal(found.values(cache, table, start, stop), values[start:stop].transpose(0, 1))


@pytest.mark.parametrize("backend", [Straight, Transposed, Packed])
def test_blocks_are_written_as_the_backend_writes_them(backend):
    """Evenly laid out blocks through views, packed ones through a table of places; other blocks are left alone."""
    layer, cache = toy_layer(backend), torch.randn(5, 2, 4, 6)
    found = layout.probe(layer, cache, cache.dtype)
    assert (found.key_strides is None) == (found.value_strides is None) == (backend is Packed)
    keys, values = torch.randn(2, 2, 8, 3)
    blocks, expected = torch.tensor([4, 1]), cache.clone()
    slots = torch.tensor([block * 4 + place for block in (4, 1) for place in range(4)])
    layer.impl.do_kv_cache_update(layer, keys.transpose(0, 1), values.transpose(0, 1), expected, slots)
    found.write(cache, blocks, keys, values)
    assert torch.equal(cache, expected)
    for read, given in zip(found.whole_blocks(cache, blocks), (keys, values), strict=True):
        assert torch.equal(read, given.view(2, 2, 4, 3))


@pytest.mark.parametrize(("backend", "reason"), [(Forgetful, "a place of its own"), (Inside, "inside its kernel")])
def test_layouts_that_cannot_be_followed_are_refused(backend, reason):
    with pytest.raises(ValueError, match=reason):
        layout.probe(toy_layer(backend), torch.zeros(5, 2, 4, 6), torch.float32)


def test_large_blocks_need_several_digits():
    class Large(Straight):
        def do_kv_cache_update(self, _layer, key, value, cache, slots):
            cache[0, :, slots] = torch.cat([key, value], -1).transpose(0, 1)

    cache = torch.zeros(2, 2, 256, 512, dtype=torch.bfloat16)
    layer = SimpleNamespace(head_size=256, attn_backend=Large(), impl=Large(), kv_cache_dtype="auto")
    found = layout.probe(layer, cache, cache.dtype)
    assert torch.equal(found.key_places.view(256, 256)[:, 0], torch.arange(256) * 512)
