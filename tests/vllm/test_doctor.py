"""The doctor on an installation that has vLLM."""

from __future__ import annotations

import json

import pytest

from kvprofile.cli import run

pytest.importorskip("vllm")


def test_the_doctor_looks_at_the_installation(capsys, monkeypatch):
    monkeypatch.delenv("LLM_KVZIP_ENABLED", raising=False)
    assert run(["doctor", "--json"]) == 0
    found = {check["name"]: check for check in json.loads(capsys.readouterr().out)["checks"]}
    assert all(found[name]["good"] for name in ("plugin", "vLLM", "patches"))
    assert "Attention.__init__" in found["patches"]["detail"]
