"""A short smoke of the pretrained model: it is read, scored and evaluated by the commands. More is in tests/real."""

from __future__ import annotations

import json

import pytest

from kvprofile.cli import run
from tests.helpers import real_model

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(real_model.MISSING is not None, reason=str(real_model.MISSING)),
]


def test_score_and_evaluate(workplace, capsys):
    model = str(real_model.FOLDER)
    few = ["--corpus", "generate:prose:1:6000", "--context-tokens", "600", "--chunk-tokens", "600"]
    assert run(["score", model, *few, "--sink-tokens", "16", "--recent-tokens", "64"]) == 0
    capsys.readouterr()
    asked = ["--tasks", "needle", "--context-tokens", "600", "--contexts", "2", "--questions", "3"]
    assert (
        run(
            [
                "evaluate",
                model,
                *asked,
                "--kind",
                "whole",
                "--kind",
                "graded",
                "--retention",
                "0.5",
                "--random-seeds",
                "1",
                "--json",
            ]
        )
        == 0
    )
    found = json.loads(capsys.readouterr().out)
    rows = {row["name"]: row for row in found["rows"]}
    assert rows["kvzip"]["kl"]["value"] < rows["streaming"]["kl"]["value"]
    assert rows["graded"]["kl"]["value"] < rows["kvzip"]["kl"]["value"]
    assert (workplace / "models" / "kv_budget" / f"{real_model.FOLDER.name}.json").is_file()
