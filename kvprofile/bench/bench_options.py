"""What can be asked of a benchmark: every option once, with its type, its default, its name and its help.

``kvprofile bench`` builds its command line from these fields (``kvprofile.cli.declared``). An option is called as its
field unless ``typer.Option`` says otherwise.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal, get_args

import typer

from kvprofile.errors import InputError
from kvprofile.files import BUDGET_DIR
from kvprofile.sizes import MAX_BYTES, parse_size

MOST = 1_000_000

LoadMode = Literal["closed", "open", "fill"]


def _load_mode(text: str) -> str:
    if text not in get_args(LoadMode):
        raise InputError(f"--load {text!r} is not one of {', '.join(get_args(LoadMode))}")
    return text


def _pool_bytes(text: str) -> int:
    size = parse_size(text)
    if size is None:
        raise InputError(f"--pool-memory {text!r} is not a size; give a number with its unit, like 64MiB or 4GiB")
    if not 1 <= size < MAX_BYTES:
        raise InputError(f"--pool-memory {text!r} must lie between 1 byte and 1 EiB")
    return int(size)


@dataclass(frozen=True)
class LoadPlan:
    """How requests are sent. ``fill`` looks for the concurrency itself, up to ``concurrency``."""

    mode: Annotated[
        LoadMode,
        typer.Option(
            "--load",
            parser=_load_mode,
            help="closed: fixed concurrency; open: --request-rate; fill: as many as the pool holds.",
        ),
    ] = "closed"
    concurrency: Annotated[int | None, typer.Option(help="Most requests in flight.")] = 8
    request_rate: Annotated[float | None, typer.Option(help="Requests per second of an open load (Poisson).")] = None
    requests: Annotated[int | None, typer.Option(help="Requests of a leg; every question once unless given.")] = None
    warmup_requests: Annotated[int, typer.Option(help="Requests before the clock starts.")] = 2
    max_output_tokens: Annotated[int, typer.Option(help="Most tokens of an answer.")] = 64
    ignore_eos: Annotated[
        bool, typer.Option("--ignore-eos", help="Answers of exactly --max-output-tokens: for speed, not for quality.")
    ] = False
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0
    unique_prefix: Annotated[
        bool,
        typer.Option("--unique-prefix/--same-prefix", help="Begin each request with other words, against caches."),
    ] = True

    def __post_init__(self) -> None:
        least = {"concurrency": 1, "requests": 1, "warmup_requests": 0, "max_output_tokens": 1}
        for name, bound in least.items():
            value = getattr(self, name)
            if value is not None and not bound <= value <= MOST:
                raise InputError(f"--{name.replace('_', '-')} must lie between {bound} and {MOST:,}, not {value}")
        if self.mode == "open" and (self.request_rate is None or not 0 < self.request_rate <= MOST):
            raise InputError("an open load needs --request-rate above 0, in requests per second")
        if self.mode != "open" and self.request_rate is not None:
            raise InputError("--request-rate is for --load open")
        if self.mode == "fill" and self.concurrency is None:
            raise InputError("--load fill needs --concurrency, the most to try")
        if not 0 <= self.temperature <= 10:
            raise InputError(f"--temperature must lie between 0 and 10, not {self.temperature:g}")


@dataclass(frozen=True)
class EngineOptions:
    """How vLLM is started for local legs; None leaves the choice to vLLM."""

    dtype: Annotated[str, typer.Option(help="vLLM's dtype.")] = "auto"
    max_model_len: Annotated[int | None, typer.Option(help="vLLM's longest request, in tokens.")] = None
    block_tokens: Annotated[int | None, typer.Option(help="vLLM's block size.")] = None
    pool_bytes: Annotated[
        int | None,
        typer.Option(
            "--pool-memory",
            parser=_pool_bytes,
            help="Size of the cache pool, like 8GiB; the same for all legs.",
        ),
    ] = None
    tensor_parallel_size: Annotated[int, typer.Option(help="GPUs of one engine.")] = 1
    data_parallel_size: Annotated[int, typer.Option(help="Replicas behind one engine's port.")] = 1
    max_num_seqs: Annotated[int | None, typer.Option(help="vLLM's most requests in a batch.")] = None
    enforce_eager: Annotated[bool, typer.Option("--enforce-eager", help="No graphs, no compilation.")] = False
    prefix_caching: Annotated[
        bool, typer.Option("--prefix-caching/--no-prefix-caching", help="vLLM's prefix caching.")
    ] = False
    extra: Annotated[
        tuple[str, ...],
        typer.Option("--engine-arg", help="Another argument of `vllm serve`, word for word; repeatable."),
    ] = ()
    start_timeout_s: float = 1800.0


@dataclass(frozen=True)
class BenchOptions:
    """What a user asked for; None and empty leave the choice to the preset and the defaults."""

    model: Annotated[str, typer.Option(help="A checkpoint folder or a hub id, as vLLM takes it.")]
    retentions: Annotated[
        tuple[float, ...],
        typer.Option("--retention", help="A leg with budgets; repeatable; 0.9, 0.7 and 0.5 unless given."),
    ] = ()
    kinds: Annotated[
        tuple[str, ...],
        typer.Option(
            "--kind",
            help="Heads of legs with budgets: whole or graded; repeatable; without, graded where the file has a probe.",
        ),
    ] = ()
    kv_cache_dtypes: Annotated[
        tuple[str, ...],
        typer.Option(
            "--kv-cache-dtype",
            help="Dtype of the cache, as vLLM's: auto, fp8; repeatable, with local legs for each; auto unless given.",
        ),
    ] = ()
    profile: Annotated[Path | None, typer.Option(help=f"Budget file; {BUDGET_DIR}/<model>.json unless given.")] = None
    documents: Annotated[
        tuple[str, ...],
        typer.Option(
            help="bundled, pocket[:SEED], a folder of .md with .json next to it, or a .jsonl of exercises; repeatable."
        ),
    ] = ()
    providers: Annotated[
        tuple[str, ...],
        typer.Option("--provider", help="A leg at a provider of the providers table; repeatable."),
    ] = ()
    provider_model: Annotated[str | None, typer.Option(help="The provider's model; its only one unless given.")] = None
    providers_file: Annotated[
        Path | None, typer.Option("--providers", help="TOML file of providers; ./providers.toml unless given.")
    ] = None
    preset: Annotated[
        str | None, typer.Option(help="seed: baseline, 0.9, 0.7, 0.5 and a provider, twice, over three documents.")
    ] = None
    baseline: Annotated[bool, typer.Option("--baseline/--no-baseline", help="A leg without budgets.")] = True
    local: Annotated[bool, typer.Option("--local/--remote-only", help="Legs on this machine's vLLM.")] = True
    load: LoadPlan = field(default_factory=LoadPlan)
    repetitions: Annotated[int | None, typer.Option(help="How often each leg runs; every other time backwards.")] = None
    seed: Annotated[int, typer.Option(help="Seed of openings, arrivals and sampling.")] = 0
    verifiers: Annotated[
        tuple[str, ...],
        typer.Option(
            "--verifier",
            help="A built-in verifier, package.module:function or exec:PROGRAM; repeatable; all built-in unless given.",
        ),
    ] = ()
    engine: EngineOptions = field(default_factory=EngineOptions)
    attention_pass: Annotated[
        bool, typer.Option("--attention/--no-attention", help="Time attention in an eager pass of its own.")
    ] = True
