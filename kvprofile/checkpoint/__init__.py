"""Checkpoints: find one, say whether it can be profiled, fingerprint it and load it. Safetensors only.

Everything that can go wrong is found from the config and the tensor headers, before any weights load.
"""

from kvprofile.checkpoint.describe import Description, describe
from kvprofile.checkpoint.load import (
    Placement,
    choose_placement,
    identity,
    load_model,
    load_tokenizer,
    place,
    tokenizer_sha256,
    weight_bytes_in,
)
from kvprofile.checkpoint.source import Source, locate

__all__ = [
    "Source",
    "locate",
    "Description",
    "describe",
    "Placement",
    "choose_placement",
    "place",
    "load_tokenizer",
    "tokenizer_sha256",
    "load_model",
    "identity",
    "weight_bytes_in",
]
