"""A comparison of run records as one HTML file that needs no network and runs no script.

Everything that is shown passes jinja2's escaping, and a content security policy forbids all but the page's own style,
so not even text that got through could act. Numbers are those of the summary and the records; ``<data value>`` holds
them in full next to what people read.
"""

from __future__ import annotations

import base64
import hashlib
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from kvprofile import __version__
from kvprofile.files import write_atomically
from kvprofile.report import wording
from kvprofile.report.charts import BOTTOM, HEIGHT, LEFT, RIGHT, WIDTH, charts, styles
from kvprofile.report.comparability import load_words
from kvprofile.report.compare import Comparison, Summary
from kvprofile.report.page import cards, document_groups, head_maps, provenance, sections, verifier_warnings

MOST_TEXT = 20_000
"""Characters of an answer that a page shows; the record holds all."""


def write(summary: Summary, output: Path) -> None:
    """Write the page atomically. Raises InputError where that fails."""
    write_atomically(output, render(summary).encode())


def render(summary: Summary) -> str:
    """The page, the same for the same summary and version."""
    from markupsafe import Markup

    css = _read("page.css")
    digest = base64.b64encode(hashlib.sha256(css.encode()).digest()).decode()
    style = styles(summary.groups)
    page: str = (
        _environment()
        .get_template("page.html")
        .render(
            summary=summary,
            css=Markup(css),  # noqa: S704 -- our own file, whose hash the policy names
            css_sha256=digest,
            version=__version__,
            style=style,
            load=load_words(summary.groups[0].first),
            cards=cards(summary),
            comparisons=[_side_by_side(summary, each) for each in (summary.against_baseline, *summary.against_remote)],
            charts=charts(summary),
            frame={
                "width": WIDTH,
                "height": HEIGHT,
                "left": LEFT,
                "right": WIDTH - RIGHT,
                "bottom": HEIGHT - BOTTOM,
            },
            head_maps=head_maps(summary),
            warnings=verifier_warnings(summary),
            documents=document_groups(summary),
            provenance=provenance(summary),
        )
    )
    return page


def _side_by_side(summary: Summary, comparison: Comparison) -> dict[str, Any]:
    names = [group.name for group in summary.groups if any(group.name in row.values for row in comparison.rows)]
    return {"reference": comparison.reference, "names": names, "sections": sections(comparison, names, summary)}


@cache
def _read(name: str) -> str:
    return files("kvprofile.report").joinpath("templates", name).read_text(encoding="utf-8")


@cache
def _environment() -> Any:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("kvprofile.report"), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True, finalize=_finalised,
    )  # fmt: skip
    environment.filters.update(clipped=clipped, number=wording.number)
    return environment


def _finalised(value: Any) -> Any:
    """What stands between braces: text without characters that act, markup as it is, numbers as Python writes them."""
    from markupsafe import Markup

    if isinstance(value, Markup):
        return value
    return wording.visible(value) if isinstance(value, str) else value


def clipped(text: str) -> str:
    """The text as far as a page shows it, and how much more the record holds."""
    if len(text) <= MOST_TEXT:
        return text
    return f"{text[:MOST_TEXT]}… {len(text) - MOST_TEXT:,} more characters are in the record"
