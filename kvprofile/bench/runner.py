"""Goes through a plan leg by leg, keeps what was measured whatever happens, and makes one run record of it."""

from __future__ import annotations

import os
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from kvprofile import __version__
from kvprofile.bench import timings
from kvprofile.bench.engines.base import LegFailedError
from kvprofile.bench.leg_store import LegStore
from kvprofile.bench.legs import LegOutcome, LegRun, Say, documents_of
from kvprofile.bench.scenario import BASELINE, BenchPlan, LegPlan
from kvprofile.bench.verifiers import judge
from kvprofile.budget import servable
from kvprofile.budget.allocate import Constraints, effective_retention
from kvprofile.budget.capacity import kv_bytes_per_token
from kvprofile.budget.dtypes import FLOAT8_NAMES, MODEL_DTYPES, PLAIN, value_bytes
from kvprofile.budget.model_shape import find_shape
from kvprofile.budget.profile import FULL_ATTENTION, Profile, mean_budget
from kvprofile.budget.servable import ServableBudget
from kvprofile.budget.trim import WHOLE
from kvprofile.errors import MOST_CHARACTERS, InputError, plain
from kvprofile.records import provenance, record, run_files

PACKAGES = (*provenance.PACKAGES, "openai", "sacrebleu", "rouge-score")

MOST_SAMPLES = 2000
"""Samples kept of a leg; of longer ones every second, third, ... is."""

HOW = (
    "1 / (r + (1 - r) * (S + W + o) / n), o of the n tokens being output, memory-bound decoding; reached: output "
    "throughput over the baseline's"
)


def run(plan: BenchPlan, folder: Path, say: Say, force: bool = False) -> record.RunRecord:
    """Run what is left of a plan and write ``record.json`` after each leg; gives the whole record.

    A leg that fails is recorded with its reason, and tried again by the next run. Raises InputError where the folder
    belongs to something else, another process is at work there or the disk is full, and KeyboardInterrupt; what was
    measured is kept.
    """
    parts = LegStore(folder, plan)
    with parts.opened(force):
        return _run(plan, parts, say)


def _run(plan: BenchPlan, parts: LegStore, say: Say) -> record.RunRecord:
    started = provenance.now()
    legs: dict[tuple[str, int], record.Leg] = {}
    schedule = plan.schedule
    for leg, repetition in schedule:  # first all that is known, so that a record never loses what another run measured
        known = parts.finished(leg, repetition)
        if known is not None:
            legs[leg.name, repetition] = known
    for number, (leg, repetition) in enumerate(schedule, 1):
        title = f"[{number}/{len(schedule)}] {leg.name}" + (
            f", repetition {repetition}" if plan.repetitions > 1 else ""
        )
        # what is done stays done
        known = legs.get((leg.name, repetition))
        if known is not None and known.status == "ok":
            parts.forget_rows(leg, repetition)  # where it was killed right after the leg was kept
            say(f"{title}: done before")
            continue
        # the others run, and the record is written anew after each, however it ended
        left = len(parts.interrupted(leg, repetition))
        say(f"{title}: starting" + (f" again, {left} requests were measured before it was stopped" if left else ""))
        try:
            legs[leg.name, repetition] = _measured(plan, leg, repetition, parts, say, title)
        finally:
            found = parts.finished(leg, repetition)
            if found is not None:
                legs[leg.name, repetition] = found
            if legs:
                _write(plan, parts, legs, started)
    return _write(plan, parts, legs, started)


def _measured(plan: BenchPlan, leg: LegPlan, repetition: int, parts: LegStore, say: Say, title: str) -> record.Leg:
    running = LegRun(plan, leg, repetition, parts, _token_bytes(plan, leg), say)
    began, reason = provenance.now(), None
    try:
        running.run()
    except LegFailedError as error:
        reason = plain(error)[:MOST_CHARACTERS]
        say(f"{title}: failed: {reason}")
    except InputError as error:  # a full disk, which the other legs would meet too
        reason = str(error)
        raise
    except KeyboardInterrupt:
        reason = f"interrupted after {len(running.outcome.rows)} of {plan.requests} requests"
        raise
    except Exception as error:
        if os.environ.get("KVPROFILE_DEBUG"):
            raise
        reason = plain(f"{type(error).__name__}: {error}")[:500]
        say(f"{title}: failed: {reason}; run with kvprofile --debug for the traceback")
    finally:
        found = _leg(plan, leg, repetition, running.outcome, began, reason, parts.profile)
        parts.save(leg, repetition, found)
    if reason is None:
        say(f"{title}: {_summary(found)}")
    return found


