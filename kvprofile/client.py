"""``VLLMClient.generate_response``: one answer from vLLM, in this process or a server, and what it held of the cache.

Whether budgets apply is the environment's choice (``LLM_KVZIP_ENABLED=1``), as everywhere. vLLM serves on where a
plugin fails to load, so the client looks, and raises rather than answer without them.
"""

from __future__ import annotations

import atexit
import os
import tempfile
import time
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, cast

from kvprofile.environment import ENABLED, PREFIX, budgets_wanted
from kvprofile.errors import InputError
from kvprofile.instrumentation import CacheStatistics, RequestLog
from kvprofile.runtime import doctor
from kvprofile.runtime.engine_budget import CONFIG_KEY

if TYPE_CHECKING:
    from kvprofile.scoring.prompt_capture import PromptCapture

STATS = PREFIX + "STATS"
STATISTICS_WAIT_S = 2.0

Message = Mapping[str, str]

_OPENAI_NAMES = frozenset(
    {"frequency_penalty", "logit_bias", "max_tokens", "presence_penalty", "seed", "stop", "temperature", "top_p"}
)
"""Sampling parameters that OpenAI's protocol knows; vLLM takes the others as well."""


class BudgetsNotAppliedError(InputError):
    """Budgets are asked for and not in force."""


@dataclass(frozen=True)
class Timings:
    """Milliseconds; None where the engine did not say. ``queue_ms`` is known in this process only."""

    ttft_ms: float | None
    tpot_ms: float | None
    e2el_ms: float | None
    queue_ms: float | None = None


@dataclass(frozen=True)
class Response:
    """An answer. ``cache`` is None without budgets, and where the server's statistics file is not at hand."""

    text: str
    finish_reason: str | None
    input_tokens: int | None
    output_tokens: int | None
    cached_tokens: int | None
    timings: Timings
    cache: CacheStatistics | None
    request_id: str

    @property
    def eviction_ratio(self) -> float | None:
        """Share of the cache blocks after prefill that the trim freed."""
        return None if self.cache is None else self.cache.eviction_ratio


class VLLMClient:
    """vLLM in this process (``VLLMClient("org/model", dtype=...)``) or a server (``VLLMClient("model", url=...)``).

    ``engine`` are arguments of ``vllm.LLM``. For a server ``model`` may be left out where it serves one, and ``stats``
    is its ``LLM_KVZIP_STATS`` file, where that can be read from here. Raises BudgetsNotAppliedError where
    ``LLM_KVZIP_ENABLED=1`` and budgets are not in force, InputError for what makes no sense. Use it as a context
    manager, or ``close`` it.
    """

    def __init__(
        self,
        model: str | None = None,
        *,
        url: str | None = None,
        api_key: str | None = None,
        stats: Path | str | None = None,
        timeout_s: float = 600.0,
        **engine: Any,
    ) -> None:
        wanted = budgets_wanted(os.environ)
        self.stats = _statistics_file(stats, wanted, local=url is None)
        self._requests = None if self.stats is None else RequestLog(self.stats)
        self._back: _InProcess | _Server
        if url is None:
            if model is None:
                raise InputError("give VLLMClient a model, or the url of a server")
            self._back = _InProcess(model, engine)
        elif engine:
            raise InputError(f"{min(engine)} is for an engine in this process, not for a server at {url}")
        else:
            self._back = _Server(url, model, api_key, timeout_s)
        self.budgets_applied = self._back.budgets_applied()
        if wanted and not self.budgets_applied:
            self.close()
            raise BudgetsNotAppliedError(
                f"{ENABLED}=1 and {self._back.name} serves without budgets; 'kvprofile doctor' says why"
            )

    def generate_response(
        self, prompt: str | None = None, *, messages: Sequence[Message] | None = None, **sampling: Any
    ) -> Response:
        """Answer a prompt, or messages through the model's chat template. ``sampling``: as ``vllm.SamplingParams``."""
        if (prompt is None) == (messages is None):
            raise InputError("give generate_response a prompt or messages, and not both")
        if sampling.get("n", 1) != 1:
            raise InputError("generate_response gives one answer; leave out n")
        found = self._back.answer(prompt, messages, sampling)
        if not self.budgets_applied or self._requests is None:
            return found
        cache = self._requests.of(found.request_id, wait_s=STATISTICS_WAIT_S)
        return Response(**{**vars(found), "cache": cache})

    def capture_prompt(self, prompt: str | Sequence[int], *, scores: bool = True, **options: Any) -> PromptCapture:
        """Keys, values and scores of a prompt after its prefill (``scoring.prompt_capture``), in this process only.

        The engine needs ``**kvprofile.capture.ENGINE_ARGUMENTS``. Raises InputError where it cannot be watched.
        """
        if not isinstance(self._back, _InProcess):
            raise InputError(f"{self._back.name} is a server, whose cache cannot be looked into; run the model here")
        from kvprofile.scoring.prompt_capture import capture_prompt

        return capture_prompt(self._back.llm, prompt, scores=scores, **options)

    @property
    def source(self) -> Any:
        """What GPUMemoryManager looks at: the engine in this process, or the server's URL."""
        return self._back.llm if isinstance(self._back, _InProcess) else self._back.root

    def close(self) -> None:
        """Let go of the engine or the connection."""
        self._back.close()

    def __enter__(self) -> VLLMClient:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class _InProcess:
    """An engine of our own. ``llm`` is what GPUMemoryManager looks at."""

    def __init__(self, model: str, engine: Mapping[str, Any]) -> None:
        from vllm import LLM

        self.name = f"vLLM with {model}"
        self.llm: Any = LLM(model=model, **{"disable_log_stats": False, **engine})

    def budgets_applied(self) -> bool:
        config = self.llm.llm_engine.vllm_config.additional_config
        return isinstance(config, Mapping) and CONFIG_KEY in config

    def answer(self, prompt: str | None, messages: Sequence[Message] | None, sampling: Mapping[str, Any]) -> Response:
        from vllm import SamplingParams

        try:
            options = SamplingParams(**sampling)
        except (TypeError, ValueError) as error:
            raise InputError(f"sampling parameters: {error}") from error
        sent = time.perf_counter()
        if messages is not None:
            (found,) = self.llm.chat([list(messages)], options, use_tqdm=False)
        else:
            (found,) = self.llm.generate([prompt], options, use_tqdm=False)
        total_ms = (time.perf_counter() - sent) * 1000
        output = found.outputs[0]
        return Response(
            text=output.text,
            finish_reason=output.finish_reason,
            input_tokens=len(found.prompt_token_ids),
            output_tokens=len(output.token_ids),
            cached_tokens=found.num_cached_tokens,
            timings=_engine_timings(found.metrics, len(output.token_ids), total_ms),
            cache=None,
            request_id=found.request_id,
        )

    def close(self) -> None:
        core = getattr(self.llm.llm_engine, "engine_core", None)
        if core is not None:
            core.shutdown()


