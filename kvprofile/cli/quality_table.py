"""An evaluation's summary as text: the tables and the verdict that ``kvprofile evaluate`` prints."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from kvprofile.budget.trim import SLIDING
from kvprofile.questions.tasks import TASKS

_NAME_WIDTH = 13
_TASK_WIDTH = 12

LEGEND = (
    "heads: full ones. kept: share of the cache's bytes, sinks and window included.",
    "a-b: 95 % interval over contexts. loss, KL: rise of the answers' loss and",
    "divergence from the full cache, nats per token. flips: answers lost/gained.",
)


def heading(summary: Mapping[str, Any]) -> Iterator[str]:
    """What was asked, in lines."""
    settings = summary["settings"]
    shortest, longest = summary["context_tokens"]
    tokens = f"{shortest:,}" if shortest == longest else f"{shortest:,} to {longest:,}"
    yield f"{summary['model']['name']}: {summary['questions']:,} questions on {summary['exercises']:,} contexts"
    window = f"{settings.get('window', SLIDING)} window of {settings['recent_tokens']}"
    yield f"of {tokens} tokens; {settings['sink_tokens']} sinks, {window}"
    known, outside = summary["questions_with_known_evidence"], summary["questions_outside"]
    if known:
        yield f"evidence outside of sinks and window: {outside:,} of {known:,} ({outside / known:.0%})"
    told = {task: phrase for task, phrase in summary.get("accuracy", {}).items() if task not in TASKS}
    for task, phrase in told.items():
        yield from textwrap.wrap(f"accuracy of {task}: {phrase}", 80, subsequent_indent="  ")


def main_table(summary: Mapping[str, Any]) -> Table:
    """One row for each variant and retention."""
    table = _table()
    table.add_column("", no_wrap=True, max_width=_NAME_WIDTH)
    for name in ("heads", "kept", "accuracy %", "% of full", "loss", "KL", "flips"):
        table.add_column(name, justify="right", no_wrap=True)
    before = None
    for row in summary["rows"]:
        if row["retention"] != before:
            table.add_section()
            before = row["retention"]
        table.add_row(
            _name(row),
            str(row["full_heads"]),
            f"{row['retention_realised']:.3f}",
            _estimate(row["accuracy"]),
            _estimate(row["relative"]) if row["relative"] else "",
            f"{row['loss_rise']['value']:+.2f}" if row["kind"] != "full" else f"{row['loss']:.3f}",
            f"{row['kl']['value']:.3f}" if row["kind"] != "full" else "",
            f"{_count(row['lost'])}/{_count(row['gained'])}" if row["kind"] != "full" else "",
        )
    return table


def task_tables(summary: Mapping[str, Any], width: int) -> Iterator[Table]:
    """Accuracy by task, as many tables as the width asks for."""
    tables: list[list[str]] = [[]]
    room = width - _NAME_WIDTH
    for task in summary["rows"][0]["by_task"]:
        needed = _task_width(task) + 1
        if tables[-1] and needed > room:
            tables.append([])
            room = width - _NAME_WIDTH
        tables[-1].append(task)
        room -= needed
    for tasks in tables:
        table = _table()
        table.add_column("accuracy %", no_wrap=True, min_width=_NAME_WIDTH, max_width=_NAME_WIDTH)
        for task in tasks:
            table.add_column(_heading(task), justify="right", width=_task_width(task), overflow="fold")
        before = None
        for row in summary["rows"]:
            if row["retention"] != before:
                table.add_section()
                before = row["retention"]
            table.add_row(_name(row), *(_percent(row["by_task"][task]["accuracy"]["value"]) for task in tasks))
        yield table


def verdicts(summary: Mapping[str, Any]) -> Iterator[str]:
    """One sentence for each profile: which retention keeps nearly all, and whether random heads would do too."""
    for found in summary["verdicts"]:
        name, kept = found["profile"], f"{found['kept']:.0%}"
        relative, against = found["relative"], found["against_random"]
        if relative is None:
            yield f"{name}: too few contexts for an interval, so nothing is claimed."
            continue
        shown = f"{_percent(relative['value'])} % [{_percent(relative['low'])} to {_percent(relative['high'])}]"
        if found["retention"] is not None:
            told = (
                f"{name} keeps at least {kept} of the full cache's accuracy down to retention {found['retention']:g}: "
                f"{shown}, with {found['retention_realised']:.0%} of the cache"
            )
        else:
            told = (
                f"{name}: at no retention is it certain that {kept} of the accuracy is kept; "
                f"nearest: {found['nearest']:g} with {shown}"
            )
        if against is None:
            yield f"{told}."
        elif (against["low"] or 0) > 0:
            yield f"{told}; random heads there do worse by {_points(against)}, over {found['random_seeds']} draws."
        else:
            others = ", ".join(f"{retention:g}" for retention in found["beats_random_at"])
            where = f"but at {others}" if others else "nor at another retention"
            yield (
                f"{told}; not certain to be better than random heads there ({_points(against)}, "
                f"over {found['random_seeds']} draws), {where}. More --random-seeds tell more."
            )


def _table() -> Table:
    return Table(box=SIMPLE_HEAD, pad_edge=False, show_edge=False, padding=0)


def _heading(task: str) -> str:
    """A task's name that may break between its words."""
    return task.replace("_", " ")


def _task_width(task: str) -> int:
    return max(5, min(_TASK_WIDTH, max(map(len, _heading(task).split()))))


def _name(row: Mapping[str, Any]) -> str:
    """A variant's name, cut so that its retention stays in sight."""
    if row["retention"] is None:
        return str(row["name"])
    retention = f" {row['retention']:g}"
    room = _NAME_WIDTH - len(retention)
    name = str(row["name"])
    return (name if len(name) <= room else f"{name[: room - 1]}…") + retention


def _estimate(estimate: Mapping[str, float | None]) -> str:
    low, high = estimate["low"], estimate["high"]
    value = _percent(estimate["value"])
    return f"{value} ?" if low is None or high is None else f"{value} {_percent(low)}-{_percent(high)}"


def _percent(share: float | None) -> str:
    """Percent with one digit after the point; a share that is not whole never reads as 100 or 0."""
    if share is None:
        return "-"
    text = f"{100 * share:.1f}"
    if share < 1 and text == "100.0":
        return "99.9"
    return text.removesuffix(".0") if share in (0.0, 1.0) else text


def _points(estimate: Mapping[str, float | None]) -> str:
    value, low, high = (100 * (estimate[name] or 0.0) for name in ("value", "low", "high"))
    return f"{value:.1f} points [{low:.1f} to {high:.1f}]"


def _count(number: float) -> str:
    return f"{number:.0f}"