def _leg(
    plan: BenchPlan, leg: LegPlan, repetition: int, outcome: LegOutcome, began: str, reason: str | None, profile: Path
) -> record.Leg:
    local = leg.kind == "local"
    budget = _budget(plan, leg, profile)
    rows = sorted(outcome.rows, key=lambda row: row.start_s or 0.0)
    load = plan.load
    return record.Leg(
        name=leg.name,
        kind=leg.kind,
        repetition=repetition,
        status="ok" if reason is None else "failed",
        reason=reason,
        started=began,
        compressed=leg.retention is not None if local else None,
        retention_asked=(leg.retention if leg.retention is not None else 1.0) if local else None,
        retention_realised=(mean_budget(budget.heads) if budget is not None else 1.0) if local else None,
        provider=None if leg.provider is None else leg.provider.name,
        engine=_engine(outcome.facts),
        model=plain(outcome.model or _model_of(plan, leg))[:200] or "unknown",
        dtype=outcome.facts.get("dtype"),
        kv_cache_dtype=leg.cache if leg.cache != PLAIN else None,
        device=outcome.facts.get("device"),
        pool_bytes=outcome.pool_bytes,
        block_tokens=outcome.block_tokens,
        load=record.Load(
            mode=outcome.mode,
            concurrency=outcome.concurrency or load.concurrency,
            request_rate=load.request_rate,
            requests=plan.requests,
            warmup_requests=load.warmup_requests,
            max_output_tokens=load.max_output_tokens,
            temperature=load.temperature,
            streaming=leg.provider is None or leg.provider.stream,
            prefix_caching=plan.engine.prefix_caching if local else None,
            description="every request begins with words of its own" if load.unique_prefix else "",
        ),
        documents=documents_of(plan.documents, rows),
        seeds=[plan.seed_of(repetition)],
        metrics=timings.metrics(rows, outcome.duration_s) if rows else record.Metrics(),
        requests=rows,
        samples=_samples(outcome),
        memory=_memory(outcome),
        eviction_ratio=outcome.eviction_ratio,
        attention=outcome.attention,
        cost=_cost(leg, outcome),
        heads=_heads(plan, budget),
        warnings=[plain(warning)[:MOST_CHARACTERS] for warning in outcome.warnings],
    )


def _engine(facts: Mapping[str, str | int | None]) -> str | None:
    """The engine and how many replicas of it stood behind the leg's address; of a provider perhaps only that."""
    engine, replicas = facts.get("engine"), facts.get("replicas")
    if replicas is None or (engine is not None and replicas == 1):
        return None if engine is None else str(engine)
    return f"{engine or 'vllm'}, {replicas} replica{'' if replicas == 1 else 's'}"


def _model_of(plan: BenchPlan, leg: LegPlan) -> str:
    """The model of a leg that never got as far as asking for it."""
    if leg.provider is None or leg.provider.serve:
        return plan.model_name
    return plan.provider_model or leg.provider.model or "unknown"


