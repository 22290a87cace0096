"""Which heads a profile keeps at a retention: one answer, the same for every command and for vLLM, or one refusal."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvprofile.bench.runner import budget_at
from kvprofile.budget import runtime_file, store
from kvprofile.budget.allocate import Constraints, allocate, satisfies
from kvprofile.budget.choice import choose, choose_whole
from kvprofile.budget.profile import HeadBudgets, Matrix, Profile, mean_budget
from kvprofile.cli import run
from kvprofile.errors import InputError
from kvprofile.evaluate.variants import Contender, build
from kvprofile.runtime.find import Served, find
from kvprofile.runtime.settings import from_environment
from tests.helpers.factories import make_profile
from tests.helpers.foreign import read_back, written

NAME = "example/model"


def stating(profile: Profile, heads: Matrix, key: str = "0.5") -> Profile:
    """The profile with another budget at a retention, as if somebody had edited the file."""
    budgets = HeadBudgets(heads=heads, retention_realised=mean_budget(heads))
    return profile.model_copy(update={"budgets": {**profile.budgets, key: budgets}})


def turned(profile: Profile) -> Matrix:
    """The budget at 0.5 with the full heads of each layer in the order of the layers reversed."""
    return profile.budgets["0.5"].heads[::-1]


def as_imported(profile: Profile, name: str, retention: float, folder: Path) -> Profile:
    return read_back(profile, name, written(profile, name, folder, retention=retention))


@pytest.fixture
def profiles(tmp_path: Path) -> dict[str, Profile]:
    scored = make_profile(name=NAME)
    edited = stating(scored, turned(scored))
    assert edited.budgets["0.5"].heads != scored.budgets["0.5"].heads
    return {
        "scored": scored,
        "sliding": make_profile(name=NAME, sliding=(1, 4)),
        "tied": make_profile(name=NAME, scores=[[0.5] * 4] * 6),
        "edited": edited,
        "imported csv": as_imported(edited, "csv", 0.5, tmp_path),
        "imported lu-kv": as_imported(edited, "lu-kv", 0.5, tmp_path),
        "imported runtime file": as_imported(edited, "vllm", 0.5, tmp_path),
    }


def by_every_way(profile: Profile, retention: float, folder: Path, capsys: pytest.CaptureFixture[str]) -> dict:
    """Full heads at a retention as each command and the plugin tell them."""
    file = folder / "profile.json"
    store.save(profile, file)
    geometry = profile.model.geometry

    def told(*arguments: str) -> dict:
        assert run([*arguments, "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    def full(heads: Matrix) -> set[tuple[int, int]]:
        return {(layer, head) for layer, row in enumerate(heads) for head, value in enumerate(row) if value == 1.0}

    def exported(form: str, name: str) -> Path:
        told(
            "export",
            str(file),
            "--format",
            form,
            "--retention",
            f"{retention}",
            "--force",
            "--output",
            str(folder / name),
        )
        return folder / name

    found = {"show": full(told("show", str(file), "--retention", f"{retention}")["heads"])}
    written_file = runtime_file.load(exported("vllm", "runtime.json"))
    found["export"] = full(written_file.budgets())
    if profile.scoring.imported_from is None or profile.scoring.imported_from.format != "vllm":
        with open(exported("csv", "table.csv"), newline="") as stream:
            rows = list(csv.DictReader(stream))
        found["export csv"] = {(int(r["layer"]), int(r["kv_head"])) for r in rows if float(r["budget"]) == 1.0}
    variants = build([Contender("it", profile)], geometry, [retention], controls=False)
    found["evaluate"] = full(next(each.heads for each in variants if each.kind == "profile"))
    found["bench"] = full(budget_at(file, retention, 1).heads)
    served = Served((NAME,), geometry.layers, geometry.attention_heads, geometry.kv_heads, geometry.head_size, 1)
    settings = from_environment({"LLM_KVZIP_BUDGET": str(file), "LLM_KVZIP_RETENTION": f"{retention}"})
    budget, _ = find(settings, served)
    found["plugin"] = full([row or [] for row in budget.shares])

    # diff and plan tell counts: against a profile that trims every head, diff lists those that are not trimmed
    nothing = stating(
        profile, [[None if v is None else 0.0 for v in row] for row in profile.scores.max], f"{retention}"
    )
    store.save(nothing, folder / "nothing.json")
    compared = told("diff", str(folder / "nothing.json"), str(file), "--retention", f"{retention}")
    moved = next(at["moved"] for at in compared["at"] if at["retention"] == retention)
    found["diff"] = {(each["layer"], each["kv_head"]) for each in moved if each["after"] == 1.0}
    planned = told("plan", str(file), "--gpu-memory", "24GiB", "--context", "9000", "--retention", f"{retention}")
    count = next(at["full_heads"] for at in planned["at"] if at["retention"] == retention)
    found["plan"] = found["show"] if count == len(found["show"]) else {("plan", count)}
    return found


NAMES = ["scored", "sliding", "tied", "edited", "imported csv", "imported lu-kv", "imported runtime file"]


@pytest.mark.parametrize("name", NAMES)
def test_every_command_and_the_plugin_keep_the_same_heads(name, profiles, tmp_path, capsys):
    profile = profiles[name]
    for retention in (0.5,) if name == "imported runtime file" else (0.9, 0.5, 0.37):
        expected = choose(profile, retention).allocation
        found = by_every_way(profile, retention, tmp_path, capsys)
        assert all(heads == found["show"] for heads in found.values()), found
        assert len(found["show"]) == expected.full_heads
    assert len(found) >= 7


def test_a_budget_with_fractions_is_shown_as_it_stands_and_refused_by_whatever_serves_it(tmp_path, capsys):
    scored = make_profile(name=NAME)
    halves = [[0.5 if head == 1 else value for head, value in enumerate(row)] for row in scored.budgets["0.5"].heads]
    profile = stating(scored, halves)
    file = tmp_path / "profile.json"
    store.save(profile, file)

    assert run(["show", str(file), "--retention", "0.5", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["heads"] == halves
    assert choose(profile, 0.5).heads == halves
    out = tmp_path / "table.csv"
    assert run(["export", str(file), "--format", "csv", "--retention", "0.5", "--output", str(out)]) == 0
    assert out.read_text().count(",0.5\n") == 6
    capsys.readouterr()
    assert run(["plan", str(file), "--gpu-memory", "24GiB", "--context", "9000", "--retention", "0.5"]) == 0
    assert "the file holds fractions of heads at retention 0.5; only whole heads can be served" in " ".join(
        capsys.readouterr().out.split()
    )

    line = (
        "the budget of example/model at retention 0.5 keeps 0.5 of layer 0, KV head 1, but only whole heads can be "
        "served; choose another retention, or remove budgets['0.5'] from the file to rank heads by score"
    )
    geometry = profile.model.geometry
    served = Served((NAME,), geometry.layers, geometry.attention_heads, geometry.kv_heads, geometry.head_size, 1)
    settings = from_environment({"LLM_KVZIP_BUDGET": str(file), "LLM_KVZIP_RETENTION": "0.5"})
    for refused in (
        lambda: choose_whole(profile, 0.5),
        lambda: find(settings, served),
        lambda: budget_at(file, 0.5, 1),
        lambda: build([Contender("it", profile)], geometry, [0.5]),
    ):
        with pytest.raises(InputError) as caught:
            refused()
        assert str(caught.value) == line
    target = tmp_path / "runtime.json"
    assert run(["export", str(file), "--format", "vllm", "--retention", "0.5", "--output", str(target)]) == 2
    assert line in capsys.readouterr().err
    assert not target.exists()
    with pytest.raises(InputError, match="constraints choose whole heads"):
        choose(profile, 0.5, Constraints(floor=1))
    assert choose_whole(profile, 0.7).heads == scored.budgets["0.7"].heads


def test_constraints_keep_a_stated_budget_that_meets_them_and_say_so_where_it_does_not():
    profile = make_profile(2, 4, scores=[[0.9, 0.8, 0.7, 0.6], [0.1, 0.2, 0.3, 0.4]])
    even = stating(profile, [[1.0, 0.0, 0.0, 1.0], [0.0, 1.0, 1.0, 0.0]])
    uneven = stating(profile, [[1.0, 1.0, 0.0, 0.0], [0.0, 1.0, 1.0, 0.0]])
    ranks = Constraints(tensor_parallel_size=2)
    kept = choose(even, 0.5, ranks)
    assert (kept.heads, kept.stated) == (even.budgets["0.5"].heads, True)
    left = choose(uneven, 0.5, ranks)
    assert not left.stated
    assert left.heads == [[1.0] * 4, [0.0] * 4]
    assert left.allocation.reason == "the file's own budget was left for the constraints, so heads were chosen by score"
    assert not choose(even, 0.5, replace(ranks, pipeline_stages=(1, 1))).stated
    with pytest.raises(InputError, match="tensor-parallel size 3 does not deal 4 KV heads evenly"):
        choose(even, 0.5, Constraints(tensor_parallel_size=3))


@given(st.integers(0, 50), st.sampled_from([0.9, 0.5, 0.3, 0.21]), st.sampled_from([1, 2, 4, 8]), st.integers(0, 4))
def test_a_stated_choice_by_score_is_the_choice_under_constraints_that_it_meets(seed, retention, ranks, floor):
    profile = make_profile(seed=seed)
    constraints = Constraints(floor=floor, tensor_parallel_size=ranks)
    found = choose(profile, retention, constraints)
    assert satisfies(found.heads, constraints)
    free = choose(profile, retention)
    if satisfies(free.heads, constraints):
        assert found.heads == free.heads == allocate(profile.scores.max, retention).heads


def test_another_statistic_ranks_anew_and_an_unknown_one_is_refused():
    profile = make_profile(2, 2, scores=[[0.9, 0.8], [0.2, 0.1]], mean=[[0.1, 0.2], [0.8, 0.9]])
    assert choose(profile, 0.5).heads == [[1.0, 1.0], [0.0, 0.0]]
    by_mean = choose(profile, 0.5, statistic="mean")
    assert by_mean.heads == [[0.0, 0.0], [1.0, 1.0]]
    assert by_mean.origin == "preview, ranked now by mean"
    with pytest.raises(InputError, match="has no statistic p99; it has max, mean"):
        choose(profile, 0.5, statistic="p99")
