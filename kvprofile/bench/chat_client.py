"""One request to a server that speaks OpenAI's chat protocol: sent, timed, tried again where that may help.

Times are seconds of ``time.perf_counter``. A try that fails leaves no time behind: what is measured is the try that
was answered. Errors become one line in which the key does not occur, whatever the server said.
"""

from __future__ import annotations

import asyncio
import email.utils
import random
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from kvprofile.errors import plain

if TYPE_CHECKING:
    from openai import AsyncOpenAI

MOST_WAIT_S = 60.0
FIRST_WAIT_S = 0.5
MOST_BYTES = 64 * 2**20
"""Of an answer, with all that surrounds it. A server that sends more is broken or hostile."""

MOST_CHARACTERS = 2**20
"""Of an answer's text. The longest that models write are shorter, and verifiers read each."""

MOST_TIMEOUTS = 12
"""So many times ``timeout_s``, the wait for the next byte, may a whole answer take."""

HOPELESS = frozenset({401, 402, 403, 404})
"""Statuses that every other request would meet too: no key, no money, no permission, no such model."""


@dataclass(frozen=True)
class Endpoint:
    """Where requests go. ``key`` never leaves this object but in the header that carries it."""

    base_url: str
    model: str
    key: str | None = field(default=None, repr=False)
    stream: bool = True
    stream_usage: bool = True
    timeout_s: float = 300.0
    max_attempts: int = 6
    body: Mapping[str, Any] = field(default_factory=dict)
    omit: Sequence[str] = ()

    def client(self) -> AsyncOpenAI:
        """A connection pool for this endpoint; close it. It follows no redirect, so nobody else reads a prompt."""
        from openai import AsyncOpenAI, DefaultAsyncHttpxClient, Timeout

        return AsyncOpenAI(
            base_url=self.base_url,
            api_key=self.key or "none",
            max_retries=0,
            timeout=Timeout(self.timeout_s, connect=min(30.0, self.timeout_s)),
            default_headers={"Accept-Encoding": "identity"},
            http_client=DefaultAsyncHttpxClient(follow_redirects=False, event_hooks={"response": [_bound]}),
        )

    def without_key(self, text: object) -> str:
        """One printable line without the key."""
        said = str(text).replace(self.key, "***") if self.key else str(text)
        line = plain(" ".join(said.split()))
        return line if len(line) <= 500 else f"{line[:499]}…"


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen. ``ignore_eos`` is vLLM's, and sent only where it is wanted."""

    max_tokens: int
    temperature: float = 0.0
    top_p: float | None = None
    ignore_eos: bool = False


@dataclass(frozen=True)
class Answer:
    """What came back. Unknown is None; ``error`` is one line where nothing usable came.

    ``arrivals`` are the moments at which pieces of the answer came, thoughts included. ``hopeless``: other requests
    would fail the same way.
    """

    sent: float
    ended: float
    text: str = ""
    arrivals: tuple[float, ...] = ()
    finish_reason: str | None = None
    input_tokens: int | None = None
    cached_tokens: int | None = None
    output_tokens: int | None = None
    attempts: int = 1
    error: str | None = None
    hopeless: bool = False


class _BrokenAnswerError(Exception):
    """The server stopped in the middle of an answer, or it is none."""


async def _bound(response: Any) -> None:
    """Let no more than MOST_BYTES of an answer in, and nothing that unpacks to more."""
    if response.headers.get("content-encoding", "identity") != "identity":
        raise _BrokenAnswerError("an answer that is packed, though asked for as it is")
    pieces = response.aiter_raw

    async def bounded(chunk_size: int | None = None) -> AsyncIterator[bytes]:
        left = MOST_BYTES
        async for piece in pieces(chunk_size):
            left -= len(piece)
            if left < 0:
                raise _BrokenAnswerError(f"an answer of more than {MOST_BYTES // 2**20} MiB")
            yield piece

    response.aiter_raw = bounded


