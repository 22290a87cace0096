"""Running one leg: start its engine, warm it up, send the load, watch, and put what came out into the record's form."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from kvprofile.bench import timings
from kvprofile.bench.attention_pass import RESULT
from kvprofile.bench.bench_options import EngineOptions
from kvprofile.bench.chat_client import Answer
from kvprofile.bench.documents import BenchDocument
from kvprofile.bench.engines import openai_compatible, vllm_server
from kvprofile.bench.engines.base import LegFailedError, Running
from kvprofile.bench.leg_store import LegStore
from kvprofile.bench.load_generator import Prompt, Sender, fill, prompts, sampling_of
from kvprofile.bench.scenario import BenchPlan, LegPlan
from kvprofile.budget.dtypes import PLAIN
from kvprofile.instrumentation import GPUMemoryManager, Look, RequestLog
from kvprofile.records import record

Say = Callable[[str], None]

WATCH_INTERVAL_S = 0.5
ATTENTION = "kvprofile.bench.attention_pass"
ATTENTION_TIMEOUT_S = 1800.0


@dataclass
class LegOutcome:
    """What a leg has measured so far."""

    rows: list[record.Request] = field(default_factory=list)
    duration_s: float = 0.0
    looks: list[Look] = field(default_factory=list)
    began: float = 0.0
    concurrency: int | None = None
    mode: Literal["closed", "open", "fill"] = "closed"
    model: str | None = None
    facts: dict[str, Any] = field(default_factory=dict)
    pool_bytes: int | None = None
    block_tokens: int | None = None
    preemptions_before: int | None = None
    eviction_ratio: float | None = None
    attention: record.Attention | None = None
    cached_tokens: int = 0
    warnings: list[str] = field(default_factory=list)


class LegRun:
    """One leg of a plan, once. ``token_bytes``: what a token takes in a cache without budgets, where that is known."""

    def __init__(
        self, plan: BenchPlan, leg: LegPlan, repetition: int, parts: LegStore, token_bytes: int | None, say: Say
    ) -> None:
        self.plan, self.leg, self.repetition, self.parts, self.say = plan, leg, repetition, parts, say
        self.token_bytes = token_bytes
        self.seed = plan.seed_of(repetition)
        self.outcome = LegOutcome(mode=plan.load.mode)
        self._answered: list[Prompt] = []
        self.secret_names = tuple(
            each.provider.key_env for each in plan.legs if each.provider is not None and each.provider.key_env
        )

    def run(self) -> LegOutcome:
        """Measure. Raises LegFailedError; what was measured until then is in ``outcome`` either way."""
        with self._engine() as running:
            self.outcome.model = running.endpoint.model
            self.outcome.facts = dict(running.facts)
            self.outcome.warnings += running.warnings
            self._load(running)
        if self.leg.kind == "local" and self.plan.attention_pass and self.repetition == 0:
            self._attention()
        return self.outcome

    @contextmanager
    def _engine(self) -> Iterator[Running]:
        provider = self.leg.provider
        if provider is not None and not provider.serve:
            with openai_compatible.connected(provider, self.plan.provider_model, os.environ) as running:
                yield running
            return
        with vllm_server.serving(
            self.plan.model,
            self.plan.model_name,
            self._options(),
            self._path("log"),
            budgets=self._budgets(),
            secret_names=self.secret_names,
            token_bytes=self.token_bytes,
        ) as running:
            if provider is None:
                yield running
                return
            own = running.endpoint
            remote = openai_compatible.endpoint(provider, own.base_url, own.model, own.key)
            yield Running(
                remote,
                facts={"replicas": running.facts.get("replicas")},
                warnings=("a rehearsal: this provider ran on this machine",),
                ended=running.ended,
            )

    def _options(self) -> EngineOptions:
        """The plan's, and the leg's own dtype of the cache."""
        options = self.plan.engine
        if self.leg.cache == PLAIN:
            return options
        return replace(options, extra=(*options.extra, "--kv-cache-dtype", self.leg.cache))

    def _budgets(self) -> vllm_server.Budgets | None:
        if self.leg.kind == "remote" or self.leg.retention is None or self.plan.profile is None:
            return None
        return vllm_server.Budgets(self.parts.profile, self.leg.retention, self._path("stats"), self.leg.heads)

    def _path(self, ending: str) -> Path:
        return self.parts.path(self.leg, self.repetition, ending)

    def _load(self, running: Running) -> None:
        load = self.plan.load
        tag = f"kvprofile-{secrets.token_hex(6)}"
        sender = Sender(running.endpoint, sampling_of(load), tag)
        # requests that are not counted: what vLLM compiles or allocates at first use is done before the clock starts
        self._warm_up(sender)
        # how many in flight: as asked, bounded by the provider, or as many as the pool is found to hold
        concurrency = load.concurrency
        provider = self.leg.provider
        if provider is not None and provider.concurrency is not None:
            concurrency = min(concurrency or provider.concurrency, provider.concurrency)
        if load.mode == "fill":
            concurrency = self._fill(running, tag, concurrency or 1)
        self.outcome.concurrency = concurrency
        # the load itself
        self._measure(running, sender, concurrency)
        self._judge_failures()

    def _measure(self, running: Running, sender: Sender, concurrency: int | None) -> None:
        """Send the load and watch the engine meanwhile; what has come is in ``outcome`` however this ends."""
        load = self.plan.load
        batch = prompts(self.plan.documents, self.plan.requests, self.seed, load.unique_prefix)
        requests = RequestLog(running.stats) if running.stats is not None else None  # from here on: no warm-up in it
        rows = self.parts.rows(self.leg, self.repetition)
        manager = GPUMemoryManager(
            running.metrics_url,
            interval_s=WATCH_INTERVAL_S,
            process=running.process,
            cache_bytes_per_token=running.token_bytes,
            stats=running.stats,
        )
        self.outcome.preemptions_before = manager.sample().preemptions  # those of warm-up and of trials
        self.outcome.began = manager.now()
        began = time.perf_counter()

        def note(prompt: Prompt, answer: Answer) -> None:
            """Keep an answer, on disk before the next one comes; stop sending where the server is gone."""
            row = _row(prompt, answer, began)
            self.outcome.rows.append(row)
            self._answered.append(prompt)
            self.outcome.cached_tokens += answer.cached_tokens or 0
            rows.add(row)
            if answer.error is not None:
                self.say(f"{self.leg.name}: {prompt.document.name}: {answer.error}")
                if running.ended():
                    sender.give_up()

        try:
            with manager:
                if load.mode == "open" and load.request_rate is not None:
                    sender.open(batch, load.request_rate, concurrency, self.seed, note)
                else:
                    sender.closed(batch, concurrency, note)
        finally:
            self.outcome.duration_s = time.perf_counter() - began
            rows.close()
            # a look that our server did not answer says nothing; of a provider's legs this machine alone is looked at
            self.outcome.looks = [look for look in manager.looks if look.running is not None or not running.process]
            self._finish(requests, sender)

    def _warm_up(self, sender: Sender) -> None:
        load = self.plan.load
        batch = prompts(
            self.plan.documents, load.warmup_requests, self.seed, load.unique_prefix, first=-load.warmup_requests
        )
        failed: list[Answer] = []
        sender.closed(batch, 1, lambda _, answer: failed.append(answer) if answer.error is not None else None)
        if failed and (failed[0].hopeless or len(failed) == len(batch)):
            raise LegFailedError(failed[0].error or "no answer")

    def _fill(self, running: Running, tag: str, most: int) -> int:
        """The most requests that were decoding at once without a preemption."""
        if running.metrics_url is None:
            self.outcome.mode = "closed"
            self.outcome.warnings.append(f"no pool to fill at a provider: {most} requests in flight instead")
            return most
        watch = GPUMemoryManager(running.metrics_url, process=running.process)
        # answers of full length, so that all of a trial's requests decode at the same time
        sampling = replace(sampling_of(self.plan.load), ignore_eos=True)

        def trial(count: int) -> bool:
            """Send ``count`` requests at once: it passes if none is preempted and all decode at the same moment."""
            sender = Sender(running.endpoint, sampling, f"{tag}-fill-{count}")
            batch = prompts(self.plan.documents, count, self.seed, self.plan.load.unique_prefix, first=-(10**6) - count)
            before, began = watch.sample().preemptions, time.perf_counter()
            rows: list[record.Request] = []
            sender.closed(batch, None, lambda prompt, answer: rows.append(_row(prompt, answer, began)))
            after = watch.sample().preemptions
            passed = before == after and timings.most_at_once(rows) == count
            self.say(f"{self.leg.name}: {count} at once {'fit' if passed else 'do not fit'}")
            return passed

        found = fill(trial, most)
        if not found:
            raise LegFailedError("not even one request decodes without a preemption; give a larger pool")
        return found

    def _finish(self, requests: RequestLog | None, sender: Sender) -> None:
        """Join each row with what the runtime wrote about its request."""
        # what the pool is, by the last look at it
        last = self.outcome.looks[-1] if self.outcome.looks else None
        self.outcome.pool_bytes = None if last is None else last.cache_bytes_total
        self.outcome.block_tokens = None if last is None else last.block_tokens
        # without budgets nothing is evicted; of a provider nobody knows
        if requests is None:
            if self.leg.kind == "local" and self.leg.retention is None:
                self.outcome.eviction_ratio = 0.0
            return
        # with budgets: what each request held, by the id it was sent with
        self.outcome.rows = [
            self._with_blocks(row, requests, sender, prompt)
            for row, prompt in zip(self.outcome.rows, self._answered, strict=True)
        ]
        self.outcome.eviction_ratio = requests.eviction_ratio

    def _with_blocks(self, row: record.Request, requests: RequestLog, sender: Sender, prompt: Prompt) -> record.Request:
        found = requests.of(sender.request_id(prompt), wait_s=0.0 if row.error else 1.0)
        if found is None:
            return row
        return row.model_copy(
            update={
                "blocks_after_prefill": found.blocks_after_prefill,
                "blocks_after_trim": found.blocks_after_trim,
                "blocks_at_end": found.blocks_at_end,
                "eviction_ratio": found.eviction_ratio,
                "preemptions": found.lives - 1,
            }
        )

    def _judge_failures(self) -> None:
        """A leg stands with some failed requests, and fails where all failed or some were never sent."""
        rows, asked = self.outcome.rows, self.plan.requests
        failed = [row for row in rows if row.error is not None]
        if len(failed) == len(rows):
            raise LegFailedError(failed[0].error or "no answer" if failed else "no request was sent")
        if len(rows) < asked:
            raise LegFailedError(
                f"{asked - len(rows)} of {asked} requests were not sent: {failed[0].error or 'no answer'}"
            )
        if failed:
            self.outcome.warnings.append(f"{len(failed)} of {asked} requests failed, the first with: {failed[0].error}")

    def _attention(self) -> None:
        """The pass of its own. Where it fails the leg stands, with a warning."""
        self.say(f"{self.leg.name}: attention pass")
        # the leg's engine, eager: the options that change what attention reads, and vLLM's own choices left out
        options = self.plan.engine
        engine: dict[str, Any] = {"model": self.plan.model, "served_model_name": self.plan.model_name}
        engine |= {"dtype": options.dtype, "tensor_parallel_size": options.tensor_parallel_size}
        engine["kv_cache_dtype"] = self.leg.cache
        optional = {
            "max_model_len": options.max_model_len,
            "block_size": options.block_tokens,
            "kv_cache_memory_bytes": options.pool_bytes,
        }
        engine |= {name: value for name, value in optional.items() if value is not None}
        # one question about each document, one after the other
        batch = prompts(self.plan.documents, len(self.plan.documents), self.seed, self.plan.load.unique_prefix)
        job = {"engine": engine, "prompts": [prompt.text for prompt in batch]}
        # with the leg's budgets, in a process of its own
        budgets = self._budgets()
        if budgets is not None:
            budgets = replace(budgets, stats=self._path("attention.stats"))  # the leg's own file is read already
        environment = vllm_server.environment_of(budgets, options, self.secret_names)
        try:
            found = _attention_pass(job, environment, self._path("attention.log"))
        except LegFailedError as error:
            self.outcome.warnings.append(f"attention was not timed: {error}")
            return
        how = "eager, one request at a time, every layer's kernel timed"
        self.outcome.attention = record.Attention(how=how, **found)


def _attention_pass(job: Mapping[str, Any], environment: Mapping[str, str], log: Path) -> dict[str, Any]:
    with open(log, "wb") as out:
        try:
            run = subprocess.run(  # noqa: S603 - our own interpreter
                vllm_server.child_command(ATTENTION),
                input=json.dumps(job).encode(), stdout=subprocess.PIPE, stderr=out, env=dict(environment),
                timeout=ATTENTION_TIMEOUT_S, check=False,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            raise LegFailedError(f"it took more than {ATTENTION_TIMEOUT_S:g} s") from None
        out.write(run.stdout)
    for line in run.stdout.decode("utf-8", "replace").splitlines():
        if line.startswith(RESULT):
            with contextlib.suppress(ValueError):
                found: dict[str, Any] = json.loads(line.removeprefix(RESULT))
                return found
    raise LegFailedError(vllm_server.reason_in(log))


def _row(prompt: Prompt, answer: Answer, began: float) -> record.Request:
    """A request and its answer as the record keeps them."""
    common: dict[str, Any] = {
        "document": prompt.document.name,
        "question": prompt.question.text,
        "expected": prompt.question.answer or "; ".join(prompt.question.expected) or None,
        "seed": prompt.seed,
        "start_s": answer.sent - began,
    }
    if answer.error is not None:
        return record.Request(**common, error=answer.error)
    return record.Request(
        **common,
        output=answer.text,
        finish_reason=answer.finish_reason,
        input_tokens=answer.input_tokens,
        output_tokens=answer.output_tokens,
        **timings.timings(answer),
    )


def documents_of(documents: Sequence[BenchDocument], rows: Sequence[record.Request]) -> list[record.Document]:
    """Documents with the mean tokens of the prompts about them: what the leg's tokenizer made of each."""
    found = []
    for document in documents:
        counts = [row.input_tokens for row in rows if row.document == document.name and row.input_tokens]
        tokens = round(statistics.fmean(counts)) if counts else None
        found.append(record.Document(name=document.name, sha256=document.sha256, tokens=tokens))
    return found
