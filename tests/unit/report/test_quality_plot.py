"""The picture of an evaluation."""

from __future__ import annotations

import pytest

from kvprofile.report import quality_plot
from tests.helpers.evaluations import made_up_summary


@pytest.fixture
def summary():
    return made_up_summary()


@pytest.mark.parametrize("picture", ["png", "svg"])
def test_the_picture_is_stable(summary, picture, recwarn):
    first = quality_plot.render(summary, picture, 40)
    assert first == quality_plot.render(summary, picture, 40)
    assert len(first) > 1000
    assert [str(each.message) for each in recwarn] == []


def test_a_picture_without_controls_and_intervals(summary):
    rows = [row for row in summary["rows"] if row["kind"] in ("full", "profile")]
    for row in rows:
        row["accuracy"] |= {"low": None, "high": None}
    quality_plot.render({**summary, "rows": rows}, "png", 40)
