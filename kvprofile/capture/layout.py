"""Where a backend keeps which number of a block, found by asking: numbered keys and values are written into a scratch
block by the backend's own code, and read back. So packed and transposed caches need no knowledge of their formats.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from kvprofile.budget.float8 import Float8, of_cache

_BASE, _FLOAT8_BASE = 256, 8
"""Numbers are written digit by digit; all dtypes of caches hold whole numbers up to here exactly."""

_ABOVE = 1 + 2**-6
"""What digits are multiplied with for 8-bit floats, so that none falls below its number where that is rounded down."""


@dataclass(frozen=True)
class Layout:
    """Places of a head's keys and values in its part of a block, [block_tokens * D] each.

    What stands there is given and taken as it is stored; where that is ``float8``, ``numbers`` reads it.
    """

    block_tokens: int
    head_size: int
    key_places: torch.Tensor
    value_places: torch.Tensor
    float8: Float8 | None = None
    scales: tuple[float, float] = (1.0, 1.0)
    """Of stored keys and values."""

    def numbers(self, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values as numbers, from what is stored of them."""
        if self.float8 is None:
            return keys, values
        keys, values = (self.float8.read(each, scale) for each, scale in zip((keys, values), self.scales, strict=True))
        return keys, values

    def keys(self, cache: torch.Tensor, table: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        """Keys [G, stop - start, D] of a request's positions; ``table`` [blocks] are the request's blocks."""
        return self._gather(cache, table, start, stop, self.key_places)

    def values(self, cache: torch.Tensor, table: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        """Values, as ``keys``."""
        return self._gather(cache, table, start, stop, self.value_places)

    def whole_blocks(self, cache: torch.Tensor, blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values [G, b, block_tokens, D] of ``blocks`` [b], whatever requests they belong to.

        They lie in memory as in the cache.
        """
        content = cache.index_select(0, blocks).flatten(2)
        keys, values = (self._tokens(content, places) for places in (self.key_places, self.value_places))
        return keys, values

    def write(self, cache: torch.Tensor, blocks: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Fill ``blocks`` [b] with keys and values [G, b * block_tokens, D], token by token."""
        count, heads = len(blocks), cache.shape[1]
        content = cache.new_empty(count, heads, self.key_places.numel() + self.value_places.numel())
        for tensor, places in ((keys, self.key_places), (values, self.value_places)):
            tokens = tensor.view(heads, count, self.block_tokens, self.head_size).transpose(0, 1)
            view = self._view(content, places)
            if view is not None:
                view.copy_(tokens)
            else:
                content[:, :, places] = tokens.flatten(2)
        cache.index_copy_(0, blocks, content.view(count, *cache.shape[1:]))

    def _gather(
        self, cache: torch.Tensor, table: torch.Tensor, start: int, stop: int, places: torch.Tensor
    ) -> torch.Tensor:
        first, last = start // self.block_tokens, -(-stop // self.block_tokens)
        found = self._tokens(cache.index_select(0, table[first:last].to(torch.int64)).flatten(2), places).flatten(1, 2)
        return found[:, start - first * self.block_tokens : stop - first * self.block_tokens]

    def _tokens(self, content: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        """[G, b, block_tokens, D] from the numbers of each block and head, content [b, G, numbers]."""
        found = self._view(content, places)
        if found is None:
            found = content.index_select(2, places).view(*content.shape[:2], self.block_tokens, self.head_size)
        return found.transpose(0, 1)

    def _view(self, content: torch.Tensor, places: torch.Tensor) -> torch.Tensor | None:
        """Of contiguous content [b, G, numbers] the part at ``places``, [b, G, block_tokens, D], if that is a view."""
        strides = self.key_strides if places is self.key_places else self.value_strides
        if strides is None:
            return None
        first, *steps = strides
        size = (*content.shape[:2], self.block_tokens, self.head_size)
        return content.as_strided(size, (content.stride(0), content.stride(1), *steps), first)

    @cached_property
    def key_strides(self) -> tuple[int, int, int] | None:
        """The place of the first key, and how far places are apart from token to token and from dimension to dimension.

        None where a step is not the same everywhere, as in packed caches.
        """
        return self._strides(self.key_places)

    @cached_property
    def value_strides(self) -> tuple[int, int, int] | None:
        """As ``key_strides``."""
        return self._strides(self.value_places)

    def _strides(self, places: torch.Tensor) -> tuple[int, int, int] | None:
        table = places.view(self.block_tokens, self.head_size).cpu()
        first = int(table[0, 0])
        token = int(table[1, 0]) - first if self.block_tokens > 1 else 0
        dimension = int(table[0, 1]) - first if self.head_size > 1 else 0
        tokens, dimensions = torch.arange(self.block_tokens), torch.arange(self.head_size)
        if min(token, dimension) < 0:
            return None
        even = first + token * tokens[:, None] + dimension * dimensions
        return (first, token, dimension) if torch.equal(table, even) else None


def probe(layer: Any, cache: torch.Tensor, dtype: torch.dtype) -> Layout:
    """The layout of an attention layer's cache [blocks, G, block_tokens, 2 * D]; ``dtype`` is the model's.

    Raises ValueError where the backend writes caches in a way that cannot be followed.
    """
    name = layer.attn_backend.get_name()
    if layer.attn_backend.forward_includes_kv_cache_update or not hasattr(layer.impl, "do_kv_cache_update"):
        raise ValueError(f"attention backend {name} writes its cache inside its kernel")
    if cache.dim() != 4 or cache.shape[3] != 2 * layer.head_size:
        raise ValueError(f"attention backend {name} keeps caches of shape {tuple(cache.shape)}")
    _, heads, block_tokens, _ = cache.shape
    count = block_tokens * layer.head_size
    float8 = of_cache(layer.kv_cache_dtype)
    base, scales, above = _BASE, (1.0, 1.0), 1.0
    if float8 is not None:
        base, scales, above = _FLOAT8_BASE, (layer._k_scale_float, layer._v_scale_float), _ABOVE
    # number i < count belongs to a key, token i // D, dimension i % D; i + count to the value of the same place
    numbers = torch.arange(2 * count, device=cache.device)
    scratch = torch.empty_strided((1, *cache.shape[1:]), cache.stride(), dtype=cache.dtype, device=cache.device)
    slots = torch.arange(block_tokens, device=cache.device)
    found = torch.zeros(heads, 2 * count, dtype=torch.int64, device=cache.device)
    weight = 1
    # the backend writes the numbers into a scratch block, one digit at a time; read back, the digits add up to which
    # number stands in which place: found [G, 2 * count]
    while weight < 2 * count:
        digits = (numbers // weight % base).to(dtype).view(2, block_tokens, 1, layer.head_size)
        key, value = digits.expand(2, block_tokens, heads, layer.head_size).contiguous()
        layer.impl.do_kv_cache_update(layer, key * (scales[0] * above), value * (scales[1] * above), scratch, slots)
        content = scratch[0].flatten(1)
        read = content if float8 is None else float8.read(content)
        found += read.to(torch.int64) * weight
        weight *= base
    # the inverse: where each number stands, the same for every head
    places = found[0].argsort()
    if not torch.equal(found[0][places], numbers) or not (found == found[0]).all():
        raise ValueError(f"attention backend {name} does not keep each number of a block in a place of its own")
    return Layout(block_tokens, layer.head_size, places[:count], places[count:], float8, scales)
