"""The runtime on vLLM's ``/metrics``: what is in force, and what the scheduler has counted (``stats``)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from prometheus_client import REGISTRY
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from kvprofile.budget.trim import GRADED
from kvprofile.runtime import stats
from kvprofile.runtime.engine_budget import EngineBudget


class BudgetCollector(Collector):
    """Reads the shared counters whenever Prometheus asks. One for each process, for the engine configured last."""

    budget: EngineBudget | None = None

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
        found = stats.read()
        blocks, kv_bytes = found["kv_blocks_reclaimed_total"], found["kv_bytes_reclaimed_total"]
        yield CounterMetricFamily("kvprofile_kv_blocks_reclaimed", "Blocks freed while their request went on.", blocks)
        yield CounterMetricFamily("kvprofile_kv_bytes_reclaimed", "Bytes of those blocks.", kv_bytes)
        kept = found["kv_blocks_kept_total"]
        yield CounterMetricFamily(
            "kvprofile_kv_blocks_kept", "Blocks taken for tokens of graded heads that stay.", kept
        )
        seconds = found["kv_move_microseconds_total"] / 1e6
        yield CounterMetricFamily("kvprofile_kv_move_seconds", "Time of one worker's host for moving them.", seconds)
        held = found["kv_bytes_in_use"]
        yield GaugeMetricFamily("kvprofile_kv_bytes_in_use", "Bytes of the pool that requests hold.", held)
        width = found["kv_block_bytes"]
        yield GaugeMetricFamily(
            "kvprofile_kv_block_bytes", "Bytes of one block of the pool; 0 until a step ran.", width
        )


_collector = BudgetCollector()


def show(budget: EngineBudget) -> None:
    """Put the metrics of an engine with this budget on the registry that vLLM exposes where it runs in one process."""
    if _collector.budget is None:
        REGISTRY.register(_collector)
    _collector.budget = budget


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
