"""Remote providers: a TOML table of servers that speak OpenAI's protocol, the bundled one and the user's."""

from __future__ import annotations

import os
import tomllib
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from kvprofile.budget.profile import Printable
from kvprofile.budget.store import is_file, phrases
from kvprofile.errors import InputError
from kvprofile.files import read_bytes

OWN_FILE = Path("providers.toml")


class Prices(BaseModel):
    """Prices of a million tokens. Cached input costs what input costs unless stated."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    currency: Annotated[str, Field(pattern=r"^[A-Z]{3}$")] = "USD"
    input_per_million_tokens: Annotated[float, Field(ge=0)]
    cached_input_per_million_tokens: Annotated[float, Field(ge=0)] | None = None
    output_per_million_tokens: Annotated[float, Field(ge=0)]

    def amount(self, input_tokens: int, cached_tokens: int, output_tokens: int) -> float:
        """What so many tokens cost, of which ``cached_tokens`` of the input came from the provider's cache."""
        cached_price = self.cached_input_per_million_tokens
        if cached_price is None:
            cached_price = self.input_per_million_tokens
        fresh = (input_tokens - cached_tokens) * self.input_per_million_tokens
        return (fresh + cached_tokens * cached_price + output_tokens * self.output_per_million_tokens) / 1e6


class Provider(BaseModel):
    """One server; ``providers.toml`` says what each field means."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: Annotated[Printable, Field(min_length=1, max_length=100)]
    base_url: Annotated[str, Field(pattern=r"^https?://[^\s@]+$")] | None = None
    serve: bool = False
    key_env: Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")] | None = None
    model: str | None = None
    stream: bool = True
    stream_usage: bool = True
    timeout_s: Annotated[float, Field(gt=0)] = 300.0
    max_attempts: Annotated[int, Field(ge=1, le=20)] = 6
    concurrency: Annotated[int, Field(ge=1)] | None = None
    servers: tuple[Annotated[str, Field(pattern=r"^https?://[^\s@]+$")], ...] = ()
    prices: Prices | None = None
    body: dict[str, Any] = {}
    omit: tuple[str, ...] = ()

    def key(self, environ: Mapping[str, str] = os.environ) -> str | None:
        """The key, None where none is needed. Raises InputError where the variable is not set."""
        if self.key_env is None:
            return None
        found = environ.get(self.key_env, "").strip()
        if not found:
            raise InputError(f"provider {self.name} needs a key: set {self.key_env}")
        if not found.isascii() or not found.isprintable():
            raise InputError(f"provider {self.name}: {self.key_env} holds characters that no header can carry")
        return found


def load(own: Path | None = None) -> dict[str, Provider]:
    """All providers by name. ``own`` defaults to ./providers.toml where that exists, which nobody may have asked for.

    Raises InputError.
    """
    bundled = files("kvprofile.bench") / "providers.toml"
    found = _parse(bundled.read_bytes(), "bundled providers")
    if own is not None:
        return found | _parse(read_bytes(own), str(own))
    added = _parse(read_bytes(OWN_FILE), str(OWN_FILE)) if is_file(OWN_FILE) else {}
    for name in found.keys() & added.keys():  # a folder of somebody else's may hold such a file
        new = added[name]
        if new.key_env is not None and new.base_url != found[name].base_url:
            raise InputError(
                f"{OWN_FILE} here sends {new.key_env} to {new.base_url} under the name {name}; "
                f"if that is meant, give --providers {OWN_FILE}"
            )
    return found | added


def choose(name: str, own: Path | None = None) -> Provider:
    """The provider of that name. Raises InputError where there is none."""
    known = load(own)
    if name not in known:
        raise InputError(f"no provider {name!r}; known are {', '.join(sorted(known))}; add it to providers.toml")
    return known[name]


def _parse(content: bytes, where: str) -> dict[str, Provider]:
    try:
        raw = tomllib.loads(content.decode("utf-8"))
    except ValueError as error:
        raise InputError(f"{where} is not TOML: {error}") from error
    return {name: _provider(name, table, where) for name, table in raw.items()}


def _provider(name: str, table: object, where: str) -> Provider:
    if not isinstance(table, dict):
        raise InputError(f"{where}: {name} is not a table; write [{name}]")
    if {"key", "api_key", "token"} & {key.lower() for key in table}:
        raise InputError(f"{where}: {name} holds a key; keep it in the environment and name the variable in key_env")
    try:
        provider = Provider(name=name, **table)
    except (ValidationError, TypeError) as error:
        found = phrases(error) if isinstance(error, ValidationError) else [str(error)]
        raise InputError(f"{where}: {name}: {'; '.join(found)}") from error
    if provider.serve == (provider.base_url is not None):
        raise InputError(f"{where}: {name} needs a base_url, or serve = true, and not both")
    return provider
