"""``kvprofile verify``: whether vLLM with the plugin serves right on this machine, written down where it does."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from kvprofile.cli.declared import options_of
from kvprofile.cli.output import print_json, say, stdout_console
from kvprofile.verify.procedure import Prepared, Verification, prepare
from kvprofile.verify.procedure import verify as run
from kvprofile.verify.verify_options import VerifyOptions

SHOWN = 5
"""Problems of a check that are printed."""


@options_of(VerifyOptions)
def verify(
    options: VerifyOptions,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what would be started, and start nothing.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON.")] = False,
) -> None:
    """Prove on this machine that vLLM serves budgets right, and attest it next to the budget file."""
    prepared = prepare(options)
    plan = prepared.plan
    if dry_run:
        document = _planned(prepared)
        if as_json:
            print_json(document)
        else:
            for name, value in document.items():
                stdout_console().print(Text(f"{name}: {value}"), soft_wrap=True)
        return
    say(f"{prepared.description.source.name}: {len(plan.requests)} requests of up to {plan.max_model_len:,} tokens")
    for budget in prepared.budgets:
        say(f"  {budget.kind} heads, {budget.origin}")
    found = run(prepared, say)
    if as_json:
        print_json(_document(found))
    else:
        _render(found)
    if not found.attested:
        raise typer.Exit(1)


def _planned(prepared: Prepared) -> dict[str, Any]:
    plan = prepared.plan
    return {
        "budgets": "; ".join(f"{each.kind} heads, {each.origin}" for each in prepared.budgets),
        "engines": 1 + (3 if prepared.without_simulation else 2) * len(prepared.budgets),
        "requests": len(plan.requests),
        "prompt_tokens": sum(len(request.prompt) for _, request in plan.requests),
        "output_tokens": sum(request.max_tokens for _, request in plan.requests),
        "longest_request": plan.max_model_len,
        "pool_bytes": prepared.arguments["kv_cache_memory_bytes"],
        "without_simulation": prepared.without_simulation,
        "attestation": str(prepared.path),
    }


def _document(found: Verification) -> dict[str, Any]:
    results = [
        {
            "kind": each.kind,
            "origin": each.origin,
            "good": each.good,
            "checks": [
                {"name": check.name, "good": check.good, "detail": check.detail, "problems": list(check.problems)}
                for check in each.findings
            ],
            "seconds_per_token": each.seconds,
            "key": None if each.key is None else dict(each.key),
        }
        for each in found.results
    ]
    path = str(found.path) if any(each.good for each in found.results) else None
    return {"results": results, "attestation": path, "ok": found.attested}


def _render(found: Verification) -> None:
    console = stdout_console()
    for result in found.results:
        table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
        for check in result.findings:
            words = [check.detail, *check.problems[:SHOWN]]
            if len(check.problems) > SHOWN:
                words.append(f"and {len(check.problems) - SHOWN} more")
            style = "green" if check.good else "red"
            table.add_row(Text("ok" if check.good else "bad", style), check.name, Text("\n".join(words)))
        seconds = [f"{1000 * value:.3g} ms {name}" for name, value in result.seconds.items() if value is not None]
        if seconds:
            more = " (which fills freed blocks)" if result.poisoned else ""
            table.add_row(Text("--", "dim"), "time for a token", Text(", ".join(seconds) + more))
        console.print(Text(f"{result.kind} heads, {result.origin}"))
        console.print(table)
    for good, told in ((True, f"attested in {found.path}"), (False, "not attested")):
        kinds = [each.kind for each in found.results if each.good is good]
        if kinds:
            console.print(Text(f"{told}: {' and '.join(kinds)} heads", "bold"), soft_wrap=True)
