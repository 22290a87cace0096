"""``kvprofile score``: profile a checkpoint and write its budget file."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvprofile.cli.output import print_json, say, stdout_console

if TYPE_CHECKING:
    from rich.progress import TaskID

    from kvprofile.budget.profile import Profile


def score(
    model: Annotated[str, typer.Argument(help="A checkpoint folder or a hub id.")],
    corpus: Annotated[
        list[str] | None,
        typer.Option(
            help="Bundled name, file, folder, '-' (JSON lines), generate:KIND or datasets:ID; repeatable. "
            "All bundled corpora unless given."
        ),
    ] = None,
    context_tokens: Annotated[
        int | None, typer.Option(help="Use the first N tokens of each document; whole documents unless given.")
    ] = None,
    chunk_tokens: Annotated[int, typer.Option(help="Tokens repeated at a time.")] = 2000,
    documents: Annotated[int | None, typer.Option(min=1, help="Use the first N documents of each corpus.")] = None,
    method: Annotated[str, typer.Option(help="Scoring method: kvzip.")] = "kvzip",
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    engine: Annotated[str, typer.Option(help="What runs the model: hf.")] = "hf",
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub id.")] = None,
    sink_tokens: Annotated[int, typer.Option(help="First tokens that a head without a budget keeps.")] = 128,
    recent_tokens: Annotated[int, typer.Option(help="Last tokens that a head without a budget keeps.")] = 256,
    seed: Annotated[int, typer.Option(help="Recorded in the file.")] = 0,
    output: Annotated[
        Path | None, typer.Option(help="Budget file; models/kv_budget/<model>.json unless given.")
    ] = None,
    save_token_scores: Annotated[
        Path | None, typer.Option(help="Also write every token score to this .safetensors file.")
    ] = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run code that the checkpoint brings.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace the budget file of another model.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print a summary as JSON.")] = False,
) -> None:
    """Profile a checkpoint and write its budget file. Run it again after an interruption to continue."""
    from kvprofile import checkpoint
    from kvprofile.budget import store
    from kvprofile.corpus.sources import bundled_names, load_corpus
    from kvprofile.errors import InputError
    from kvprofile.files import require_writable
    from kvprofile.scoring import run

    if engine != "hf":
        raise InputError(f"unknown engine {engine!r}; known: hf")
    options = run.Options(method, chunk_tokens, context_tokens, seed, sink_tokens, recent_tokens)
    corpora = [load_corpus(reference, documents) for reference in corpus or bundled_names()]
    source = checkpoint.locate(model, revision, trust_remote_code)
    target = output or store.BUDGET_DIR / store.file_name(source.name)
    require_writable(target)
    if save_token_scores is not None:
        run.refuse_token_score_file(save_token_scores, target, force)
    description = checkpoint.describe(source, trust_remote_code)
    if not force:
        store.refuse_other_model(target, source.name, description.geometry)
    tokenizer = checkpoint.load_tokenizer(source, trust_remote_code)
    planned = run.plan(description, tokenizer, corpora, options)
    placement = checkpoint.place(description, dtype, device, planned.positions)

    say(f"{source.name}: {description.geometry.describe()}, {description.architecture}")
    for reason in placement.reasons:
        say(f"  {reason}")
    skipped = len(description.geometry.layer_types) - len(description.geometry.profiled_layers)
    if skipped:
        say(f"  {skipped} sliding-window layers keep no context and are not scored")
    tokens = sum(record.tokens for record in planned.corpora)
    say(f"  {len(planned.documents)} documents of {len(planned.corpora)} corpora, {tokens:,} tokens of context")

    started = time.monotonic()
    with _Progress() as progress:
        made = run.profile(planned, placement, target, progress, save_token_scores)
    store.save(made, target)
    run.finish(target)
    say(f"wrote {target} in {time.monotonic() - started:.0f} s; review and commit it")
    _print_result(made, target, save_token_scores, as_json)


def _print_result(made: Profile, target: Path, token_scores: Path | None, as_json: bool) -> None:
    from kvprofile.cli import show

    statistic = made.scoring.statistic
    budgets, origin = show.budgets_for(made, 0.5, statistic)
    if as_json:
        result = show.summary(made, statistic, budgets, origin)
        print_json({**result, "file": str(target), "token_scores": str(token_scores) if token_scores else None})
    else:
        show.render(made, statistic, budgets, origin, stdout_console())


class _Progress:
    """A bar with the time left on a terminal, a plain line every ten seconds elsewhere; both on stderr."""

    def __init__(self) -> None:
        self._bar: Any = None
        self._task: TaskID | None = None
        self._total = self._read = 0
        self._started = self._said = time.monotonic()

    def __enter__(self) -> _Progress:
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

            columns = (
                TextColumn("scoring"),
                BarColumn(),
                TextColumn("{task.completed:,.0f} of {task.total:,.0f} tokens"),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
            )
            self._bar = Progress(*columns, console=Console(stderr=True))
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def start(self, total: int) -> None:
        self._total, self._started = total, time.monotonic()
        if self._bar is not None:
            self._task = self._bar.add_task("scoring", total=total)

    def advance(self, tokens: int) -> None:
        self._read += tokens
        if self._bar is not None:
            self._bar.advance(self._task, tokens)
        elif time.monotonic() - self._said >= 10:
            self._said = time.monotonic()
            left = (self._said - self._started) / self._read * (self._total - self._read)
            say(f"  {self._read:,} of {self._total:,} tokens read, about {left:.0f} s left")

    def say(self, message: str) -> None:
        if self._bar is not None:
            self._bar.console.print(f"  {message}", markup=False)
        else:
            say(f"  {message}")
