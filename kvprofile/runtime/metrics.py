"""The runtime on vLLM's ``/metrics``: what is in force, and what the scheduler has counted (``stats``)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from prometheus_client import REGISTRY
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from kvprofile.budget.trim import GRADED
from kvprofile.runtime import stats
from kvprofile.runtime.engine_budget import EngineBudget


class BudgetCollector(Collector):
    """Reads the shared counters whenever Prometheus asks. One for each process, for the engine configured last.

    ``engines`` are the replicas of this machine by vLLM's numbers, which have series from the start.
    """

    budget: EngineBudget | None = None
    engines: Sequence[int] = (0,)

    def collect(self) -> Iterator[Metric]:
        """All of the runtime's metrics; none before an engine is configured."""
        if self.budget is None:
            return
        yield GaugeMetricFamily("kvprofile_enabled", "1 where per-head budgets are in force.", 1)
        yield GaugeMetricFamily(
            "kvprofile_retention_ratio",
            "Share of the context between sinks and window that KV heads keep, the mean over heads.",
            self.budget.retention,
        )
        graded = float(self.budget.kind == GRADED)
        yield GaugeMetricFamily("kvprofile_graded", "1 where heads keep shares of the context, 0 where whole.", graded)
        yield GaugeMetricFamily("kvprofile_full_heads", "KV heads that keep the whole context.", self.budget.full)
        budget = GaugeMetricFamily(
            "kvprofile_budget_info",
            "1; the label `budget` is the same on servers that trim the same heads by the same rule.",
            labels=("budget",),
        )
        budget.add_metric((identity(self.budget),), 1)
        yield budget
        counted = stats.by_engine()
        nothing = dict.fromkeys(stats.FIELDS, 0)
        of_engine = {engine: counted.get(engine, nothing) for engine in sorted({*self.engines, *counted})}
        for kind, name, field, words in _COUNTED:
            family = kind(name, words, labels=("engine",))
            for engine, values in of_engine.items():
                seconds = field.endswith("_microseconds_total")
                family.add_metric((str(engine),), values[field] / 1e6 if seconds else values[field])
            yield family


_COUNTED: tuple[tuple[Any, str, str, str], ...] = (
    (
        CounterMetricFamily,
        "kvprofile_kv_blocks_reclaimed",
        "kv_blocks_reclaimed_total",
        "Blocks freed while their request went on, by replica, as vLLM's own metrics.",
    ),
    (CounterMetricFamily, "kvprofile_kv_bytes_reclaimed", "kv_bytes_reclaimed_total", "Bytes of those blocks."),
    (
        CounterMetricFamily,
        "kvprofile_kv_blocks_kept",
        "kv_blocks_kept_total",
        "Blocks taken for tokens of graded heads that stay.",
    ),
    (
        CounterMetricFamily,
        "kvprofile_kv_move_seconds",
        "kv_move_microseconds_total",
        "Time of one worker's host for moving them.",
    ),
    (GaugeMetricFamily, "kvprofile_kv_bytes_in_use", "kv_bytes_in_use", "Bytes of the pool that requests hold."),
    (
        GaugeMetricFamily,
        "kvprofile_kv_block_bytes",
        "kv_block_bytes",
        "Bytes of one block of the pool; 0 until a step ran.",
    ),
)

_collector = BudgetCollector()


def identity(budget: EngineBudget) -> str:
    """Twelve digits of a hash of what heads keep and how that is chosen."""
    kept = {name: value for name, value in budget.as_config().items() if name != "permute_weights"}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:12]


def show(budget: EngineBudget, engines: Sequence[int] = (0,)) -> None:
    """Put the metrics of an engine with this budget on the registry that vLLM exposes where it runs in one process."""
    if _collector.budget is None:
        REGISTRY.register(_collector)
    _collector.budget, _collector.engines = budget, engines


def joining(stock: Callable[[Any], Iterable[Metric]]) -> Callable[[Any], Iterator[Metric]]:
    """``MultiProcessCollector.collect`` that gives the runtime's metrics too.

    With several API processes, or a PROMETHEUS_MULTIPROC_DIR of the user's, /metrics joins what processes wrote into
    files and leaves collectors out, this one included. Its numbers cross processes by themselves, so any process that
    answers has them.
    """

    def collect(self: Any) -> Iterator[Metric]:
        yield from stock(self)
        yield from _collector.collect()

    return collect
