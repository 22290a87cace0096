"""An evaluation's summary as text: the tables and the verdict that ``kvprofile evaluate`` prints."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from kvprofile.budget.trim import SLIDING
from kvprofile.cli.output import percent
from kvprofile.questions.tasks import TASKS

_NAME_WIDTH = 15
_TASK_WIDTH = 12

LEGEND = (
    "heads: full ones. kept: share of the cache's bytes, sinks and window included.",
    "agreement: tokens of the reference answers where the first choice is that of",
    "the full cache. KL: divergence from it, nats per token. tokens right: where",
    "the first choice is the reference. a-b: 95 % interval over contexts.",
)

_GRADED_LEGEND = (
    "With graded's shares: any tokens (random), reversed (the probe's worst), key",
    "norms, own scores (KVzip's of the context). With the probe's tokens: shuffled",
    "and equal shares.",
)

_WRITTEN_LEGEND = (
    "accuracy: answers that hold what is expected. exact: those that greedy",
    "decoding writes as the reference.",
)
_EXACT_LEGEND = ("accuracy: answers that greedy decoding writes as the reference.",)
_LOSS_LEGEND = "loss: rise over the reference, nats per token. flips: answers lost/gained."


_FLOAT8_LEGEND = "fp8: the cache in 8-bit floats, half the bytes of 16-bit ones, without scales."


def legend(summary: Mapping[str, Any]) -> tuple[str, ...]:
    """What stands in the first table."""
    kinds = {row["kind"] for row in summary["rows"]}
    graded = _GRADED_LEGEND if kinds & {"any tokens", "equal", "own scores"} else ()
    return (*LEGEND, *graded, *([_FLOAT8_LEGEND] if "rounded" in kinds else []))


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
    """How near each variant and retention comes to the full cache: one row for each."""
    names = ("heads", "kept", "agreement %", "KL", "tokens right %")

    def cells(row: Mapping[str, Any]) -> tuple[str, ...]:
        full = row["kind"] == "full"
        return (
            "" if row.get("tokens") else str(row["full_heads"]),
            f"{row['retention_realised']:.3f}",
            "" if full else _estimate(row["agreement"]),
            "" if full else _nats(row["kl"]),
            _estimate(row["tokens_right"]),
        )

    return _rows_table(summary, names, cells)


def answers_table(summary: Mapping[str, Any]) -> Table | None:
    """What became of the answers; None where the full cache's are too seldom right to tell."""
    if not summary["answers"]["compared"]:
        return None

    written = summary["settings"]["generate"]

    def cells(row: Mapping[str, Any]) -> tuple[str, ...]:
        full = row["kind"] == "full"
        return (
            _estimate(row["accuracy"]),
            _estimate(row["relative"]) if row["relative"] else "",
            *([percent(row["exact"])] if written else []),
            f"{row['loss']:.3f}" if full else f"{row['loss_rise']['value']:+.2f}",
            "" if full else f"{_count(row['lost'])}/{_count(row['gained'])}",
        )

    return _rows_table(summary, ("accuracy %", "% of full", *(["exact %"] if written else []), "loss", "flips"), cells)


def answers_legend(summary: Mapping[str, Any]) -> tuple[str, ...]:
    """What the columns of ``answers_table`` mean."""
    return (*(_WRITTEN_LEGEND if summary["settings"]["generate"] else _EXACT_LEGEND), _LOSS_LEGEND)


def left_out(summary: Mapping[str, Any]) -> str | None:
    """Why answers are not compared, in a sentence; None where they are, or where nothing is answered."""
    answers = summary["answers"]
    if answers["compared"] or not answers["questions"]:
        return None
    of = f"{answers['right']:,} of {answers['questions']:,} questions"
    if summary["settings"]["generate"]:
        return f"The full cache answers {of} right, so answers are left out: there is too little to lose."
    return (
        f"The full cache writes the reference in {of}, so exact answers are left out; --generate looks for what is "
        "expected in answers in its own words."
    )


def span_tables(summary: Mapping[str, Any]) -> Iterator[Table]:
    """KL and agreement over the first tokens of continued texts, those after them, and the last; none without them."""
    spans = list(summary["rows"][0]["by_span"])
    for title, figure, shown in (("KL, tokens", "kl", _nats), ("agree %, tokens", "agreement", _estimate)):
        if spans:

            def cells(row: Mapping[str, Any], figure: str = figure, shown: Any = shown) -> tuple[str, ...]:
                return tuple("" if row["kind"] == "full" else shown(row["by_span"][span][figure]) for span in spans)

            yield _rows_table(summary, spans, cells, title)


