"""The commands where a file states less, or more, than usual, and where an argument is beyond all bounds."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kvprofile.budget import store
from tests.helpers import foreign
from tests.helpers.factories import make_profile
from tests.unit.cli.test_show_validate_diff_plot_plan import CONFIG, refused, save, shown


@pytest.fixture(autouse=True)
def in_an_empty_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["m", "--gpu-memory", "9" * 400 + "GiB", "--context", "9"], "more than 1 EiB"),
        (["m", "--gpu-memory", "H100 " + "9" * 5000 + "GB", "--context", "9"], "no size with a unit"),
        (["m", "--gpu-memory", "24GiB", "--context", "9", "--weights-gib", "1e308"], "no size"),
        (["m", "--gpu-memory", "24GiB", "--context", "9", "--weights-gib", "nan"], "--weights-gib"),
        (["m", "--gpu-memory", "24GiB", "--context", "9" * 400], "context"),
        (["~nosuchuser/x", "--gpu-memory", "24GiB", "--context", "9"], "no model ~nosuchuser/x here"),
        (["x" * 300, "--gpu-memory", "24GiB", "--context", "9"], "no model xxx"),
        (["x" * 300 + "/config.json", "--gpu-memory", "24GiB", "--context", "9"], "has no config.json"),
    ],
)
def test_plan_refuses_what_overflows(capsys, arguments, message):
    Path("m").mkdir()
    Path("m/config.json").write_text(json.dumps(CONFIG))
    assert message in refused(capsys, "plan", *arguments)


# a profile without scores, and one with many budgets


def save_without_scores(file: str, retention: float = 0.4) -> None:
    """A profile imported from a runtime file of make_profile() at a retention."""
    profile = make_profile()
    written = foreign.written(profile, "vllm", Path(), retention=retention)
    store.save(foreign.read_back(profile, "vllm", written), Path(file))


NO_SCORES = (
    "was imported from a runtime file, which holds no scores; only retention 0.4 is known, and only as it stands"
)


def test_show_of_a_runtime_file_keeps_to_what_it_states(capsys):
    save_without_scores("v.json")
    for arguments in ((), ("--retention", "0.4")):
        out = shown(capsys, "show", "v.json", *arguments)
        assert "10 of 24 heads keep the whole context (retention 0.417)\nstored in the file" in out
        assert "no scores" in out
    assert json.loads(shown(capsys, "show", "v.json", "--json"))["scores"] is None
    assert NO_SCORES in refused(capsys, "show", "v.json", "--retention", "0.2")
    assert "--retention" in refused(capsys, "show", "v.json", "--retention", "nan")


def test_diff_of_a_runtime_file_keeps_to_what_it_states(capsys):
    save("a.json")
    save_without_scores("v.json")
    out = shown(capsys, "diff", "a.json", "v.json")
    assert "warning: the second file has no scores (a runtime file): compared at 0.4 only" in out
    assert "at retention 0.4: no heads change" in out
    assert "A max" not in out
    document = json.loads(shown(capsys, "diff", "a.json", "v.json", "--json"))
    assert document["rank_correlation"] is None
    assert [(at["retention"], at["top_overlap"]) for at in document["at"]] == [(0.4, None)]
    assert NO_SCORES in refused(capsys, "diff", "v.json", "a.json", "--retention", "0.5")
    save_without_scores("w.json", 0.6)
    assert "state no retention in common: 0.4 and 0.6" in refused(capsys, "diff", "v.json", "w.json")


def test_plan_of_a_runtime_file_keeps_to_what_it_states(capsys):
    save_without_scores("v.json")
    call = ["plan", "v.json", "--gpu-memory", "24GiB", "--context", "9000"]
    document = json.loads(shown(capsys, *call, "--json"))
    assert [(at["retention"], at["full_heads"]) for at in document["at"]] == [(1.0, 24), (0.4, 10)]
    assert NO_SCORES in refused(capsys, *call, "--retention", "0.5")
    assert NO_SCORES in refused(capsys, *call, "--tensor-parallel-size", "2")


def test_ninety_nine_budgets_are_shown_checked_planned_and_plotted(capsys):
    profile = make_profile(28, 4)
    table = foreign.written(profile, "lu-kv", Path())
    store.save(foreign.read_back(profile, "lu-kv", table), Path("b.json"))
    assert len(store.load(Path("b.json")).budgets) == 99
    assert "stored in the file" in shown(capsys, "show", "b.json", "--retention", "0.37")
    assert "ok " in shown(capsys, "validate", "b.json")
    document = json.loads(shown(capsys, "plan", "b.json", "--gpu-memory", "L4", "--context", "900", "--json"))
    assert [at["retention"] for at in document["at"]] == [1.0, 0.9, 0.7, 0.5, 0.3]
    save("a.json", layers=28)
    for name in ("a", "b"):  # the picture has the presets, as that of the profile it was made from
        shown(capsys, "plot", f"{name}.json", "--output", f"{name}.svg", "--kind", "layers")
    assert len(Path("a.svg").read_bytes()) == pytest.approx(len(Path("b.svg").read_bytes()), rel=0.2)


def test_names_that_are_too_long_are_one_line(capsys):
    save("a.json")
    name = "n" * 300
    assert "no budget file nnn" in refused(capsys, "show", name)
    assert "no budget file nnn" in refused(capsys, "diff", "a.json", name)
    assert "File name too long" in refused(capsys, "plot", "a.json", "--output", f"{name}.png")
    assert "File name too long" in refused(capsys, "plot", "a.json", "--output", f"{name}/a.png")