class _Server:
    """Somebody's engine, over OpenAI's protocol, streamed so that its first token can be timed."""

    def __init__(self, url: str, model: str | None, api_key: str | None, timeout_s: float) -> None:
        import openai

        self.name = url
        self.root = url.rstrip("/").removesuffix("/v1")
        if not self.root.startswith(("http://", "https://")):
            raise InputError(f"{url} is not an http address")
        http = openai.DefaultHttpxClient(follow_redirects=False)  # prompts and the key go to this address alone
        key = api_key or os.environ.get("OPENAI_API_KEY") or "none"
        self.client = openai.OpenAI(base_url=f"{self.root}/v1", api_key=key, timeout=timeout_s, http_client=http)
        self.model = model or self._only_model()

    def budgets_applied(self) -> bool:
        return doctor.server(self.root).good is True

    def answer(self, prompt: str | None, messages: Sequence[Message] | None, sampling: Mapping[str, Any]) -> Response:
        name = f"kvprofile-{uuid.uuid4().hex}"
        known = {key: value for key, value in sampling.items() if key in _OPENAI_NAMES}
        other = {key: value for key, value in sampling.items() if key not in _OPENAI_NAMES}
        request: dict[str, Any] = {"model": self.model, "stream": True, "stream_options": {"include_usage": True}}
        request |= {"extra_headers": {"X-Request-Id": name}, "extra_body": other, **known}
        sent = time.perf_counter()
        if messages is not None:
            stream = cast("Any", self.client.chat.completions).create(messages=list(messages), **request)
        else:
            stream = cast("Any", self.client.completions).create(prompt=prompt, **request)
        with stream:
            pieces, arrivals, reason, usage = _read(stream)
        total_ms = (time.perf_counter() - sent) * 1000
        details = getattr(usage, "prompt_tokens_details", None)
        written = getattr(usage, "completion_tokens", None)
        first = (arrivals[0] - sent) * 1000 if arrivals else None
        per_token = None if first is None or not written or written < 2 else (total_ms - first) / (written - 1)
        return Response(
            text="".join(pieces),
            finish_reason=reason,
            input_tokens=getattr(usage, "prompt_tokens", None),
            output_tokens=written,
            cached_tokens=getattr(details, "cached_tokens", None),
            timings=Timings(first, per_token, total_ms),
            cache=None,
            request_id=name,
        )

    def close(self) -> None:
        self.client.close()

    def _only_model(self) -> str:
        found = [model.id for model in self.client.models.list()]
        if len(found) != 1:
            raise InputError(f"{self.name} serves {len(found)} models; give VLLMClient one of {', '.join(found)}")
        return found[0]


def _read(stream: Iterable[Any]) -> tuple[list[str], list[float], str | None, Any]:
    """Pieces of a streamed answer, when each came, why it ended, and the usage."""
    pieces: list[str] = []
    arrivals: list[float] = []
    reason, usage = None, None
    for chunk in stream:
        now = time.perf_counter()
        usage = chunk.usage or usage
        for choice in chunk.choices[:1]:
            reason = choice.finish_reason or reason
            text = choice.delta.content if hasattr(choice, "delta") else choice.text
            if text:
                pieces.append(text)
                arrivals.append(now)
    return pieces, arrivals, reason, usage


def _engine_timings(metrics: Any, output_tokens: int, total_ms: float) -> Timings:
    """What vLLM measured of a request; the time around the call is its end to end."""
    if metrics is None:
        return Timings(None, None, total_ms)
    decode_s = metrics.last_token_ts - metrics.first_token_ts
    return Timings(
        ttft_ms=metrics.first_token_latency * 1000,
        tpot_ms=decode_s * 1000 / (output_tokens - 1) if output_tokens > 1 else None,
        e2el_ms=total_ms,
        queue_ms=max(0.0, metrics.scheduled_ts - metrics.queued_ts) * 1000,
    )


def _statistics_file(given: Path | str | None, wanted: bool, *, local: bool) -> Path | None:
    """The runtime's statistics file: the one given, that of the environment, or for an own engine a new one."""
    if given is not None:
        if local:
            os.environ[STATS] = str(given)
        return Path(given)
    if not wanted:
        return None
    if local and not os.environ.get(STATS):
        handle, name = tempfile.mkstemp(prefix="kvprofile-", suffix=".jsonl")
        os.close(handle)
        os.environ[STATS] = name  # the engine's processes read it when they start
        atexit.register(Path(name).unlink, missing_ok=True)
    found = os.environ.get(STATS)
    return Path(found) if found else None
