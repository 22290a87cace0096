"""``kvprofile export``: a budget file in the form that another tool reads."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kvprofile.budget import formats
from kvprofile.budget.allocate import UNCONSTRAINED, Allocation, Constraints, pipeline_split
from kvprofile.budget.formats import FORMATS
from kvprofile.budget.formats.base import Export, Format, refuse_other
from kvprofile.budget.trim import GRADED, WHOLE
from kvprofile.cli.output import load_profile, print_json
from kvprofile.errors import InputError, plain


def export(
    profile: Annotated[str, typer.Argument(metavar="MODEL_OR_FILE", help="A budget file, or the name of its model.")],
    output: Annotated[Path, typer.Option(help="File to write; a folder for duo-attention.")],
    format_name: Annotated[str, typer.Option("--format", help=f"Form to write: {', '.join(FORMATS)}.")],
    retention: Annotated[
        float | None,
        typer.Option(help="Share of the KV heads that keep the whole context, or that graded heads keep of it."),
    ] = None,
    kind: Annotated[
        str | None,
        typer.Option(
            help="whole or graded heads; where a form holds both, graded unless given if the file has a probe."
        ),
    ] = None,
    tensor_parallel_size: Annotated[
        int, typer.Option(help="Ranks; each gets equally many full heads of a layer.", min=1)
    ] = 1,
    pipeline_parallel_size: Annotated[int, typer.Option(help="Stages; full heads are balanced over them.", min=1)] = 1,
    floor: Annotated[int, typer.Option(help="Full heads that every layer keeps at least.", min=0)] = 0,
    force: Annotated[bool, typer.Option("--force", help="Replace an output that may be another model's.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print what was written as JSON.")] = False,
) -> None:
    """Write a budget file in the form of vLLM's plugin, KVzip, DuoAttention, LU-KV or a table."""
    form = formats.get(format_name)
    found = load_profile(profile)
    layers = found.model.geometry.layers
    constraints = Constraints(
        floor=floor,
        tensor_parallel_size=tensor_parallel_size,
        pipeline_stages=pipeline_split(layers, pipeline_parallel_size) if pipeline_parallel_size > 1 else (),
    )
    if form.holds == "scores" and kind is not None:
        raise InputError(f"{form.name} files hold scores, not budgets; leave out --kind")
    if form.holds == "scores" and constraints != UNCONSTRAINED:
        raise InputError(f"{form.name} files hold scores, not a choice of heads, so they cannot carry constraints")
    job = Export(found, constraints, retention, kind)
    report = summary(job, form, output)
    refuse_other(output, form.model_of(output), found.model.name, force=force)
    form.write(job, output)
    if as_json:
        print_json(report)
    else:
        render(report)


WITHOUT_GRADED = "a runtime file holds whole heads; for graded ones give vLLM the budget file with its probe"


def summary(job: Export, form: Format, output: Path) -> dict[str, object]:
    """What ``export --json`` prints.

    Figures of a choice of heads are null where the file holds none.
    """
    chosen: Allocation | None = None
    kind = WHOLE
    if form.needs_retention or (form.holds == "budgets" and job.retention is not None):
        choose = job.choice if form.holds_fractions else job.whole
        found = choose(job.asked_retention())
        chosen, kind = found.allocation, found.kind
    return {
        "model": job.profile.model.name,
        "format": form.name,
        "output": plain(output),
        "holds": form.holds,
        "kind": chosen and kind,
        "retention_asked": job.retention,
        "retention_realised": chosen and chosen.budgets.retention_realised,
        "full_heads": chosen and chosen.full_heads,
        "heads": chosen and chosen.heads,
        "constrained": job.constraints != UNCONSTRAINED,
        "reason": chosen and chosen.reason,
        "heads_exchanged": chosen and chosen.heads_exchanged,
        "score_share": chosen and chosen.score_share,
        "stage_full_heads": chosen and list(chosen.stage_full_heads),
        "left_out": WITHOUT_GRADED if form.name == "vllm" and job.profile.probe is not None else None,
        "advice": form.advice(job),
    }


def render(report: dict[str, object]) -> None:
    """Say what was written, where the retention moved and why, and what the constraints cost."""
    typer.echo(f"wrote {report['output']}: {report['format']}, {report['model']}")
    if report["kind"] == GRADED:
        typer.echo(
            f"{report['heads']} heads keep {report['retention_realised']:.1%} of what lies between sinks and window "
            f"(retention {report['retention_asked']:g} asked)"
        )
    elif report["holds"] == "budgets" and report["full_heads"] is not None:
        typer.echo(
            f"{report['full_heads']} of {report['heads']} heads keep the whole context "
            f"(retention {report['retention_asked']:g} asked, {report['retention_realised']:.4f} realised)"
        )
        if report["left_out"]:
            typer.echo(report["left_out"])
        if report["reason"]:
            typer.echo(f"{'not as asked: ' if report['constrained'] else ''}{report['reason']}")
        if report["constrained"] and report["heads_exchanged"]:
            heads = "head" if report["heads_exchanged"] == 1 else "heads"
            typer.echo(
                f"the constraints exchange {report['heads_exchanged']} {heads} and keep {report['score_share']:.1%} of "
                "the score that as many heads could have"
            )
    if report["advice"]:
        typer.echo(report["advice"])
