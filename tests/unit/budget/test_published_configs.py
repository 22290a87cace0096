"""The cache of published models, read from the numbers of their config.json: a table in tests/data.

Each entry names the model, where its numbers were read, and what they mean: bytes of a token in 16 bits, layers with a
cache, those of them with full attention, heads, a cache dtype that the checkpoint asks for, or why it is refused.
Lists with an entry for each layer are written as one letter each.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from kvprofile.budget.capacity import kv_bytes_per_token
from kvprofile.budget.dtypes import CACHE_DTYPES
from kvprofile.budget.model_shape import shape_of_config
from kvprofile.errors import InputError
from tests.helpers.models import ROOT

TABLE = json.loads((ROOT / "tests" / "data" / "published-configs.json").read_text(encoding="utf-8"))
LETTERS = {
    "F": "full_attention", "S": "sliding_attention", "L": "linear_attention", "C": "conv", "M": "mamba",
    "A": "attention", "E": "moe", "P": "mlp", "H": "hybrid", "K": "chunked_attention", "X": "minimax_m3_sparse",
}  # fmt: skip


def as_published(config: dict[str, Any]) -> dict[str, Any]:
    """The config with its lists written out."""
    found = {}
    for key, value in config.items():
        if isinstance(value, dict):
            found[key] = as_published(value)
        elif key in ("layer_types", "layers_block_type") and isinstance(value, str):
            found[key] = [LETTERS[letter] for letter in value]
        elif key in ("attn_type_list", "hybrid_layer_pattern") and isinstance(value, str):
            found[key] = [int(digit) for digit in value]
        elif key == "block_configs":
            found[key] = [{"attention": {"no_op": each is None, "n_heads_in_group": each}} for each in value]
        else:
            found[key] = value
    return found


@pytest.mark.parametrize("entry", TABLE, ids=[entry["model"] for entry in TABLE])
def test_a_published_config_is_counted_or_refused_as_it_is(entry, tmp_path: Path):
    file = tmp_path / "config.json"
    file.write_text(json.dumps(as_published(entry["config"])), encoding="utf-8")
    if "quantisation" in entry:
        (tmp_path / "hf_quant_config.json").write_text(json.dumps(entry["quantisation"]), encoding="utf-8")
    if "refused" in entry:
        with pytest.raises(InputError, match=entry["refused"]):
            shape_of_config(file, entry["model"])
        return
    shape = shape_of_config(file, entry["model"])
    geometry = shape.geometry
    assert kv_bytes_per_token(shape.layers, CACHE_DTYPES["bfloat16"]) == entry["bytes"]
    assert [geometry.layers, len(geometry.cached_layers), len(geometry.profiled_layers)] == entry["layers"]
    assert [geometry.attention_heads, geometry.kv_heads, geometry.head_size] == entry["heads"]
    assert (shape.window_tokens, shape.cache_dtype) == (entry.get("window"), entry.get("cache"))


def test_the_table_is_large_and_says_where_it_comes_from():
    assert len(TABLE) >= 90
    assert len({entry["model"] for entry in TABLE}) == len(TABLE)
    assert all(entry["source"].count("@") == 1 or entry["source"].startswith("https://") for entry in TABLE)
    assert sum("refused" in entry for entry in TABLE) >= 15
