"""Budgets and head scores in the forms of other tools: a registry of formats, each read and written by one module.

The registry holds factories, so that naming the formats (the command line does) imports none of them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from kvprofile.errors import InputError

if TYPE_CHECKING:
    from kvprofile.budget.formats.base import Format


def _kvzip() -> Format:
    from kvprofile.budget.formats.kvzip import KVzip

    return KVzip()


def _duo_attention() -> Format:
    from kvprofile.budget.formats.duo_attention import DuoAttention

    return DuoAttention()


def _lu_kv() -> Format:
    from kvprofile.budget.formats.lu_kv import LUKV

    return LUKV()


def _vllm() -> Format:
    from kvprofile.budget.formats.vllm import VLLM

    return VLLM()


def _csv() -> Format:
    from kvprofile.budget.formats.csv import CSV

    return CSV()


FORMATS: dict[str, Callable[[], Format]] = {
    "kvzip": _kvzip,
    "duo-attention": _duo_attention,
    "lu-kv": _lu_kv,
    "vllm": _vllm,
    "csv": _csv,
}


def get(name: str) -> Format:
    """A format by name. Raises InputError, which lists the names, for any other."""
    if name not in FORMATS:
        raise InputError(f"unknown format {name!r}; use one of {', '.join(FORMATS)}")
    return FORMATS[name]()
