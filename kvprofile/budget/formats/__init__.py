"""Budgets and head scores in the forms of other tools: a registry of formats, each read and written by one module."""

from __future__ import annotations

from kvprofile.budget.formats.base import Format
from kvprofile.budget.formats.csv import CSV
from kvprofile.budget.formats.duo_attention import DuoAttention
from kvprofile.budget.formats.kvzip import KVzip
from kvprofile.budget.formats.lu_kv import LUKV
from kvprofile.budget.formats.vllm import VLLM
from kvprofile.errors import InputError

FORMATS: dict[str, type[Format]] = {
    "kvzip": KVzip,
    "duo-attention": DuoAttention,
    "lu-kv": LUKV,
    "vllm": VLLM,
    "csv": CSV,
}


def get(name: str) -> Format:
    """A format by name. Raises InputError, which lists the names, for any other."""
    if name not in FORMATS:
        raise InputError(f"unknown format {name!r}; use one of {', '.join(FORMATS)}")
    return FORMATS[name]()
