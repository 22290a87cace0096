"""Arguments that are passed on to vLLM."""

from __future__ import annotations

import pytest

from kvprofile.errors import InputError
from kvprofile.scoring import vllm_argument
from kvprofile.scoring.vllm_engine import _OURS


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
def test_arguments_of_vllm_are_read_as_json_or_text(text, expected):
    assert vllm_argument.parse(text, _OURS, "a=1") == expected


@pytest.mark.parametrize(
    ("text", "words"),
    [("block_size", "NAME=VALUE"), ("=3", "NAME=VALUE"), ("a b=3", "NAME=VALUE"), ("dtype=float16", "sets it itself")],
)
def test_arguments_that_are_refused(text, words):
    with pytest.raises(InputError, match=words):
        vllm_argument.parse(text, _OURS, "a=1")
