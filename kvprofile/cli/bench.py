"""``kvprofile bench``: baseline against retentions on vLLM, and against remote providers."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from kvprofile.bench import prepare
from kvprofile.bench.bench_options import BenchOptions
from kvprofile.bench.prepare import Prepared
from kvprofile.budget.trim import GRADED
from kvprofile.cli.declared import options_of
from kvprofile.cli.output import print_json, say, stdout_console
from kvprofile.records.record import Leg, RunRecord


@options_of(BenchOptions)
def bench(
    options: BenchOptions,
    output: Annotated[
        Path | None, typer.Option(help="Folder of the run; runs/bench/<model>/<settings> unless given.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what would be done, needed and paid.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace a benchmark with other settings.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the run record, or the plan, as JSON.")] = False,
) -> None:
    """Compare vLLM with and without budgets, and remote providers. Run it again after an interruption to continue."""
    prepared = prepare.prepare(options)
    plan = prepared.plan
    folder = output or prepare.default_folder(plan)
    if dry_run:
        described = {**prepare.described(plan, prepared.reasons), "output": str(folder)}
        if as_json:
            print_json(described)
        else:
            _render_plan(described)
        return
    from kvprofile.bench import runner  # NumPy and what measures, which the help and a plan can do without

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


def _announce(prepared: Prepared) -> None:
    plan = prepared.plan
    legs = ", ".join(leg.name for leg in plan.legs)
    say(f"{plan.model_name}: {legs}; {plan.requests} requests each over {len(plan.documents)} documents")
    for reason in prepared.reasons:
        say(f"  {reason}")


def _render_plan(described: dict[str, Any]) -> None:
    """A plan for people; every line fits 80 columns unless a name is longer."""
    console = stdout_console()

    def line(text: str, style: str = "") -> None:
        console.print(Text(text, style=style))

    estimate = described["estimate"]
    line(f"{described['model']}: {estimate['runs_of_legs']} runs of {len(described['legs'])} legs", "bold")
    for leg in described["legs"]:
        if leg["kind"] == "remote":
            line(f"  {leg['name']}: at {leg['provider']}")
        else:
            kind = "graded heads, " if leg["heads"] == GRADED else ""
            budget = "without budgets" if leg["retention"] is None else f"{kind}retention {leg['retention']:g}"
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
    """One row for each leg, best read next to the page that ``report`` makes; fits 80 columns."""
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
