"""``kvprofile bench`` as far as it goes without an engine: plans, refusals, exit codes."""

from __future__ import annotations

import json

import pytest

from kvprofile.cli import run
from tests.helpers.models import POCKET, ROOT

PROFILE = str(ROOT / "models" / "kv_budget" / "pocket.json")


def dry(capsys, *arguments):
    code = run(["bench", "--model", str(POCKET), "--profile", PROFILE, "--dry-run", *arguments])
    return code, capsys.readouterr()


@pytest.mark.usefixtures("workplace")
def test_a_dry_run_prints_the_plan_and_touches_nothing(capsys, monkeypatch, tmp_path):
    monkeypatch.delenv("MOONSHOT_API_KEY", raising=False)
    code, printed = dry(capsys, "--preset", "seed", "--json")
    assert code == 0
    plan = json.loads(printed.out)
    assert [leg["name"] for leg in plan["legs"]] == ["baseline", "graded 0.9", "graded 0.7", "graded 0.5", "remote"]
    assert plan["legs"][-1]["provider"] == "moonshot"
    assert plan["missing"] == ["provider moonshot needs a key: set MOONSHOT_API_KEY"]
    assert plan["estimate"]["runs_of_legs"] == 10
    assert plan["settings"]["load_mode"] == "closed"
    assert list((tmp_path / "workplace").iterdir()) == []
    code, printed = dry(capsys, "--preset", "seed")
    assert code == 0
    assert "missing: provider moonshot needs a key" in printed.out.replace("\n", " ")
    assert all(len(line) <= 80 for line in printed.out.splitlines() if "runs/bench" not in line)


@pytest.mark.usefixtures("workplace")
def test_costs_are_estimated_from_the_users_prices(capsys, tmp_path):
    (tmp_path / "workplace" / "providers.toml").write_text(
        "[mine]\nbase_url = 'http://127.0.0.1:1/v1'\n"
        "prices = {currency = 'EUR', input_per_million_tokens = 1.0, output_per_million_tokens = 2.0}"
    )
    code, printed = dry(
        capsys, "--provider", "mine", "--remote-only", "--documents", "bundled", "--requests", "100", "--json",
    )  # fmt: skip
    assert code == 0
    plan = json.loads(printed.out)
    assert [leg["name"] for leg in plan["legs"]] == ["remote"]
    estimate = plan["estimate"]
    expected = (estimate["input_tokens_per_leg"] + 2 * estimate["output_tokens_per_leg_at_most"]) / 1e6
    assert estimate["cost_at_most"]["remote"] == {"amount": pytest.approx(expected), "currency": "EUR"}
    assert 0.9 < expected < 1.1  # a hundred requests of 9,000 tokens


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--load", "steady"], "--load 'steady' is not one of closed, open, fill"),
        (["--load", "open"], "--request-rate"),
        (["--provider", "nobody"], "no provider 'nobody'"),
        (["--retention", "1.5"], "retention 1.5 is outside"),
        (["--documents", "nothing"], "no documents 'nothing'"),
        (["--pool-memory", "lots"], "--pool-memory 'lots' is not a size; give a number with its unit"),
        (["--pool-memory", "0GiB"], "--pool-memory '0GiB' must lie between 1 byte and 1 EiB"),
        (["--pool-memory", "9999999999TiB"], "must lie between 1 byte and 1 EiB"),
        (["--verifier", "nonsense"], "no verifier 'nonsense'"),
        (["--preset", "other"], "no preset 'other'"),
        (["--profile", "absent.json"], "no budget file absent.json"),
        (["--remote-only"], "nothing to run"),
        (["--repetitions", "0"], "--repetitions"),
    ],
)
@pytest.mark.usefixtures("workplace")
def test_wrong_usage_is_one_line(capsys, arguments, said):
    code, printed = dry(capsys, *arguments)
    assert code == 2
    assert said in printed.err
    assert len(printed.err.splitlines()) == 1
    assert "Traceback" not in printed.err


@pytest.mark.usefixtures("workplace")
def test_a_missing_key_fails_its_leg_with_one_line(capsys, monkeypatch, tmp_path):
    """No key, no requests: the leg's line, a record of it, exit code 1."""
    monkeypatch.delenv("MOONSHOT_API_KEY", raising=False)
    code = run(["bench", "--model", str(POCKET), "--remote-only", "--provider", "moonshot", "--output", "run"])
    printed = capsys.readouterr()
    assert code == 1
    assert "failed: provider moonshot needs a key: set MOONSHOT_API_KEY" in printed.err
    record = json.loads((tmp_path / "workplace" / "run" / "record.json").read_text())
    (leg,) = record["legs"]
    assert (leg["status"], leg["reason"]) == ("failed", "provider moonshot needs a key: set MOONSHOT_API_KEY")
    assert leg["requests"] == []
    assert leg["model"] == "unknown"  # not the local one's


def test_the_script_is_the_preset(capsys, monkeypatch):
    import runpy

    monkeypatch.setattr("sys.argv", ["benchmark_kv_cache.py", str(POCKET), "--profile", PROFILE, "--dry-run", "--json"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(ROOT / "scripts" / "benchmark_kv_cache.py"), run_name="__main__")
    assert stop.value.code == 0
    assert json.loads(capsys.readouterr().out)["preset"] == "seed"