def task_tables(summary: Mapping[str, Any], width: int) -> Iterator[Table]:
    """Agreement by task and, where answers are compared, accuracy by task; as many tables as the width asks for."""
    tables: list[list[str]] = [[]]
    room = width - _NAME_WIDTH
    for task in summary["rows"][0]["by_task"]:
        needed = _task_width(task) + 1
        if tables[-1] and needed > room:
            tables.append([])
            room = width - _NAME_WIDTH
        tables[-1].append(task)
        room -= needed
    for figure in ("agreement", "accuracy") if summary["answers"]["compared"] else ("agreement",):
        for tasks in tables:
            yield _task_table(summary, figure, tasks)


def _task_table(summary: Mapping[str, Any], figure: str, tasks: Sequence[str]) -> Table:
    table = _table()
    table.add_column(f"{figure} %", no_wrap=True, min_width=_NAME_WIDTH, max_width=_NAME_WIDTH)
    for task in tasks:
        table.add_column(_heading(task), justify="right", width=_task_width(task), overflow="fold")
    before = None
    for row in summary["rows"]:
        if row["kind"] == "full" and figure == "agreement":
            continue
        if row["retention"] != before:
            table.add_section()
            before = row["retention"]
        table.add_row(_name(row), *(percent(row["by_task"][task][figure]["value"]) for task in tasks))
    return table


def _rows_table(
    summary: Mapping[str, Any],
    names: Sequence[str],
    cells: Callable[[Mapping[str, Any]], tuple[str, ...]],
    title: str = "",
) -> Table:
    """A table with a row for each variant and retention."""
    table = _table()
    table.add_column(title, no_wrap=True, max_width=max(_NAME_WIDTH, len(title)))
    for name in names:
        table.add_column(name, justify="right", no_wrap=True)
    before = None
    for row in summary["rows"]:
        if row["retention"] != before:
            table.add_section()
            before = row["retention"]
        table.add_row(_name(row), *cells(row))
    return table


def verdicts(summary: Mapping[str, Any]) -> Iterator[str]:
    """Sentences for each profile: which retention keeps nearly all, and whether random heads would do too."""
    for found in summary["verdicts"]:
        yield _verdict(found, "agreement", "of the full cache's first choices")
        if found["accuracy"]:
            yield _verdict(found, "accuracy", "of the full cache's accuracy")


def _verdict(found: Mapping[str, Any], figure: str, what: str) -> str:
    part, name, kept, draws = found[figure], found["profile"], f"{found['kept']:.0%}", found["random_seeds"]
    drawn = "random heads" if found["random"] == "random" else "random tokens"
    share, against = part["share"], part["against_random"]
    if share is None:
        return f"{name}, {figure}: too few contexts for an interval, so nothing is claimed."
    shown = f"{percent(share['value'])} % [{percent(share['low'])} to {percent(share['high'])}]"
    if figure == "agreement":
        shown += f", KL {_nats(part['kl'], (' [', ' to ', ']'))}"
    if part["retention"] is not None:
        told = (
            f"{name} keeps at least {kept} {what} down to retention {part['retention']:g}: {shown}, with "
            f"{part['retention_realised']:.0%} of the cache"
        )
    else:
        nearest = f"{part['nearest']:g} with {shown}"
        told = f"{name} keeps {kept} {what} at no retention with certainty; nearest: {nearest}"
    if against is None:
        return f"{told}."
    if (against["low"] or 0) > 0:
        return f"{told}; {drawn} there do worse by {_points(against)}, over {draws} draws."
    others = ", ".join(f"{retention:g}" for retention in part["beats_random_at"])
    where = f"but at {others}" if others else "nor at another retention"
    return (
        f"{told}; not certain to be better than {drawn} there ({_points(against)}, over {draws} draws), {where}. "
        "More --random-seeds tell more."
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
    value = percent(estimate["value"])
    return f"{value} ?" if low is None or high is None else f"{value} {percent(low)}-{percent(high)}"


def _nats(estimate: Mapping[str, float | None], marks: tuple[str, str, str] = (" ", "-", "")) -> str:
    """Nats with three digits after the point."""
    value, low, high = estimate["value"], estimate["low"], estimate["high"]
    before, joint, after = marks
    if value is None:
        return "-"
    return (
        f"{value:.3f} ?"
        if low is None or high is None
        else f"{value:.3f}{before}{max(0.0, low):.3f}{joint}{high:.3f}{after}"
    )


def _points(estimate: Mapping[str, float | None]) -> str:
    value, low, high = (100 * (estimate[name] or 0.0) for name in ("value", "low", "high"))
    return f"{value:.1f} points [{low:.1f} to {high:.1f}]"


def _count(number: float) -> str:
    return f"{number:.0f}"
