"""The run record: what a benchmark leaves behind, as one versioned model, and nothing about making or showing it.

A record holds legs. A leg is one pass of one load over one engine or provider; legs of one name are repetitions. What
was not measured or cannot be known is null, never a guess. ``run_files`` reads and writes records, ``compare`` says
what follows from them, ``html`` draws them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Annotated, Literal, Self, TypeAlias

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from kvprofile.budget.profile import CommitSha, Matrix, Printable, Sha256

FORMAT = "kvprofile-run"
SCHEMA_VERSION = 1

LATENCIES = ("ttft", "tpot", "itl", "e2el")
"""To the first token, per output token after it, between tokens, end to end: as `vllm bench serve` names them."""


def _encodable(value: object) -> object:
    """Text without lone surrogates, which no file can hold."""
    return value.encode("utf-8", "replace").decode("utf-8") if isinstance(value, str) else value


Text = Annotated[str, BeforeValidator(_encodable)]
"""What a model or a person wrote: anything, so whoever shows it must escape it."""

Name = Annotated[Printable, Field(min_length=1, max_length=200)]
Line = Annotated[Printable, Field(max_length=2000)]
Share = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=0)]
Amount = Annotated[float, Field(ge=0)]
Time = Annotated[str, Field(pattern=r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?Z$")]
"""A moment in UTC: 2026-11-24T15:00:00Z."""

Setting: TypeAlias = bool | int | float | Line | list[bool | int | float | Line | None] | None


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Machine(_Part):
    """The machine in words. No host name, no user, no path."""

    system: Line | None = Field(default=None, description="kernel and release: 'Linux 6.1'")
    architecture: Line | None = Field(default=None, description="'x86_64'")
    processor: Line | None = Field(default=None, description="its maker's name for it")
    cores: int | None = Field(default=None, ge=1, description="cores this process may use")
    memory_bytes: Count | None = None
    accelerators: list[Line] | None = Field(default=None, description="name and memory of each GPU; empty for none")


class Provenance(_Part):
    """Where and with what the legs were run."""

    started: Time | None = None
    finished: Time | None = None
    git_commit: CommitSha | Literal["unknown"] = "unknown"
    git_dirty: bool | None = Field(default=None, description="whether tracked files differed from the commit")
    versions: dict[Name, Line] = Field(default={}, description="'python', 'torch', 'vllm', ...: what took part")
    machine: Machine = Machine()
    environment: dict[Name, Line] = Field(default={}, description="variables that change results; never keys or paths")


class Experiment(_Part):
    """What was asked for. Records of one experiment share its name and may be shown as one."""

    name: Name
    preset: Name | None = None
    baseline: Name | None = Field(default=None, description="the leg that the others are compared with")
    made_up: bool = Field(default=False, description="invented numbers, for tests and previews; pages say so first")
    settings: dict[Name, Setting] = Field(default={}, description="options of the run, as given")


class Document(_Part):
    """A document of the load, by the hash of its text."""

    name: Name
    sha256: Sha256 | None = None
    tokens: Count | None = Field(default=None, description="by the leg's tokenizer")


class Load(_Part):
    """How requests were sent."""

    mode: Literal["closed", "open", "fill", "unknown"] = Field(
        description="closed: fixed concurrency; open: Poisson arrivals; fill: the most requests without preemption"
    )
    concurrency: int | None = Field(default=None, ge=1, description="requests in flight at most; null for no limit")
    request_rate: Annotated[float, Field(gt=0)] | None = Field(
        default=None, description="requests per second, open load"
    )
    burstiness: Annotated[float, Field(gt=0)] | None = None
    requests: Count | None = Field(default=None, description="requests sent, warm-up excluded")
    warmup_requests: Count | None = None
    max_output_tokens: Count | None = None
    temperature: Amount | None = None
    streaming: bool | None = None
    prefix_caching: bool | None = None
    description: Line = ""


class Metrics(_Part):
    """What came out, under the keys of `vllm bench serve`: seconds, counts, per-second rates, milliseconds."""

    duration: Amount | None = Field(default=None, description="seconds, warm-up excluded")
    completed: Count | None = None
    failed: Count | None = None
    total_input_tokens: Count | None = None
    total_output_tokens: Count | None = None
    request_throughput: Amount | None = None
    output_throughput: Amount | None = None
    total_token_throughput: Amount | None = None
    max_concurrent_requests: Amount | None = None
    mean_ttft_ms: Amount | None = None
    median_ttft_ms: Amount | None = None
    p99_ttft_ms: Amount | None = None
    mean_tpot_ms: Amount | None = None
    median_tpot_ms: Amount | None = None
    p99_tpot_ms: Amount | None = None
    mean_itl_ms: Amount | None = None
    median_itl_ms: Amount | None = None
    p99_itl_ms: Amount | None = None
    mean_e2el_ms: Amount | None = None
    median_e2el_ms: Amount | None = None
    p99_e2el_ms: Amount | None = None


class Verdict(_Part):
    """What one verifier said of one output."""

    name: Name
    passed: bool | None = Field(description="null where the verifier could not judge")
    score: float | None = None
    warnings: list[Text] = []


class Request(_Part):
    """One request and its answer."""

    document: Name | None = Field(default=None, description="name of one of the leg's documents")
    question: Text | None = None
    output: Text | None = None
    expected: Text | None = None
    seed: int | None = None
    error: Text | None = Field(default=None, description="one line where the request failed")
    finish_reason: Line | None = None
    verdicts: list[Verdict] = []
    start_s: float | None = Field(default=None, description="when it was sent, seconds since the leg began")
    ttft_ms: Amount | None = None
    tpot_ms: Amount | None = None
    e2el_ms: Amount | None = None
    itl_ms: list[Amount] | None = Field(default=None, description="between tokens, in order")
    input_tokens: Count | None = None
    output_tokens: Count | None = None
    blocks_after_prefill: Count | None = Field(default=None, description="KV cache blocks held when prefill ended")
    blocks_after_trim: Count | None = None
    blocks_at_end: Count | None = None
    eviction_ratio: Share | None = Field(
        default=None, description="share of the blocks after prefill that the trim freed"
    )
    preemptions: Count | None = None


class Sample(_Part):
    """A look at the engine while it served. Times rise within a leg."""

    t_s: float = Field(description="seconds since the leg began; negative while warming up")
    pool_bytes_in_use: Count | None = None
    eviction_ratio: Share | None = Field(default=None, description="freed by trims so far, of all that prefills took")
    device_memory_bytes: Count | None = Field(default=None, description="used on the GPU, as NVML says")
    process_memory_bytes: Count | None = Field(default=None, description="resident, engine processes together")
    attention_ms: Amount | None = Field(
        default=None, description="time in attention of a decode step, all layers; kvprofile does not fill it"
    )
    running: Count | None = None
    waiting: Count | None = None


class Memory(_Part):
    """Peaks over a leg, and what ran out."""

    pool_bytes_peak: Count | None = None
    device_memory_bytes_peak: Count | None = None
    process_memory_bytes_peak: Count | None = None
    preemptions: Count | None = None


class Attention(_Part):
    """Attention latency, from a pass of its own in eager mode: operations cannot be timed inside CUDA graphs."""

    mean_ms: Amount | None = Field(default=None, description="of a decode step, all layers")
    median_ms: Amount | None = None
    p99_ms: Amount | None = None
    steps: Count | None = None
    context_tokens: Count | None = None
    how: Line = ""


class Cost(_Part):
    """What a leg cost, by the prices it was given."""

    amount: Amount
    currency: Annotated[str, Field(pattern=r"^[A-Z]{3}$")]
    input_per_million_tokens: Amount | None = None
    output_per_million_tokens: Amount | None = None


class Bound(_Part):
    """The most that trimming can gain, printed next to what it gained: 1 / (r + (1 - r) * (S + W) / n)."""

    speedup: Annotated[float, Field(ge=1)] = Field(description="the bound, over a leg that keeps everything")
    reached: Amount | None = Field(default=None, description="output throughput over the baseline's")
    fraction: Amount | None = Field(default=None, description="reached / speedup")
    context_tokens: Count | None = Field(default=None, description="n")
    how: Line = Field(default="", description="what the bound assumes")

    @model_validator(mode="after")
    def _agrees(self) -> Self:
        if self.fraction is None or self.reached is None:
            return self
        if not math.isclose(self.fraction, self.reached / self.speedup, rel_tol=1e-3, abs_tol=1e-6):
            raise ValueError("fraction is not reached / speedup")
        return self


class Heads(_Part):
    """The budgets that were in force."""

    budgets: Matrix = Field(description="[L][G], share of the context each KV head keeps; null rows slide")
    method: Line | None = Field(default=None, description="what ranked the heads")
    statistic: Line | None = None
    profile_sha256: Sha256 | None = None
    sink_tokens: Count | None = None
    recent_tokens: Count | None = None

    @model_validator(mode="after")
    def _even(self) -> Self:
        if not self.budgets or len({len(row) for row in self.budgets}) != 1 or not self.budgets[0]:
            raise ValueError("budgets is not a matrix")
        if any(value is not None and not 0 <= value <= 1 for row in self.budgets for value in row):
            raise ValueError("budgets has a value outside [0, 1]")
        return self


class Leg(_Part):
    """One pass of one load over one engine or provider."""

    name: Name = Field(description="'baseline', '0.7', 'remote'; legs of one name are repetitions")
    kind: Literal["local", "remote"] | None = Field(description="null where a foreign result file does not say")
    repetition: Count = 0
    status: Literal["ok", "failed"]
    reason: Line | None = Field(default=None, description="one line: why it failed")
    started: Time | None = None
    compressed: bool | None = Field(default=None, description="whether budgets were in force; null where unknown")
    retention_asked: Share | None = Field(
        default=None, description="1 for a local leg without budgets, null for remote"
    )
    retention_realised: Share | None = Field(default=None, description="mean of the heads' budgets, null for remote")
    provider: Name | None = Field(default=None, description="of a remote leg")
    engine: Line | None = Field(default=None, description="'vllm 0.32.0'")
    model: Name
    dtype: Name | None = None
    kv_cache_dtype: Name | None = Field(
        default=None,
        description="of the cache, as vLLM is told it, where that is not the model's: 'fp8'; left out otherwise",
        exclude_if=lambda name: name is None,
    )
    device: Line | None = Field(default=None, description="'cpu', 'cuda: NVIDIA H100'")
    pool_bytes: Count | None = Field(default=None, description="KV cache pool that the engine preallocated")
    block_tokens: int | None = Field(default=None, ge=1)
    load: Load
    documents: list[Document] = []
    seeds: list[int] = []
    metrics: Metrics = Metrics()
    requests: list[Request] = []
    samples: list[Sample] = []
    memory: Memory = Memory()
    eviction_ratio: Share | None = Field(default=None, description="freed by trims, of all blocks that prefills took")
    attention: Attention | None = None
    bound: Bound | None = None
    cost: Cost | None = None
    heads: Heads | None = None
    warnings: list[Line] = Field(default=[], description="what a reader of this leg should know")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        problems = list(self._problems())
        if problems:
            raise ValueError("; ".join(problems))
        return self

    def _problems(self) -> Iterator[str]:
        if (self.status == "failed") != (self.reason is not None):
            yield "a failed leg has a reason, and only a failed one"
        if self.kind == "remote" and (self.retention_asked is not None or self.retention_realised is not None):
            yield "a remote leg has no retention"
        if any(later.t_s < earlier.t_s for earlier, later in zip(self.samples, self.samples[1:], strict=False)):
            yield "samples are not in the order of their times"
        names = [document.name for document in self.documents]
        if len(set(names)) != len(names):
            yield "two documents have one name"
        unknown = {request.document for request in self.requests} - {None, *names}
        if unknown and names:
            yield f"a request is about {min(map(str, unknown))!r}, which is not one of the documents"


class RunRecord(_Part):
    """A run record: one file, ``<anything>.json``."""

    format: Literal["kvprofile-run"] = "kvprofile-run"
    schema_version: Literal[1] = 1
    kvprofile_version: Name
    experiment: Experiment
    provenance: Provenance
    legs: list[Leg] = Field(min_length=1)
