"""Data types by name, and the bytes a value takes in each: the one table for weights, caches and plans."""

from __future__ import annotations

from kvprofile.errors import InputError

MODEL_DTYPES: dict[str, int] = {"float32": 4, "bfloat16": 2, "float16": 2}
"""Bytes of a value for each dtype that a model is loaded in."""

CACHE_DTYPES: dict[str, float] = {**MODEL_DTYPES, "fp8": 1, "nvfp4": 0.5625}
"""Bytes of a cached value. nvfp4 packs two values into a byte and adds one byte of scale for 16 of them, as vLLM's
``nvfp4_kv_cache_full_dim`` counts."""

CACHE_DTYPE_NAMES = {
    "fp32": "float32", "float": "float32", "bf16": "bfloat16", "fp16": "float16", "half": "float16",
    "fp8_e4m3": "fp8", "fp8_e5m2": "fp8",
}  # fmt: skip
"""Other names of cache dtypes."""

FLOAT8_NAMES = ("fp8", "fp8_e4m3", "fp8_e5m2")
"""vLLM's ``kv_cache_dtype`` of caches that store one 8-bit float for each number."""

PLAIN = "auto"
"""vLLM's ``kv_cache_dtype`` of a cache that stores numbers as the model makes them."""

KV_CACHE_DTYPES = (PLAIN, *FLOAT8_NAMES)
"""Of caches that are served and compared with budgets, as vLLM calls them."""


def require_kv_cache_dtype(name: str) -> None:
    """Raise InputError for a cache that budgets are not compared in."""
    if name not in KV_CACHE_DTYPES:
        raise InputError(f"--kv-cache-dtype is {', '.join(KV_CACHE_DTYPES)}, not {name!r}")


def value_bytes(cache: str | None, dtype: str) -> int:
    """Bytes of a cached value of a model that computes in ``dtype``, 2 where that is not known."""
    return 1 if cache in FLOAT8_NAMES else MODEL_DTYPES.get(dtype, 2)
