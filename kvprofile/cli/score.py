"""``kvprofile score``: profile a checkpoint and write its budget file."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kvprofile import checkpoint
from kvprofile.budget import store
from kvprofile.budget.probe import path_of as probe_path
from kvprofile.budget.probe import require_replaceable, sums_bytes
from kvprofile.budget.profile import Profile
from kvprofile.cli import show
from kvprofile.cli.output import print_json, say, stdout_console
from kvprofile.cli.progress_bar import TokenProgress
from kvprofile.corpus.sources import bundled_names, load_corpus
from kvprofile.errors import InputError
from kvprofile.files import BUDGET_DIR, require_writable
from kvprofile.scoring.effort import EXACT, FAST
from kvprofile.scoring.engine import Engine, check_engine, choose_engine
from kvprofile.scoring.plan import ScoringOptions, ScoringPlan, plan
from kvprofile.scoring.shard import Shard

if TYPE_CHECKING:
    from kvprofile.scoring.estimate import RunEstimate


def score(
    model: Annotated[str, typer.Argument(help="A checkpoint folder, a .gguf file or a hub id.")],
    corpus: Annotated[
        list[str] | None,
        typer.Option(
            help="Bundled name, file, folder, '-' (JSON lines), generate:KIND or datasets:ID; repeatable. "
            "All bundled corpora unless given."
        ),
    ] = None,
    context_tokens: Annotated[
        int | None, typer.Option(help="Use the first N tokens of each document; what the model can take unless given.")
    ] = None,
    chunk_tokens: Annotated[int, typer.Option(help="Tokens repeated at a time.")] = 2000,
    documents: Annotated[int | None, typer.Option(min=1, help="Use the first N documents of each corpus.")] = None,
    method: Annotated[
        str, typer.Option(help="Scoring method: gate, kvzip, kvzip-mean, kvzip-plus or ablation (docs/scoring.md).")
    ] = "kvzip",
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    engine: Annotated[str, typer.Option(help="What runs the model: auto, hf or vllm (docs/scoring.md).")] = "auto",
    tensor_parallel_size: Annotated[int, typer.Option(help="Ranks of --engine vllm that share each layer.")] = 1,
    pipeline_parallel_size: Annotated[
        int, typer.Option(help="Groups of ranks of --engine vllm that have some of the layers each.")
    ] = 1,
    vllm_arg: Annotated[
        list[str] | None, typer.Option(help="NAME=VALUE of vLLM's own arguments, like block_size=64; repeatable.")
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub id.")] = None,
    sink_tokens: Annotated[int, typer.Option(help="First tokens that a trimmed head keeps.")] = 128,
    recent_tokens: Annotated[int, typer.Option(help="Last tokens that a trimmed head keeps.")] = 256,
    seed: Annotated[int, typer.Option(help="Recorded in the file.")] = 0,
    fast: Annotated[
        bool, typer.Option("--fast", help="Read less, for nearly the same ranking; with --method kvzip-mean.")
    ] = False,
    shard: Annotated[
        str | None, typer.Option(help="I/N: score every N-th document from the I-th, for 'merge'. I counts from 1.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print what the run needs of time and memory; load and write nothing.")
    ] = False,
    output: Annotated[Path | None, typer.Option(help=f"Budget file; {BUDGET_DIR}/<model>.json unless given.")] = None,
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
    effort = FAST if fast else EXACT
    options = ScoringOptions(method, chunk_tokens, context_tokens, seed, sink_tokens, recent_tokens, effort)
    check_engine(engine, method)
    if fast and save_token_scores is not None:
        raise InputError("--save-token-scores needs every chunk; leave out --fast")
    if fast and method != "kvzip-mean":
        raise InputError("--fast keeps the ranking by mean, not by maximum (docs/scoring.md); add --method kvzip-mean")
    part = Shard.parse(shard) if shard is not None else None
    if part and (fast or save_token_scores is not None):
        name = "--fast" if fast else "--save-token-scores"
        raise InputError(f"{name} looks at all documents together; leave it out, or leave out --shard")
    corpora = [load_corpus(reference, documents) for reference in corpus or bundled_names()]
    source = checkpoint.locate(model, revision, trust_remote_code)
    target = output or store.default_path(source.name)
    written = part.path(target) if part else target
    require_writable(written)
    from kvprofile.scoring import estimate, hf_engine, run, vllm_engine  # torch: seconds that wrong usage need not wait

    if save_token_scores is not None:
        run.refuse_token_score_file(save_token_scores, target, force)
    description = checkpoint.describe(source, trust_remote_code)
    if not force and part is None:
        store.refuse_other_model(target, source.name, description.geometry)
    tokenizer = checkpoint.load_tokenizer(source, trust_remote_code)
    planned = replace(plan(description, tokenizer, corpora, options), shard=part)
    if planned.has_middle and part is None:
        require_replaceable(probe_path(target), force)
    chosen, why = choose_engine(engine, description, method)
    runs: Engine
    if chosen == "vllm":
        if fast or dry_run:
            raise InputError(f"--{'fast' if fast else 'dry-run'} belongs to --engine hf ({why})")
        others = vllm_arg or ()
        ranks = (tensor_parallel_size, others, pipeline_parallel_size)
        runs = vllm_engine.place_in_vllm(description, dtype, device, planned.positions, *ranks)
    else:
        if tensor_parallel_size != 1 or pipeline_parallel_size != 1 or vllm_arg:
            raise InputError("--tensor-parallel-size, --pipeline-parallel-size and --vllm-arg belong to --engine vllm")
        placement = checkpoint.place(description, dtype, device, planned.positions)
        runs = hf_engine.HfEngine(placement)

    _announce(planned, (why, *runs.reasons))
    if dry_run:
        _print_estimate(estimate.estimate(planned, placement), as_json)
        return

    started = time.monotonic()
    if part:
        with TokenProgress("scoring") as progress:
            scored = run.score_shard(planned, runs, written, progress, force)
        _print_shard(part, written, len(planned.own), time.monotonic() - started if scored else None, as_json)
        return
    with TokenProgress("scoring") as progress:
        made = run.profile(planned, runs, target, progress, save_token_scores)
    if made.probe is None:
        say(f"wrote {target} in {time.monotonic() - started:.0f} s; review and commit it")
    else:
        probe = probe_path(target).name
        say(f"wrote {target} and {probe} in {time.monotonic() - started:.0f} s; review and commit both")
    _print_result(made, target, save_token_scores, as_json)


def _announce(planned: ScoringPlan, reasons: tuple[str, ...]) -> None:
    """What is about to be read, on stderr."""
    description = planned.description
    say(f"{description.source.name}: {description.geometry.describe()}, {description.architecture}")
    for reason in reasons:
        say(f"  {reason}")
    skipped = description.geometry.layers - len(description.geometry.profiled_layers)
    if skipped:
        say(f"  {skipped} layers slide over a window or have no cache, and are not scored")
    tokens = sum(record.tokens for record in planned.corpora)
    say(f"  {len(planned.documents)} documents of {len(planned.corpora)} corpora, {tokens:,} tokens of context")
    if planned.shard:
        say(f"  shard {planned.shard} reads {len(planned.own)} of them")
    if not planned.options.effort.exact:
        say("  fast: no graded budgets, and no probe")
    elif planned.has_middle:
        say(f"  sums for the probe of graded budgets take {sums_bytes(description.geometry) / 2**20:.1f} MiB")
    else:
        say("  no document is longer than sinks and window, so there will be no graded budgets, and no probe")
    for note in planned.notes:
        say(f"  {note}")
    if not planned.options.effort.exact:
        say("  fast: sparse rows, half of the chunks, and an end once budgets settle; scores are not exact")


def _print_estimate(found: RunEstimate, as_json: bool) -> None:
    if as_json:
        print_json(found.payload())
        return
    gib = 2**30
    tera = (found.prefill_multiply_adds * 2e-12, found.scoring_multiply_adds * 2e-12)
    for line in (
        f"reads {found.tokens_read:,} tokens: prefill {tera[0]:,.3g} TFLOP, scoring {tera[1]:,.3g} TFLOP",
        f"large {found.dtype} products run at {found.multiply_adds_per_second * 2e-12:.3g} TFLOP/s on {found.device}",
        f"so no run takes less than {found.least_seconds:,.3g} s; attention runs slower than large products",
        f"weights {found.weight_bytes / gib:.2f} GiB, cache {found.cache_bytes / gib:.2f} GiB, "
        f"work about {found.working_bytes / gib:.2f} GiB, sums for a probe {found.probe_bytes / 2**20:.1f} MiB",
    ):
        typer.echo(line)


def _print_shard(part: Shard, written: Path, documents: int, seconds: float | None, as_json: bool) -> None:
    """Where a shard lies; ``seconds`` that it took, None where it was there already."""
    done = "is there already, of this run" if seconds is None else f"was written in {seconds:.0f} s"
    say(f"{written} {done}; put all {part.of} together with 'kvprofile merge'")
    if as_json:
        print_json({"file": str(written), "shard": part.number, "of": part.of, "documents": documents})


def _print_result(made: Profile, target: Path, token_scores: Path | None, as_json: bool) -> None:
    choice = show.choice_for(made, 0.5)
    if as_json:
        result = show.summary(made, choice)
        print_json({**result, "file": str(target), "token_scores": str(token_scores) if token_scores else None})
    else:
        show.render(made, choice, stdout_console())
