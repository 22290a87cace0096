"""``kvprofile evaluate``: how much of a model's answers a budget keeps, next to controls."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from kvprofile import checkpoint
from kvprofile.budget import store
from kvprofile.budget.choice import require_kind
from kvprofile.budget.dtypes import PLAIN
from kvprofile.budget.profile import PRESETS
from kvprofile.budget.trim import DEFAULT_WINDOW, GRADED, WHOLE
from kvprofile.cli import quality_table
from kvprofile.cli.output import load_profile, print_json, resolve_profile, say, stdout_console
from kvprofile.cli.progress_bar import TokenProgress
from kvprofile.errors import InputError
from kvprofile.evaluate.options import EvaluationOptions
from kvprofile.evaluate.variants import Contender, contenders
from kvprofile.files import BUDGET_DIR, require_writable
from kvprofile.questions.columns import Columns
from kvprofile.questions.tasks import CONTINUED_TOKENS, DEFAULT_TASKS, TASKS
from kvprofile.report import plots, quality_plot

if TYPE_CHECKING:
    from kvprofile.evaluate.evaluation import EvaluationPlan


def evaluate(
    model: Annotated[str, typer.Argument(help="A checkpoint folder, a .gguf file or a hub id.")],
    profile: Annotated[
        list[str] | None,
        typer.Option(help=f"Budget file under test; repeatable; {BUDGET_DIR}/<model>.json unless given."),
    ] = None,
    retention: Annotated[
        list[float] | None,
        typer.Option(help="Retention to measure; repeatable; 0.9, 0.7, 0.5 and 0.3 unless given.", min=0, max=1),
    ] = None,
    kind: Annotated[
        list[str] | None,
        typer.Option(
            help="whole or graded heads; repeatable, to compare them; graded unless given, where the file has a probe."
        ),
    ] = None,
    statistic: Annotated[str | None, typer.Option(help="Rank whole heads by this statistic of the files.")] = None,
    tasks: Annotated[
        list[str] | None,
        typer.Option(
            help=f"One of {', '.join(TASKS)}, a .jsonl file of exercises, or datasets:ID_OR_PATH; repeatable; "
            f"{len(DEFAULT_TASKS)} of them unless given."
        ),
    ] = None,
    columns: Annotated[
        str | None,
        typer.Option(
            help="How to read questions of no known format: context=NAME,question=NAME,answer=NAME and, where it "
            "matters, choices=NAME, answers=any or all, measure=NAME (docs/texts-and-questions.md). answers and "
            "measure alone change how a known format is judged."
        ),
    ] = None,
    context_tokens: Annotated[
        list[int] | None, typer.Option(help="Tokens of a context; repeatable; 1000 unless given.")
    ] = None,
    contexts: Annotated[int, typer.Option(help="Contexts of each task and length.")] = 5,
    questions: Annotated[int, typer.Option(help="Most questions asked about a context.")] = 8,
    sink_tokens: Annotated[
        int | None, typer.Option(help="First tokens that a trimmed head keeps; the profile's unless given.")
    ] = None,
    recent_tokens: Annotated[
        int | None, typer.Option(help="Last tokens that a trimmed head keeps; the profile's unless given.")
    ] = None,
    block_tokens: Annotated[int, typer.Option(help="Tokens of a block, to which sinks and window are rounded.")] = 16,
    window: Annotated[
        str,
        typer.Option(
            help="anchored: trimmed heads keep all that comes after the context; sliding: the last tokens of it only."
        ),
    ] = DEFAULT_WINDOW,
    only_outside: Annotated[
        bool,
        typer.Option(
            "--only-outside/--all-positions", help="Ask only for what lies outside of sinks and window, or for all."
        ),
    ] = False,
    random_seeds: Annotated[int, typer.Option(help="Random choices of heads, or of tokens, at each retention.")] = 3,
    controls: Annotated[
        bool,
        typer.Option(
            "--controls/--no-controls",
            help="Measure controls too: random, inverted, uniform and no full heads, or other tokens and counts.",
        ),
    ] = True,
    kv_cache_dtype: Annotated[
        list[str] | None,
        typer.Option(
            help="Dtype of the cache, as vLLM's: auto, fp8 (which is fp8_e4m3) or fp8_e5m2; repeatable; auto unless "
            "given. All are compared with the full cache in auto."
        ),
    ] = None,
    own_scores: Annotated[
        bool,
        typer.Option(
            "--own-scores", help="Graded: also keep the tokens that each context's own scores choose, as a ceiling."
        ),
    ] = False,
    seed: Annotated[int, typer.Option(help="Seed of contexts, random heads and shuffled shares.")] = 0,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub id.")] = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run code that the checkpoint brings.")
    ] = False,
    batch: Annotated[int, typer.Option(help="Most rows read side by side: questions times budgets.")] = 64,
    generate: Annotated[
        bool,
        typer.Option(
            "--generate/--exact-only",
            help="Write greedy answers and look for what is expected, or count only the reference word for word.",
        ),
    ] = False,
    continued_tokens: Annotated[
        int, typer.Option(help="Most tokens of a continued text that are read, with --tasks continuation.")
    ] = CONTINUED_TOKENS,
    output: Annotated[
        Path | None, typer.Option(help="Folder of the records; runs/evaluate/<model>/<settings> unless given.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an evaluation with other settings.")] = False,
    plot: Annotated[Path | None, typer.Option(help="Also draw the result into this .png or .svg.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the summary as JSON.")] = False,
) -> None:
    """Measure how much of a model's answers each retention keeps. Run it again after an interruption to continue."""
    options = EvaluationOptions(
        retentions=tuple(retention or PRESETS),
        tasks=tuple(tasks or DEFAULT_TASKS),
        context_tokens=tuple(context_tokens or (1000,)),
        contexts=contexts,
        questions=questions,
        sink_tokens=sink_tokens,
        recent_tokens=recent_tokens,
        block_tokens=block_tokens,
        window=window,
        random_seeds=random_seeds,
        controls=controls,
        only_outside=only_outside,
        seed=seed,
        batch=batch,
        generate=generate,
        own_scores=own_scores,
        continued_tokens=continued_tokens,
        columns=Columns() if columns is None else Columns.parse(columns),
        kv_cache_dtypes=tuple(kv_cache_dtype or (PLAIN,)),
    )
    if own_scores and kind and GRADED not in kind:
        raise InputError("--own-scores is a ceiling for graded heads; add --kind graded, or leave it out")
    if plot is not None:
        plots.picture_of(plot)
        require_writable(plot)
    from kvprofile.evaluate import evaluation  # torch: seconds that wrong usage need not wait

    source = checkpoint.locate(model, revision, trust_remote_code)
    under_test = _contenders(profile or [_default_profile(source.name, model)], statistic, kind)
    description = checkpoint.describe(source, trust_remote_code)
    tokenizer = checkpoint.load_tokenizer(source, trust_remote_code)
    planned = evaluation.plan(description, tokenizer, under_test, options)
    placement = checkpoint.place(description, dtype, device, planned.cache_tokens)
    folder = output or evaluation.default_folder(planned, placement)

    _announce(planned, placement.reasons)
    started = time.monotonic()
    with TokenProgress("evaluating") as progress:
        summary = evaluation.evaluate(planned, placement, folder, progress, force)
    say(f"wrote {folder} in {time.monotonic() - started:.0f} s")
    if plot is not None:
        quality_plot.write(summary, plot)
        say(f"wrote {plot}")
    if as_json:
        print_json(summary)
    else:
        render(summary)


