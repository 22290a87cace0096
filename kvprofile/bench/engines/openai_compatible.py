"""A provider that speaks OpenAI's protocol: its model is looked up, its key stays in the header."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import httpx

from kvprofile.bench.asking import Endpoint
from kvprofile.bench.engines.base import LegFailed, Running
from kvprofile.bench.providers import Provider
from kvprofile.errors import InputError, plain

LISTED = 12


@contextmanager
def connected(provider: Provider, model: str | None, environ: Mapping[str, str]) -> Iterator[Running]:
    """An endpoint of a provider. Raises LegFailed where the key is missing, refused, or the model is not there."""
    try:
        key = provider.key(environ)
    except InputError as error:
        raise LegFailed(str(error)) from error
    if provider.base_url is None:
        raise LegFailed(f"provider {provider.name} has no base_url")
    unnamed = endpoint(provider, provider.base_url, "", key)
    chosen = model or provider.model
    offered, warnings = _offered(provider, unnamed, required=chosen is None)
    if chosen is None:
        if len(offered) != 1:
            listed = ", ".join(offered[:LISTED]) + (", …" if len(offered) > LISTED else "")
            raise LegFailed(f"{provider.name} offers {len(offered)} models; choose one with --provider-model: {listed}")
        chosen = offered[0]
    elif offered and chosen not in offered:
        listed = ", ".join(offered[:LISTED]) + (", …" if len(offered) > LISTED else "")
        raise LegFailed(f"{provider.name} has no model {chosen}; it offers {listed}")
    yield Running(endpoint(provider, provider.base_url, chosen, key), warnings=warnings)


def endpoint(provider: Provider, base_url: str, model: str, key: str | None) -> Endpoint:
    """How requests reach a provider."""
    return Endpoint(
        base_url=base_url.rstrip("/"),
        model=model,
        key=key,
        stream=provider.stream,
        stream_usage=provider.stream_usage,
        timeout_s=provider.timeout_s,
        max_attempts=provider.max_attempts,
        body=provider.body,
    )


def _offered(provider: Provider, where: Endpoint, *, required: bool) -> tuple[list[str], tuple[str, ...]]:
    """Models that the provider lists, and warnings. Without a list a stated model is taken at its word."""
    headers = {"Authorization": f"Bearer {where.key}"} if where.key else {}
    try:
        found = httpx.get(f"{where.base_url}/models", headers=headers, timeout=min(60.0, where.timeout_s))
    except httpx.HTTPError as error:
        said = where.without_key(error)
        raise LegFailed(f"{provider.name} cannot be reached: {said or type(error).__name__}") from None
    if found.status_code in (401, 403):
        raise LegFailed(f"{provider.name} refuses the key in {provider.key_env or 'no variable'} ({found.status_code})")
    try:
        listed = [plain(str(entry["id"])) for entry in found.raise_for_status().json()["data"]]
    except (httpx.HTTPError, ValueError, KeyError, TypeError):
        if required:
            raise LegFailed(f"{provider.name} does not list its models; name one with --provider-model") from None
        return [], (f"{provider.name} does not list its models",)
    return listed, ()
