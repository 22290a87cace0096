"""``kvprofile bench``: baseline against retentions on vLLM, and against remote providers."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from kvprofile.cli.output import print_json, say, stdout_console

if TYPE_CHECKING:
    from kvprofile.bench.prepare import Prepared
    from kvprofile.records.record import Leg, RunRecord


def bench(
    model: Annotated[str, typer.Option(help="A checkpoint folder or a hub id, as vLLM takes it.")],
    retention: Annotated[
        list[float] | None, typer.Option(help="A leg with budgets; repeatable; 0.9, 0.7 and 0.5 unless given.")
    ] = None,
    profile: Annotated[
        Path | None, typer.Option(help="Budget file; models/kv_budget/<model>.json unless given.")
    ] = None,
    documents: Annotated[
        list[str] | None,
        typer.Option(
            help="bundled, pocket[:SEED], a folder of .md with .json beside, or a .jsonl of exercises; repeatable."
        ),
    ] = None,
    provider: Annotated[
        list[str] | None, typer.Option(help="A leg at a provider of the providers table; repeatable.")
    ] = None,
    provider_model: Annotated[str | None, typer.Option(help="The provider's model; its only one unless given.")] = None,
    providers: Annotated[
        Path | None, typer.Option(help="TOML file of providers; ./providers.toml unless given.")
    ] = None,
    preset: Annotated[
        str | None, typer.Option(help="seed: baseline, 0.9, 0.7, 0.5 and a provider, twice, over three documents.")
    ] = None,
    baseline: Annotated[bool, typer.Option("--baseline/--no-baseline", help="A leg without budgets.")] = True,
    local: Annotated[bool, typer.Option("--local/--remote-only", help="Legs on this machine's vLLM.")] = True,
    load: Annotated[
        str, typer.Option(help="closed: fixed concurrency; open: --request-rate; fill: as many as the pool holds.")
    ] = "closed",
    concurrency: Annotated[int, typer.Option(help="Most requests in flight.")] = 8,
    request_rate: Annotated[float | None, typer.Option(help="Requests per second of an open load (Poisson).")] = None,
    requests: Annotated[int | None, typer.Option(help="Requests of a leg; every question once unless given.")] = None,
    warmup_requests: Annotated[int, typer.Option(help="Requests before the clock starts.")] = 2,
    max_output_tokens: Annotated[int, typer.Option(help="Most tokens of an answer.")] = 64,
    ignore_eos: Annotated[
        bool, typer.Option("--ignore-eos", help="Answers of exactly --max-output-tokens: for speed, not for quality.")
    ] = False,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    unique_prefix: Annotated[
        bool,
        typer.Option("--unique-prefix/--same-prefix", help="Begin each request with other words, against caches."),
    ] = True,
    repetitions: Annotated[
        int | None, typer.Option(help="How often each leg runs; every other time backwards.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of openings, arrivals and sampling.")] = 0,
    verifier: Annotated[
        list[str] | None,
        typer.Option(
            help="A built-in verifier, package.module:function or exec:PROGRAM; repeatable; all built-in unless given."
        ),
    ] = None,
    dtype: Annotated[str, typer.Option(help="vLLM's dtype.")] = "auto",
    max_model_len: Annotated[int | None, typer.Option(help="vLLM's longest request, in tokens.")] = None,
    block_tokens: Annotated[int | None, typer.Option(help="vLLM's block size.")] = None,
    pool_memory: Annotated[
        str | None, typer.Option(help="Size of the cache pool, like 8GiB; the same for all legs.")
    ] = None,
    tensor_parallel_size: Annotated[int, typer.Option(help="GPUs of one engine.")] = 1,
    max_num_seqs: Annotated[int | None, typer.Option(help="vLLM's most requests in a batch.")] = None,
    enforce_eager: Annotated[bool, typer.Option("--enforce-eager", help="No graphs, no compilation.")] = False,
    prefix_caching: Annotated[
        bool, typer.Option("--prefix-caching/--no-prefix-caching", help="vLLM's prefix caching.")
    ] = False,
    engine_arg: Annotated[
        list[str] | None, typer.Option(help="Another argument of `vllm serve`, word for word; repeatable.")
    ] = None,
    attention: Annotated[
        bool, typer.Option("--attention/--no-attention", help="Time attention in an eager pass of its own.")
    ] = True,
    output: Annotated[
        Path | None, typer.Option(help="Folder of the run; runs/bench/<model>/<settings> unless given.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what would be done, needed and paid.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace a benchmark with other settings.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the run record, or the plan, as JSON.")] = False,
) -> None:
    """Compare vLLM with and without budgets, and remote providers. Run it again after an interruption to continue."""
    from kvprofile.bench import prepare
    from kvprofile.bench.scenario import EngineOptions, LoadPlan

    pool_bytes = None if pool_memory is None else prepare.parse_size(pool_memory, "--pool-memory")
    wish = prepare.Wish(
        model=model,
        profile=profile,
        retentions=tuple(retention or ()),
        baseline=baseline,
        local=local,
        documents=tuple(documents or ()),
        providers=tuple(provider or ()),
        providers_file=providers,
        provider_model=provider_model,
        verifiers=tuple(verifier or ()),
        repetitions=repetitions,
        seed=seed,
        attention_pass=attention,
        preset=preset,
        load=LoadPlan(
            mode=_mode(load),
            concurrency=concurrency,
            request_rate=request_rate,
            requests=requests,
            warmup_requests=warmup_requests,
            max_output_tokens=max_output_tokens,
            ignore_eos=ignore_eos,
            temperature=temperature,
            unique_prefix=unique_prefix,
        ),
        engine=EngineOptions(
            dtype=dtype,
            max_model_len=max_model_len,
            block_tokens=block_tokens,
            pool_bytes=pool_bytes,
            enforce_eager=enforce_eager,
            tensor_parallel_size=tensor_parallel_size,
            max_num_seqs=max_num_seqs,
            prefix_caching=prefix_caching,
            extra=tuple(engine_arg or ()),
        ),
    )
    prepared = prepare.prepare(wish)
    plan = prepared.plan
    folder = output or prepare.default_folder(plan)
    if dry_run:
        described = {**prepare.described(plan, prepared.reasons), "output": str(folder)}
        if as_json:
            print_json(described)
        else:
            _render_plan(described)
        return
    from kvprofile.bench import runner

    prepare.require_installed(plan)
    _announce(prepared)
    found = runner.run(plan, folder, say, force)
    say(f"wrote {folder / 'record.json'}; 'kvprofile report {folder}' makes a page of it")
    if as_json:
        print_json(found.model_dump(mode="json"))
    else:
        _render(found)
    if any(leg.status == "failed" for leg in found.legs):
        raise typer.Exit(1)


def _mode(text: str) -> Literal["closed", "open", "fill"]:
    from kvprofile.errors import InputError

    modes: dict[str, Literal["closed", "open", "fill"]] = {"closed": "closed", "open": "open", "fill": "fill"}
    if text not in modes:
        raise InputError(f"--load {text!r} is none of {', '.join(modes)}")
    return modes[text]


def _announce(prepared: Prepared) -> None:
    plan = prepared.plan
    legs = ", ".join(leg.name for leg in plan.legs)
    say(f"{plan.model_name}: {legs}; {plan.requests} requests each over {len(plan.documents)} documents")
    for reason in prepared.reasons:
        say(f"  {reason}")


def _render_plan(described: dict[str, Any]) -> None:
    """A plan for people; every line fits 80 columns unless a name is longer."""
    from rich.text import Text

    console = stdout_console()

    def line(text: str, style: str = "") -> None:
        console.print(Text(text, style=style))

    estimate = described["estimate"]
    line(f"{described['model']}: {estimate['runs_of_legs']} runs of {len(described['legs'])} legs", "bold")
    for leg in described["legs"]:
        if leg["kind"] == "remote":
            line(f"  {leg['name']}: at {leg['provider']}")
        else:
            budget = "without budgets" if leg["retention"] is None else f"retention {leg['retention']:g}"
            line(f"  {leg['name']}: vLLM on this machine, {budget}")
    line("documents", "bold")
    for document in described["documents"]:
        tokens = document["tokens_estimate"]
        line(f"  {document['name']}: {document['characters']:,} characters, {document['questions']} questions")
        line(f"    about {tokens:,} tokens of a large vocabulary")
    line("each run of a leg", "bold")
    line(f"  {estimate['requests_per_leg']} requests, about {estimate['input_tokens_per_leg']:,} tokens in,")
    line(f"  at most {estimate['output_tokens_per_leg_at_most']:,} out")
    for name, cost in estimate["cost_at_most"].items():
        said = "cost unknown: no prices in the providers table"
        if cost["amount"] is not None:
            said = f"at most {cost['amount']:.2f} {cost['currency']} in all"
        line(f"  {name}: {said}")
    line(f"output: {described['output']}")
    for reason in described["reasons"]:
        line(reason, "dim")
    for problem in described["missing"]:
        line(f"missing: {problem}", "bold")


def _render(found: RunRecord) -> None:
    """One row for each leg, best read beside the page that ``report`` makes; fits 80 columns."""
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False)
    for name in ("leg", "done", "tokens/s", "TTFT ms", "TPOT ms", "pass %", "evicted", "bound", "reached"):
        table.add_column(name, justify="left" if name == "leg" else "right")
    for leg in found.legs:
        metrics = leg.metrics
        table.add_row(
            leg.name + (f" #{leg.repetition}" if leg.repetition else ""),
            "failed" if leg.status == "failed" else str(metrics.completed),
            _number(metrics.output_throughput),
            _number(metrics.median_ttft_ms),
            _number(metrics.median_tpot_ms),
            _percent(_pass_rate(leg)),
            _percent(leg.eviction_ratio),
            "-" if leg.bound is None else f"{leg.bound.speedup:.2f}x",
            "-" if leg.bound is None or leg.bound.reached is None else f"{leg.bound.reached:.2f}x",
        )
    console = stdout_console()
    console.print(table)
    for leg in found.legs:
        if leg.reason is not None:
            console.print(Text(f"{leg.name}: {leg.reason}", style="bold"))
        for warning in leg.warnings:
            console.print(Text(f"{leg.name}: {warning}", style="dim"))


def _pass_rate(leg: Leg) -> float | None:
    """Share of outputs that hold what is expected; None where nothing was asked for."""
    verdicts = [
        verdict.passed
        for request in leg.requests
        for verdict in request.verdicts
        if verdict.name in ("expected", "pattern", "json-schema") and verdict.passed is not None
    ]
    return sum(verdicts) / len(verdicts) if verdicts else None


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.0f}"