def _samples(outcome: LegOutcome) -> list[record.Sample]:
    step = max(1, -(-len(outcome.looks) // MOST_SAMPLES))
    return [
        record.Sample(
            t_s=look.time - outcome.began,
            pool_bytes_in_use=look.cache_bytes_in_use,
            eviction_ratio=look.eviction_ratio,
            device_memory_bytes=look.device_memory_bytes,
            process_memory_bytes=look.process_memory_bytes,
            running=look.running,
            waiting=look.waiting,
        )
        for look in outcome.looks[::step]
    ]


def _memory(outcome: LegOutcome) -> record.Memory:
    def peak(name: str) -> int | None:
        return max((value for look in outcome.looks if (value := getattr(look, name)) is not None), default=None)

    counted = [look.preemptions for look in outcome.looks if look.preemptions is not None]
    return record.Memory(
        pool_bytes_peak=peak("cache_bytes_in_use"),
        device_memory_bytes_peak=peak("device_memory_bytes"),
        process_memory_bytes_peak=peak("process_memory_bytes"),
        preemptions=counted[-1] - (outcome.preemptions_before or 0) if counted else None,
    )


def _cost(leg: LegPlan, outcome: LegOutcome) -> record.Cost | None:
    """By the prices of the provider's table; None without prices, or where the provider did not count."""
    prices = None if leg.provider is None else leg.provider.prices
    done = [row for row in outcome.rows if row.error is None]
    if prices is None or any(row.input_tokens is None or row.output_tokens is None for row in done):
        return None
    read, written = sum(row.input_tokens or 0 for row in done), sum(row.output_tokens or 0 for row in done)
    return record.Cost(
        amount=prices.amount(read, outcome.cached_tokens, written),
        currency=prices.currency,
        input_per_million_tokens=prices.input_per_million_tokens,
        output_per_million_tokens=prices.output_per_million_tokens,
    )


def _budget(plan: BenchPlan, leg: LegPlan, profile: Path) -> ServableBudget | None:
    """The budgets that a leg is served with, as the runtime makes them of the profile."""
    if leg.kind == "remote" or leg.retention is None or plan.profile is None:
        return None
    return budget_at(profile, leg.retention, plan.engine.tensor_parallel_size, leg.heads)


def budget_at(path: Path, retention: float, tensor_parallel_size: int, kind: str = WHOLE) -> ServableBudget:
    """What heads of a budget file keep at a retention, or of a runtime file of that retention. Raises InputError."""
    found = servable.read(path)
    if isinstance(found, Profile):
        return servable.of_profile(found, retention, Constraints(tensor_parallel_size=tensor_parallel_size), kind)
    kept = servable.of_runtime_file(found)
    if kept.retention_asked != retention:
        raise InputError(f"{path} is for retention {kept.retention_asked:g}, a leg asks for {retention:g}")
    return kept


def _heads(plan: BenchPlan, budget: ServableBudget | None) -> record.Heads | None:
    if budget is None:
        return None
    return record.Heads(
        budgets=budget.heads,
        method=budget.method,
        statistic=budget.statistic,
        profile_sha256=plan.profile_sha256,
        sink_tokens=budget.sink_tokens,
        recent_tokens=budget.recent_tokens,
    )


def with_bounds(legs: Sequence[record.Leg]) -> list[record.Leg]:
    """Legs whose cache is smaller, each with what it could gain at most over the baseline of the same repetition."""
    # tokens per second of the baseline, by repetition
    throughput = {
        leg.repetition: leg.metrics.output_throughput for leg in legs if leg.name == BASELINE and leg.status == "ok"
    }
    return [_bounded(leg, throughput.get(leg.repetition)) for leg in legs]


def _bounded(leg: record.Leg, baseline: float | None) -> record.Leg:
    heads, lengths = leg.heads, [row.input_tokens for row in leg.requests if row.input_tokens]
    smaller = heads is not None or leg.kv_cache_dtype in FLOAT8_NAMES
    if not smaller or leg.retention_realised is None or not lengths:
        return leg
    # the bound for the mean request half-way through its output, from the retention in force, not the one asked for
    written = statistics.fmean(row.output_tokens or 0 for row in leg.requests if row.input_tokens) / 2
    context = round(statistics.fmean(lengths) + written)
    sinks, recent = (heads.sink_tokens or 0, heads.recent_tokens or 0) if heads is not None else (0, 0)
    share = effective_retention(leg.retention_realised, sinks, recent, context, written)
    if leg.kv_cache_dtype in FLOAT8_NAMES:
        share /= value_bytes(PLAIN, leg.dtype or "")
    speedup = max(1.0, 1.0 / share)
    # what the leg gained, over the baseline that ran next to it
    ours = leg.metrics.output_throughput
    reached = ours / baseline if baseline and ours is not None else None
    bound = record.Bound(
        speedup=speedup,
        reached=reached,
        fraction=None if reached is None else reached / speedup,
        context_tokens=context,
        how=f"{HOW}; numbers of 8 bits count as such" if leg.kv_cache_dtype in FLOAT8_NAMES else HOW,
    )
    return leg.model_copy(update={"bound": bound})


def _write(plan: BenchPlan, parts: LegStore, legs: dict[tuple[str, int], record.Leg], started: str) -> record.RunRecord:
    order = [(leg.name, repetition) for leg, repetition in plan.schedule]
    found = [legs[place] for place in order if place in legs]
    judged = judge(plan, with_bounds(found))
    began = min((leg.started for leg in found if leg.started is not None), default=started)
    result = record.RunRecord(
        kvprofile_version=__version__,
        experiment=record.Experiment(
            name=plan.name,
            preset=plan.preset,
            baseline=BASELINE if any(leg.name == BASELINE for leg in found) else None,
            settings=plan.settings(),
        ),
        provenance=provenance.collect(began, provenance.now(), PACKAGES),
        legs=judged,
    )
    run_files.save(result, parts.record)
    return result


def _summary(leg: record.Leg) -> str:
    metrics = leg.metrics
    speed = f", {metrics.output_throughput:.1f} tokens/s" if metrics.output_throughput is not None else ""
    return f"{metrics.completed} answers in {metrics.duration or 0:.1f} s{speed}"


def _token_bytes(plan: BenchPlan, leg: LegPlan) -> int | None:
    """Cache bytes of a token on one rank without budgets, by the model's shape; None with sliding layers."""
    try:
        shape = find_shape(plan.model)
    except InputError:
        return None
    geometry, dtype = shape.geometry, plan.engine.dtype if plan.engine.dtype != "auto" else shape.dtype
    if dtype not in MODEL_DTYPES or any(kind != FULL_ATTENTION for kind in geometry.layer_types):
        return None
    heads = -(-geometry.kv_heads // plan.engine.tensor_parallel_size)
    return kv_bytes_per_token(shape.layers, value_bytes(leg.cache, dtype)) // geometry.kv_heads * heads
