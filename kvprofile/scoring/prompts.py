"""What the model reads: the text around the context, and the requests to repeat it.

Wording and order follow KVzip (arXiv 2505.23416, section 3.2). Contexts are spliced as ids and never encoded
twice, so a request quotes exactly the tokens that the cache holds.
"""

from __future__ import annotations

import contextlib
import datetime
import re
import signal
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kvprofile.errors import InputError, first_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PROMPTS_VERSION = 1
REPEAT_ALL = "\n\nRepeat the previous context exactly."
REPEAT_FROM = "\n\nRepeat the part of the previous context exactly, starting with "
HINT_TOKENS = 8
"""How many tokens before a chunk the request for it quotes."""

BARE_PREFIX_TOKENS = 4
"""Context tokens that serve as prefix where there is neither template nor BOS: token 0 draws attention anyway."""

TEMPLATE_TIMEOUT_S = 20.0
MOST_TEMPLATE_CHARACTERS = 1_000_000
"""What a template may take. Its sandbox keeps it from files and code, not from loops."""

_MARK = "kvprofile-context-goes-here"
_THOUGHT_MARK = "kvprofile-thought-goes-here"
_ANSWER_MARK = "kvprofile-answer-goes-here"
_THOUGHT_KEYS = ("reasoning_content", "reasoning", "thinking")
"""How templates name the thought of an assistant message."""

_OPEN_THOUGHT = re.compile(
    r"([<\[]\|?(\w+:)?(think|thought|reason)\w*\|?[>\]]|<\|channel\|?>(analysis|thought)(<\|message\|>)?)\s*$",
    re.IGNORECASE,
)
_FIXED_DATE = datetime.datetime(2025, 1, 1, tzinfo=datetime.UTC)


@dataclass(frozen=True)
class Frame:
    """What stands before the context and between a request and the answer, as text and as ids."""

    prefix: str
    suffix: str
    prefix_ids: tuple[int, ...]
    suffix_ids: tuple[int, ...]
    repeat_all_ids: tuple[int, ...]
    repeat_from_ids: tuple[int, ...]

    @property
    def leaves_thought_open(self) -> bool:
        """Whether answers stand inside a thought, because the template opens one and shows no way to end it."""
        return _OPEN_THOUGHT.search(self.suffix) is not None


OPEN_THOUGHT_NOTE = (
    "the chat template opens a thought and does not show how one ends: repeats and answers stand inside it"
)


@dataclass(frozen=True)
class FramedDocument:
    """A tokenised document: P prefix ids, never scored, and T context ids."""

    name: str
    prefix_ids: tuple[int, ...]
    context_ids: tuple[int, ...]


@dataclass(frozen=True)
class Chunk:
    """Context tokens [start, stop) of a document and the ids that ask for them and repeat them."""

    index: int
    start: int
    stop: int
    repeat_ids: tuple[int, ...]