async def ask(
    client: AsyncOpenAI,
    endpoint: Endpoint,
    messages: Sequence[Mapping[str, str]],
    sampling: Sampling,
    seed: int,
    request_id: str,
) -> Answer:
    """Send one request until it is answered, or trying again will not help."""
    rng = random.Random(request_id)
    body = _body(endpoint, messages, sampling, seed)
    for attempt in range(1, endpoint.max_attempts + 1):
        sent = time.perf_counter()
        try:
            async with asyncio.timeout(endpoint.timeout_s * MOST_TIMEOUTS):
                answer = await _once(client, endpoint, body, request_id)
            return replace(answer, text=_redacted(endpoint, answer.text), attempts=attempt)
        except Exception as error:
            if not _is_transport(error):
                raise
            # an error of the server or of the way to it: the last word, or tried again after a wait
            status = getattr(error, "status_code", None)
            last = attempt == endpoint.max_attempts
            if last or not _may_pass(error, status):
                failed = Answer(sent, time.perf_counter(), attempts=attempt, error=_line(endpoint, error, status))
                return replace(failed, hopeless=status in HOPELESS)
            await asyncio.sleep(_wait_s(error, attempt, rng))
    raise AssertionError("every attempt returns or waits")


def _body(endpoint: Endpoint, messages: Sequence[Mapping[str, str]], sampling: Sampling, seed: int) -> dict[str, Any]:
    body: dict[str, Any] = {
        "model": endpoint.model,
        "messages": list(messages),
        "max_tokens": sampling.max_tokens,
        "temperature": sampling.temperature,
        "seed": seed,
    }
    if sampling.top_p is not None:
        body["top_p"] = sampling.top_p
    extra = dict(endpoint.body)
    if sampling.ignore_eos:
        extra["ignore_eos"] = True
    if endpoint.stream:
        body["stream"] = True
        if endpoint.stream_usage:
            body["stream_options"] = {"include_usage": True}
    return {**{name: value for name, value in body.items() if name not in endpoint.omit}, "extra_body": extra}


async def _once(client: AsyncOpenAI, endpoint: Endpoint, body: dict[str, Any], request_id: str) -> Answer:
    """One try. Raises what the client raises, and _BrokenAnswerError for an answer that cannot be read."""
    headers = {"X-Request-Id": request_id}
    sent = time.perf_counter()
    found = await client.chat.completions.create(**body, extra_headers=headers)
    return await _streamed(found, sent) if endpoint.stream else _whole(found, sent)


def _whole(found: Any, sent: float) -> Answer:
    """An answer that came at once: when its tokens were made is not known."""
    ended = time.perf_counter()
    choices = _choices(found)
    if not choices:
        raise _BrokenAnswerError("an answer without choices")
    text = _text(getattr(choices[0], "message", None), "content")
    _require_short(len(text))
    answer = Answer(sent, ended, text, finish_reason=_reason(choices[0]))
    return replace(answer, **_usage(getattr(found, "usage", None)))


async def _streamed(found: Any, sent: float) -> Answer:
    """An answer in pieces, each with its moment. It ended with its last piece, not with the usage that follows."""
    pieces: list[str] = []
    arrivals: list[float] = []
    reason, usage, written = None, None, 0
    async with found as stream:
        async for chunk in stream:
            now = time.perf_counter()
            # the usage comes in a chunk of its own, without choices
            usage = getattr(chunk, "usage", None) or usage
            for choice in _choices(chunk)[:1]:
                reason = _reason(choice) or reason
                delta = getattr(choice, "delta", None)
                text = _text(delta, "content")
                # thoughts are tokens too: they count for timing, and are not part of the answer
                if text or _thought(delta):
                    arrivals.append(now)
                    pieces.append(text)
                    written += len(text)
                    _require_short(written)
    ended = time.perf_counter()
    if reason is None:
        raise _BrokenAnswerError("the stream ended before the answer did")
    answer = Answer(sent, arrivals[-1] if arrivals else ended, "".join(pieces), tuple(arrivals), reason)
    return replace(answer, **_usage(usage))


def _thought(delta: Any) -> str | None:
    """What reasoning models say before they answer; servers call it one of two names."""
    return getattr(delta, "reasoning_content", None) or getattr(delta, "reasoning", None)


