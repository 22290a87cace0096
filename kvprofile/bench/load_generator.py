"""Sending requests: so many at a time, at random moments of a given rate, or as many as the pool holds."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from kvprofile.bench.bench_options import LoadPlan
from kvprofile.bench.chat_client import Answer, Endpoint, Sampling, ask
from kvprofile.bench.documents import BenchDocument, BenchQuestion, unique_opening

OnAnswer = Callable[["Prompt", Answer], None]


@dataclass(frozen=True)
class Prompt:
    """One request of a load: what is asked about which document, and under which number and seed."""

    number: int
    document: BenchDocument
    question: BenchQuestion
    seed: int
    text: str

    @property
    def messages(self) -> list[dict[str, str]]:
        """The conversation that is sent."""
        return [{"role": "user", "content": self.text}]


def prompts(documents: Sequence[BenchDocument], count: int, seed: int, unique: bool, first: int = 0) -> list[Prompt]:
    """``count`` requests, in turn about each document, its questions in order, and around again.

    The same seed gives the same requests in every leg. ``first`` numbers them: warm-ups are below zero.
    """
    found = []
    for number in range(first, first + count):
        document = documents[number % len(documents)]
        question = document.questions[number // len(documents) % len(document.questions)]
        opening = f"{unique_opening(seed, number)}\n" if unique else ""
        text = f"{opening}{document.text}\n\n{question.text}"
        found.append(Prompt(number, document, question, seed * 100_003 + number, text))
    return found


def sampling_of(load: LoadPlan) -> Sampling:
    """How tokens are chosen under a load."""
    return Sampling(load.max_output_tokens, load.temperature, ignore_eos=load.ignore_eos)


class Sender:
    """Sends prompts to one endpoint. ``tag`` makes request ids of this leg unlike any other's."""

    def __init__(self, endpoint: Endpoint, sampling: Sampling, tag: str) -> None:
        self.endpoint, self.sampling, self.tag = endpoint, sampling, tag
        self._hopeless = False

    def request_id(self, prompt: Prompt) -> str:
        """The id under which the engine knows a request."""
        return f"{self.tag}.{prompt.number}"

    def give_up(self) -> None:
        """Send no more: the other requests would fail the same way."""
        self._hopeless = True

    def closed(self, batch: Sequence[Prompt], concurrency: int | None, on_answer: OnAnswer) -> float:
        """Keep so many requests in flight (None: all at once) until all are answered; gives the seconds it took."""
        return asyncio.run(self._timed(lambda send: _closed(batch, concurrency or len(batch), send), on_answer))

    def open(
        self, batch: Sequence[Prompt], rate: float, concurrency: int | None, seed: int, on_answer: OnAnswer
    ) -> float:
        """Send at the moments of a Poisson process; gives the seconds until the last answer."""
        rng = random.Random(f"arrivals:{seed}")
        gaps = [rng.expovariate(rate) for _ in batch]
        return asyncio.run(self._timed(lambda send: _open(batch, gaps, concurrency, send), on_answer))

    async def _timed(
        self, run: Callable[[Callable[[Prompt], Awaitable[None]]], Awaitable[None]], on_answer: OnAnswer
    ) -> float:
        async with self.endpoint.client() as client:

            async def send(prompt: Prompt) -> None:
                if self._hopeless:  # the key is refused, or the like: no more requests for nothing
                    return
                name = self.request_id(prompt)
                answer = await ask(client, self.endpoint, prompt.messages, self.sampling, prompt.seed, name)
                self._hopeless = self._hopeless or answer.hopeless
                on_answer(prompt, answer)

            started = time.perf_counter()
            await run(send)
            return time.perf_counter() - started


def fill(trial: Callable[[int], bool], most: int) -> int:
    """The largest concurrency up to ``most`` that ``trial`` passes: doubled, then halved in between.

    0 where not even one request passes. A trial is expensive, so none is run twice.
    """
    good, bad, tried = 0, most + 1, 1  # passed with good, will not with bad
    # double until a trial fails
    while tried < bad and trial(tried):
        good = tried
        if good == most:
            return most
        tried = min(2 * tried, most)
    # halve what is left between the last that passed and the first that failed
    bad = tried
    while bad - good > 1:
        middle = (good + bad) // 2
        if trial(middle):
            good = middle
        else:
            bad = middle
    return good


async def _closed(batch: Sequence[Prompt], concurrency: int, send: Callable[[Prompt], Awaitable[None]]) -> None:
    waiting = iter(batch)  # shared: whoever is done takes the next

    async def worker() -> None:
        for prompt in waiting:
            await send(prompt)

    await asyncio.gather(*(worker() for _ in range(min(concurrency, len(batch)))))


async def _open(
    batch: Sequence[Prompt],
    gaps: Sequence[float],
    concurrency: int | None,
    send: Callable[[Prompt], Awaitable[None]],
) -> None:
    places = asyncio.Semaphore(concurrency or len(batch) or 1)

    async def one(prompt: Prompt) -> None:
        async with places:
            await send(prompt)

    running = []
    started = time.perf_counter()
    due = 0.0
    for prompt, gap in zip(batch, gaps, strict=True):
        due += gap  # counted from the start, so that a late request does not delay those after it
        await asyncio.sleep(max(0.0, started + due - time.perf_counter()))
        running.append(asyncio.ensure_future(one(prompt)))
    await asyncio.gather(*running)