def chat_frame(tokenizer: PreTrainedTokenizerBase) -> Frame:
    """The frame that a tokenizer's chat template gives, rendered with a fixed date and without thinking.

    What a template always opens before an answer, a thought or a message header, is closed as the template itself
    does in a finished message; where it does not show how, ``leaves_thought_open`` is true. Without a template the
    prefix is the BOS token, if there is one, and the suffix a newline. Raises InputError where the template fails or
    changes the user's text.
    """
    if tokenizer.chat_template:
        prefix, suffix = _render(tokenizer)
    else:
        prefix, suffix = "", "\n"
    prefix_ids = encode(tokenizer, prefix) if prefix else ()
    if not prefix_ids and tokenizer.bos_token_id is not None:
        prefix, prefix_ids = str(tokenizer.bos_token), (int(tokenizer.bos_token_id),)
    return Frame(
        prefix=prefix,
        suffix=suffix,
        prefix_ids=prefix_ids,
        suffix_ids=encode(tokenizer, suffix),
        repeat_all_ids=encode(tokenizer, REPEAT_ALL),
        repeat_from_ids=encode(tokenizer, REPEAT_FROM),
    )


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[int, ...]:
    """Ids of a text, without special tokens added and without a warning about its length."""
    return tuple(tokenizer(text, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"])


def frame_document(name: str, ids: Sequence[int], frame: Frame) -> FramedDocument:
    """Put a document into its frame; where the frame has no prefix, the first tokens of the document become it."""
    if frame.prefix_ids:
        return FramedDocument(name, frame.prefix_ids, tuple(ids))
    return FramedDocument(name, tuple(ids[:BARE_PREFIX_TOKENS]), tuple(ids[BARE_PREFIX_TOKENS:]))


def chunks(document: FramedDocument, frame: Frame, chunk_tokens: int) -> Iterator[Chunk]:
    """The document's chunks of ``chunk_tokens``, the last one shorter, each with its repeat input."""
    context = document.context_ids
    for index, start in enumerate(range(0, len(context), chunk_tokens)):
        stop = min(start + chunk_tokens, len(context))
        hint = (*frame.repeat_from_ids, *context[max(0, start - HINT_TOKENS) : start])
        request = frame.repeat_all_ids if start == 0 else hint
        yield Chunk(index, start, stop, (*request, *frame.suffix_ids, *context[start:stop]))


def longest_repeat(frame: Frame, chunk_tokens: int) -> int:
    """Most tokens a repeat input can have."""
    request = max(len(frame.repeat_all_ids), len(frame.repeat_from_ids) + HINT_TOKENS)
    return request + len(frame.suffix_ids) + chunk_tokens


def required_positions(document: FramedDocument, frame: Frame, chunk_tokens: int) -> int:
    """Positions that the longest forward pass over a document reaches."""
    length = len(document.prefix_ids) + len(document.context_ids)
    return length + longest_repeat(frame, min(chunk_tokens, len(document.context_ids)))


def most_context_tokens(frame: Frame, prefix_tokens: int, chunk_tokens: int, positions: int) -> int:
    """Most context tokens that fit into ``positions`` with prefix and longest repeat; below 1 where none does."""
    left = positions - prefix_tokens - longest_repeat(frame, 0)
    whole_chunk = left - chunk_tokens
    return whole_chunk if whole_chunk >= chunk_tokens else left // 2  # a shorter context is a single chunk


@contextlib.contextmanager
def _at_most(seconds: float) -> Iterator[None]:
    """Raise TimeoutError in a block that takes longer; only where signals work: the main thread, not on Windows."""
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        yield
        return

    def stop(*_: object) -> None:
        raise TimeoutError(f"no end after {seconds:g} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _render(tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    user = {"role": "user", "content": _MARK}
    try:
        text = _rendered(tokenizer, [user], add_generation_prompt=True)
    except Exception as error:  # a template is a program and fails in its own ways
        raise InputError(f"{tokenizer.name_or_path}: the chat template fails: {first_line(error)}") from error
    if isinstance(text, str) and len(text) > MOST_TEMPLATE_CHARACTERS:
        raise InputError(f"{tokenizer.name_or_path}: the chat template writes {len(text):,} characters around one text")
    if not isinstance(text, str) or text.count(_MARK) != 1:
        raise InputError(f"{tokenizer.name_or_path}: the chat template does not hold the user's text exactly once")
    prefix, suffix = text.split(_MARK)
    return prefix, _closed(tokenizer, user, suffix)


def _rendered(
    tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]], *, add_generation_prompt: bool
) -> Any:
    """A conversation as the template writes it. Raises whatever the template does, and TimeoutError."""
    options: dict[str, Any] = {
        "add_generation_prompt": add_generation_prompt,
        "tokenize": False,
        "enable_thinking": False,
        "date_string": _FIXED_DATE.strftime("%d %b %Y"),
    }
    with _at_most(TEMPLATE_TIMEOUT_S), _fixed_date():
        return tokenizer.apply_chat_template(messages, **options)


class _StoppedClock(datetime.datetime):
    """A day that does not end, so that the same template gives the same text tomorrow."""

    @classmethod
    def now(cls, _tz: datetime.tzinfo | None = None) -> datetime.datetime:  # type: ignore[override]
        """The fixed date."""
        return _FIXED_DATE


@contextlib.contextmanager
def _fixed_date() -> Iterator[None]:
    """Let templates that ask for the date (``strftime_now``) get a fixed one.

    A function among the options would do before transformers 5.24, which makes plain text of whatever it is given.
    """
    from transformers.utils import chat_template_utils

    clock = chat_template_utils.datetime
    chat_template_utils.datetime = _StoppedClock
    try:
        yield
    finally:
        chat_template_utils.datetime = clock


def _closed(tokenizer: PreTrainedTokenizerBase, user: dict[str, str], suffix: str) -> str:
    """``suffix``, which asks for an answer, up to where the answer itself begins in a finished message.

    Qwen3-Thinking and MiniMax-M2 end ``suffix`` with an open thought, and show in a finished message how it ends;
    R1-Distill leaves thoughts out of finished messages; gpt-oss continues with the header of the final channel.
    """
    answer = {"role": "assistant", "content": _ANSWER_MARK}
    # a finished message with a thought that begins where suffix ends: what follows the thought closes it
    thought = _between(tokenizer, [user, {**answer, **dict.fromkeys(_THOUGHT_KEYS, _THOUGHT_MARK)}])
    if thought is not None and thought.count(_THOUGHT_MARK) == 1:
        opened, closing = thought.split(_THOUGHT_MARK)
        if opened == suffix:
            return suffix + closing
    # one without: its header may be longer than suffix, or shorter by the thought that suffix opens
    header = _between(tokenizer, [user, answer])
    if header is None:
        return suffix
    if header.startswith(suffix) and header[len(suffix) :].strip():
        return header
    if suffix.startswith(header) and _OPEN_THOUGHT.search(suffix[len(header) :]):
        return header
    return suffix


def _between(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]]) -> str | None:
    """What a template writes between a user's text and the answer; None where it fails or hides one of them."""
    try:
        text = _rendered(tokenizer, messages, add_generation_prompt=False)
    except Exception:  # a template that takes a user's message alone is enough
        return None
    if not isinstance(text, str) or len(text) > MOST_TEMPLATE_CHARACTERS:
        return None
    found: list[str] = re.findall(f"{_MARK}(.*?){_ANSWER_MARK}", text, re.DOTALL)
    return found[0] if len(found) == 1 and text.count(_ANSWER_MARK) == 1 else None