def _choices(found: Any) -> list[Any]:
    """The choices of an answer or a piece of one; whoever answers may send anything."""
    choices = getattr(found, "choices", None)
    return choices if isinstance(choices, list) else []


def _text(part: Any, name: str) -> str:
    value = getattr(part, name, None) or ""
    if not isinstance(value, str):
        raise _BrokenAnswerError(f"an answer whose {name} is not text")
    return value


def _require_short(characters: int) -> None:
    if characters > MOST_CHARACTERS:
        raise _BrokenAnswerError(f"an answer of more than {MOST_CHARACTERS:,} characters")


def _reason(choice: Any) -> str | None:
    value = getattr(choice, "finish_reason", None)
    return plain(value)[:100] if value else None


def _usage(usage: Any) -> dict[str, Any]:
    details = getattr(usage, "prompt_tokens_details", None)
    cached = getattr(details, "cached_tokens", None)
    if cached is None:
        cached = getattr(usage, "cached_tokens", None)
    return {
        "input_tokens": _count(getattr(usage, "prompt_tokens", None)),
        "output_tokens": _count(getattr(usage, "completion_tokens", None)),
        "cached_tokens": _count(cached),
    }


def _count(value: Any) -> int | None:
    """A number of tokens; None for anything else, like -1, NaN or text."""
    return value if type(value) is int and 0 <= value < 2**40 else None


def _redacted(endpoint: Endpoint, text: str) -> str:
    return text.replace(endpoint.key, "***") if endpoint.key else text


def _is_transport(error: Exception) -> bool:
    """Whether a server or the way to it is to blame. In a stream the HTTP library's own errors come through."""
    import openai

    own = openai.APIError, _BrokenAnswerError, OSError, ValueError, RecursionError
    return isinstance(error, own) or type(error).__module__.partition(".")[0].startswith("http")


def _may_pass(error: Exception, status: int | None) -> bool:
    """Whether the same request may fare better later."""
    import openai

    if status is not None:
        return status in (408, 409, 425, 429) or status >= 500
    return not isinstance(error, openai.APIResponseValidationError | UnicodeError)


def _wait_s(error: Exception, attempt: int, rng: random.Random) -> float:
    """Seconds that the server asks for, else twice as long each time, with a little chance."""
    response = getattr(error, "response", None)
    asked = _retry_after(response.headers.get("retry-after", "")) if response is not None else None
    if asked is not None:
        return min(MOST_WAIT_S, asked)
    waited: float = FIRST_WAIT_S * 2.0 ** (attempt - 1) * rng.uniform(0.75, 1.25)
    return min(MOST_WAIT_S, waited)


def _retry_after(value: str) -> float | None:
    """Seconds in a Retry-After header: a number, or a date."""
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except (ValueError, OverflowError):
        return None


def _line(endpoint: Endpoint, error: Exception, status: int | None) -> str:
    """What went wrong, in one line that names the status and not the key."""
    import openai

    said = endpoint.without_key(_said(error))
    if status == 401:
        return f"401: the key was refused ({said})"
    if status is not None:
        return f"{status}: {said}"
    if isinstance(error, openai.APITimeoutError) or "Timeout" in type(error).__name__:
        whole = endpoint.timeout_s * MOST_TIMEOUTS if isinstance(error, TimeoutError) else endpoint.timeout_s
        return f"no answer within {whole:g} s"
    if isinstance(error, _BrokenAnswerError):
        return said
    cause = error.__cause__
    detail = endpoint.without_key(cause) if cause is not None else ""
    return f"connection failed: {said}{f' ({detail})' if detail and detail != said else ''}"


def _said(error: Exception) -> str:
    """The server's own words where it used OpenAI's form for them."""
    body = getattr(error, "body", None)
    if isinstance(body, dict):
        inner = body.get("error", body)
        message = inner.get("message") if isinstance(inner, dict) else inner
        if isinstance(message, str) and message.strip():
            return message
    return str(getattr(error, "message", "") or error or type(error).__name__)