def _default_profile(name: str, model: str) -> str:
    """The budget file of a model. Raises InputError where there is none."""
    path = store.default_path(name)
    if not store.is_file(path):
        raise InputError(f"no budget file {path}; run 'kvprofile score {model}' first or give --profile")
    return str(path)


def _contenders(references: list[str], statistic: str | None, kinds: list[str] | None) -> list[Contender]:
    for kind in kinds or ():
        require_kind(kind)
    if statistic is not None and kinds and WHOLE not in kinds:
        raise InputError("--statistic ranks whole heads; leave it out, or add --kind whole")
    return contenders([(resolve_profile(each), load_profile(each)) for each in references], statistic, kinds)


def _announce(planned: EvaluationPlan, reasons: tuple[str, ...]) -> None:
    """What is about to be done, on stderr."""
    description, rule = planned.description, planned.rule
    say(f"{description.source.name}: {description.geometry.describe()}, {description.architecture}")
    for reason in reasons:
        say(f"  {reason}")
    for line in planned.told:
        say(f"  {line}")
    budgets = len({variant.budget for variant in planned.variants})
    say(f"  {planned.questions:,} questions on {len(planned.asked):,} contexts, {budgets} budgets each")
    blocks = f"in blocks of {rule.block_tokens}"
    kept = f"{rule.sink_tokens} sinks and the last {rule.recent_tokens} tokens"
    after = " of the context and all that follows" if rule.anchored else ""
    say(f"  trimmed heads keep {kept}{after}, {blocks}")
    for warning in planned.warnings:
        say(f"  warning: {warning}")


def render(summary: dict[str, Any]) -> None:
    """The tables and the verdict on stdout; every line fits 80 columns."""
    console = stdout_console()
    for line in quality_table.heading(summary):
        console.print(Text(line))
    console.print(quality_table.main_table(summary))
    for line in quality_table.legend(summary):
        console.print(Text(line, style="dim"))
    console.print()
    answers = quality_table.answers_table(summary)
    if answers is not None:
        console.print(answers)
        for line in quality_table.answers_legend(summary):
            console.print(Text(line, style="dim"))
    elif why := quality_table.left_out(summary):
        console.print(Text(why))
    for table in (*quality_table.span_tables(summary), *quality_table.task_tables(summary, console.width)):
        console.print()
        console.print(table)
    console.print()
    for line in quality_table.verdicts(summary):
        console.print(Text(line, style="bold"))
