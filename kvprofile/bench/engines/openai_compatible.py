"""A provider that speaks OpenAI's protocol: its model is looked up, its key stays in the header."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from kvprofile.bench.chat_client import Endpoint
from kvprofile.bench.engines.base import LegFailedError, Running
from kvprofile.bench.engines.vllm_server import replicas_of
from kvprofile.bench.providers import Provider
from kvprofile.errors import InputError, plain
from kvprofile.runtime import doctor

LISTED = 12


@contextmanager
def connected(provider: Provider, model: str | None, environ: Mapping[str, str]) -> Iterator[Running]:
    """An endpoint of a provider. Raises LegFailedError where the key is missing, refused, or the model is not there."""
    try:
        key = provider.key(environ)
    except InputError as error:
        raise LegFailedError(str(error)) from error
    if provider.base_url is None:
        raise LegFailedError(f"provider {provider.name} has no base_url")
    unnamed = endpoint(provider, provider.base_url, "", key)
    chosen = model or provider.model
    offered, warnings = _offered(provider, unnamed, required=chosen is None)
    listed = ", ".join(offered[:LISTED]) + (", …" if len(offered) > LISTED else "")
    if chosen is None:
        if len(offered) != 1:
            raise LegFailedError(
                f"{provider.name} offers {len(offered)} models; choose one with --provider-model: {listed}"
            )
        chosen = offered[0]
    elif offered and chosen not in offered:
        raise LegFailedError(f"{provider.name} has no model {chosen}; it offers {listed}")
    replicas, told = _behind(provider)
    warnings += told
    yield Running(endpoint(provider, provider.base_url, chosen, key), facts={"replicas": replicas}, warnings=warnings)


def _behind(provider: Provider) -> tuple[int | None, tuple[str, ...]]:
    """How many replicas answer for a provider, None where that is not known, and warnings."""
    if not provider.servers:
        return None, ()
    replicas = replicas_of(provider.servers)
    if replicas is None:
        return None, (f"not all servers of {provider.name} show their /metrics, so its replicas are not known",)
    checks = list(doctor.servers(provider.servers))
    told = [check.detail for check in checks if check.name == "budgets" and check.good is False]
    if len({check.good for check in checks if check.name == "server"}) > 1:
        told.append("some apply budgets, others do not")
    return replicas, tuple(f"servers of {provider.name}: {detail}" for detail in told)


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
        omit=provider.omit,
    )


def _offered(provider: Provider, where: Endpoint, *, required: bool) -> tuple[list[str], tuple[str, ...]]:
    """Models that the provider lists, and warnings. Without a list a stated model is taken at its word."""
    import openai

    client = openai.OpenAI(
        base_url=where.base_url, api_key=where.key or "none", max_retries=2, timeout=min(60.0, where.timeout_s),
        http_client=openai.DefaultHttpxClient(follow_redirects=False),
    )  # fmt: skip
    try:
        with client:
            return [plain(model.id) for model in client.models.list()], ()
    except openai.APIConnectionError as error:
        said = where.without_key(error.__cause__ or error)
        raise LegFailedError(f"{provider.name} cannot be reached: {said or type(error).__name__}") from None
    except (openai.AuthenticationError, openai.PermissionDeniedError) as error:
        variable = provider.key_env or "no variable"
        raise LegFailedError(f"{provider.name} refuses the key in {variable} ({error.status_code})") from None
    except Exception as error:  # some list nothing, or something else
        if required:
            why = where.without_key(getattr(error, "status_code", None) or type(error).__name__)
            raise LegFailedError(
                f"{provider.name} does not list its models ({why}); name one with --provider-model"
            ) from None
        return [], (f"{provider.name} does not list its models",)
