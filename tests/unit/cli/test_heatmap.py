"""Heat maps in the terminal."""

from __future__ import annotations

import pytest

from kvprofile.cli import heatmap
from tests.helpers.factories import make_profile

pytestmark = pytest.mark.usefixtures("workplace")


def test_layers_of_deep_models_wrap_into_equal_bands():
    scores = make_profile(80, 2).scores.max
    lines = [line.plain for line in heatmap.draw(heatmap.score_cell(scores), 80, 2, 80)]
    rows = [line for line in lines if line.startswith("KV")]
    assert [len(row) for row in rows] == [len("KV 0 ") + 40] * 4
    assert lines[0].split() == [str(layer) for layer in range(0, 40, 5)]
    assert lines[4].split() == [str(layer) for layer in range(40, 80, 5)]


def test_colours_are_legible_on_light_and_dark():
    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [p / 12.92 if p <= 0.03928 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    for colour in heatmap.COLOURS:
        for ground in ("#ffffff", "#000000", "#1e1e1e", "#fdf6e3"):
            low, high = sorted((luminance(colour), luminance(ground)))
            assert (high + 0.05) / (low + 0.05) >= 3
