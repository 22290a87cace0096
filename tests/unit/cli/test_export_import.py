"""``kvprofile export`` and ``kvprofile import`` as people call them: exit codes, messages, every format."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest

from kvprofile import cli
from kvprofile.budget import formats, runtime_file, store
from kvprofile.budget.profile import HeadBudgets, Profile
from tests.helpers.factories import make_graded, make_profile
from tests.helpers.foreign import SUFFIX

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "hidden_size": 512,
}


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    """A folder with models/kv_budget/example--model.json and a config.json."""
    monkeypatch.chdir(tmp_path)
    store.save(make_profile(), store.BUDGET_DIR / store.file_name("example/model"))
    Path("config.json").write_text(json.dumps(CONFIG))
    return tmp_path


def run(capsys, *arguments: str) -> tuple[int, str, str]:
    """(exit code, stdout, stderr)."""
    code = cli.run(list(arguments))
    said = capsys.readouterr()
    return code, said.out, said.err


def refused(capsys, *arguments: str) -> str:
    """The one line on stderr with which a call is refused with exit code 2; nothing on stdout."""
    code, out, err = run(capsys, *arguments)
    assert (code, out) == (2, "")
    assert err.startswith("kvprofile: ")
    assert err.count("\n") == 1
    assert "Traceback" not in err
    return err


@pytest.mark.parametrize("name", formats.FORMATS)
def test_every_format_goes_out_and_comes_back(name, place, capsys):
    code, out, err = run(
        capsys, "export", "example/model", "--format", name, "--retention", "0.5", "--output", SUFFIX[name], "--json"
    )
    assert (code, err) == (0, "")
    report = json.loads(out)
    assert (report["model"], report["format"], report["output"]) == ("example/model", name, SUFFIX[name])
    code, out, err = run(
        capsys, "import", SUFFIX[name], "--format", name, "--model", "example/model", "--output", "b.json", "--json"
    )
    assert (code, err) == (0, "")
    assert json.loads(out)["verified_against_weights"] is False
    found = store.load(place / "b.json")
    assert found.budgets["0.5"] == make_profile().budgets["0.5"]
    assert found.scoring.imported_from.file == SUFFIX[name] if name != "duo-attention" else "full_attention_heads.tsv"


@pytest.mark.parametrize("command", ["export", "import"])
def test_help_lists_the_registry(command, capsys):
    code, out, _ = run(capsys, command, "--help")
    assert code == 0
    words = out.replace("│", " ").replace(",", " ").replace(".", " ").split()
    assert set(formats.FORMATS) <= set(words)


@pytest.mark.usefixtures("place")
def test_an_unknown_format_is_refused_with_the_names(capsys):
    for call in (("export", "example/model", "--output", "x"), ("import", "x", "--model", "example/model")):
        assert "unknown format 'onnx'; use one of kvzip, duo-attention, lu-kv, vllm, csv" in refused(
            capsys, *call, "--format", "onnx"
        )


@pytest.mark.usefixtures("place")
def test_text_output_says_what_was_kept(capsys):
    code, out, _ = run(
        capsys, "export", "example/model", "--format", "vllm", "--retention", "0.4", "--output", "x.json"
    )
    assert code == 0
    assert out.splitlines() == [
        "wrote x.json: vllm, example/model",
        "10 of 24 heads keep the whole context (retention 0.4 asked, 0.4167 realised)",
    ]
    store.save(make_graded(), Path("graded.json"))
    _, out, _ = run(capsys, "export", "graded.json", "--format", "vllm", "--retention", "0.4", "--output", "g.json")
    assert out.splitlines()[-1].startswith(
        "a runtime file holds whole heads; for graded ones give vLLM the budget file"
    )


@pytest.mark.usefixtures("place")
def test_constraints_are_reported_with_their_cost(capsys):
    call = ("export", "example/model", "--format", "vllm", "--retention", "0.4", "--output", "x.json")
    code, out, _ = run(capsys, *call, "--tensor-parallel-size", "4", "--pipeline-parallel-size", "2")
    assert code == 0
    assert "retention 0.4 asked, 0.3333 realised" in out
    assert "not as asked: tensor-parallel size 4 makes a layer's heads full 4 at a time; 8 heads are nearest" in out
    assert "the constraints exchange" in out
    written = runtime_file.load(Path("x.json"))
    assert {len(row) for row in written.full_heads} == {0, 4}
    assert written.provenance.pipeline_stages == [3, 3]
    assert written.provenance.tensor_parallel_size == 4
    code, out, _ = run(capsys, *call, "--tensor-parallel-size", "2", "--json")
    assert json.loads(out)["constrained"]
    assert 0.0 < json.loads(out)["score_share"] <= 1.0


def test_an_edited_budget_is_called_edited_and_costs_no_constraint(place, capsys):
    profile = make_profile()
    heads = [list(row) for row in profile.budgets["0.5"].heads]
    heads[0] = [1.0 - value for value in heads[0]]
    full = sum(heads[0]) - sum(profile.budgets["0.5"].heads[0])
    assert full == 0  # two heads full, two trimmed: the edit exchanges two and keeps the retention
    edited = HeadBudgets(heads=heads, retention_realised=0.5)
    for budgets, words in ((edited, "2 heads"), (swapped_once(profile), "1 head")):
        store.save(profile.model_copy(update={"budgets": {"0.5": budgets}}), place / "e.json")
        call = ("export", "e.json", "--format", "vllm", "--retention", "0.5", "--output", "x.json")
        code, out, _ = run(capsys, *call)
        assert code == 0
        assert out.splitlines()[1:] == [
            "12 of 24 heads keep the whole context (retention 0.5 asked, 0.5000 realised)",
            f"the file's budget at 0.5 was edited: it differs from the choice by score in {words}",
        ]
        assert "was edited" in runtime_file.load(Path("x.json")).provenance.reason
    out = run(capsys, *call, "--pipeline-parallel-size", "2", "--tensor-parallel-size", "2")[1]
    assert "not as asked: the file's own budget was left for the constraints, so heads were chosen by score" in out
    assert re.search(r"the constraints exchange (1 head|\d+ heads) and keep", out)


def swapped_once(profile: Profile) -> HeadBudgets:
    """The budget at 0.5 with its first full and its first trimmed head exchanged."""
    flat = [value for row in profile.budgets["0.5"].heads for value in row]
    one, other = flat.index(1.0), flat.index(0.0)
    flat[one], flat[other] = 0.0, 1.0
    return HeadBudgets(heads=[flat[i : i + 4] for i in range(0, 24, 4)], retention_realised=0.5)


@pytest.mark.usefixtures("place")
def test_a_table_of_fractions_is_reported_as_it_is_written(capsys):
    np.save("in.npy", np.full((99, 6, 4), 0.25, dtype=np.float32))
    call = ("--format", "lu-kv", "--output")
    assert run(capsys, "import", "in.npy", *call, "b.json", "--model", "example/model")[0] == 0
    out = run(capsys, "export", "b.json", *call, "x.npy", "--retention", "0.5")[1]
    assert "0 of 24 heads keep the whole context (retention 0.5 asked, 0.7500 realised)" in out
    assert "the file's own budget holds fractions of heads\n" in out
    assert Path("x.npy").read_bytes() == Path("in.npy").read_bytes()


@pytest.mark.parametrize("name", ["kvzip", "duo-attention"])
@pytest.mark.parametrize("retention", ["nan", "inf", "-inf", "7", "0"])
@pytest.mark.usefixtures("place")
def test_formats_of_scores_refuse_what_is_not_a_retention(name, retention, capsys):
    call = ("export", "example/model", "--format", name, "--retention", retention, "--output", "x")
    assert "is outside (0, 1]" in refused(capsys, *call)
    assert "is outside (0, 1]" in refused(capsys, *call, "--json")
    assert not Path("x").exists()


@pytest.mark.usefixtures("place")
def test_names_that_are_too_long_are_refused(capsys):
    name = "n" * 300
    export = ("export", "example/model", "--retention", "0.5", "--output", name, "--format")
    for form in formats.FORMATS:
        assert "File name too long" in refused(capsys, *export, form)
        assert refused(capsys, "import", name, "--format", form, "--model", "example/model")
    run(capsys, *export[:4], "--format", "vllm", "--output", "x.json")
    run(capsys, *export[:2], "--format", "csv", "--output", "x.csv")
    assert f"not for {name}" in refused(capsys, "import", "x.json", "--format", "vllm", "--model", name)
    assert "is not known here" in refused(capsys, "import", "x.csv", "--format", "csv", "--model", name)
    call = ("import", "x.csv", "--format", "csv", "--model", "example/model", "--output", name)
    assert "File name too long" in refused(capsys, *call)


@pytest.mark.usefixtures("place")
def test_kvzips_rule_is_set_next_to_ours(capsys):
    code, out, _ = run(capsys, "export", "example/model", "--format", "kvzip", "--retention", "0.2", "--output", "x.pt")
    assert code == 0
    assert "at ratio 0.2 KVzip's own rule keeps 0 of 24 heads, kvprofile 5" in out


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--format", "vllm"), "give --retention"),
        (("--format", "vllm", "--retention", "0"), "retention 0 is outside (0, 1]"),
        (("--format", "vllm", "--retention", "1.5"), "retention 1.5 is outside (0, 1]"),
        (("--format", "vllm", "--retention", "half"), "Invalid value for '--retention'"),
        (("--format", "vllm", "--retention", "0.5", "--tensor-parallel-size", "3"), "does not deal 4 KV heads evenly"),
        (("--format", "vllm", "--retention", "0.5", "--tensor-parallel-size", "0"), "tensor-parallel-size"),
        (("--format", "vllm", "--retention", "0.5", "--pipeline-parallel-size", "7"), "7 pipeline stages for 6 layers"),
        (("--format", "vllm", "--retention", "0.5", "--floor", "5"), "floor of 5"),
        (("--format", "kvzip", "--tensor-parallel-size", "2"), "cannot carry constraints"),
    ],
)
@pytest.mark.usefixtures("place")
def test_wrong_options_of_export_write_nothing(options, words, capsys):
    assert words in refused(capsys, "export", "example/model", *options, "--output", "x")
    assert not Path("x").exists()


@pytest.mark.usefixtures("place")
def test_missing_inputs_are_named(capsys):
    assert "no budget file you/other" in refused(capsys, "export", "you/other", "--format", "csv", "--output", "x.csv")
    call = ("import", "gone.pt", "--format", "kvzip")
    assert "gone.pt: cannot read: No such file" in refused(capsys, *call, "--model", "example/model")
    assert "kvzip files do not name their model; give --model" in refused(capsys, *call)
    assert "the shape of you/other is not known here" in refused(capsys, *call, "--model", "you/other")


def test_the_output_of_another_model_is_kept_without_force(place, capsys):
    store.save(make_profile(name="you/other"), place / "other.json")
    call = ("--format", "vllm", "--retention", "0.5", "--output", "x.json")
    assert run(capsys, "export", "example/model", *call)[0] == 0
    assert run(capsys, "export", "example/model", *call)[0] == 0  # the same model's file is replaced
    before = Path("x.json").read_bytes()
    assert "x.json is for example/model, not for you/other; pass --force" in refused(
        capsys, "export", "other.json", *call
    )
    assert Path("x.json").read_bytes() == before
    assert run(capsys, "export", "other.json", *call, "--force")[0] == 0

    call = ("export", "example/model", "--format", "csv", "--output", "other.json")
    assert "other.json exists and names no model, so it may be another model's; pass --force" in refused(capsys, *call)
    assert store.load(place / "other.json").model.name == "you/other"

    assert run(capsys, "export", "example/model", "--format", "csv", "--output", "x.csv")[0] == 0
    call = ("import", "x.csv", "--format", "csv", "--model", "example/model", "--output", "other.json")
    assert "other.json belongs to you/other" in refused(capsys, *call)
    assert run(capsys, *call, "--force")[0] == 0
    assert store.load(place / "other.json").model.name == "example/model"


@pytest.mark.usefixtures("place")
def test_a_runtime_file_of_another_model_is_not_imported(capsys):
    run(capsys, "export", "example/model", "--format", "vllm", "--retention", "0.5", "--output", "x.json")
    call = ("import", "x.json", "--format", "vllm", "--output", "b.json")
    assert "x.json is for example/model, not for you/other" in refused(capsys, *call, "--model", "you/other")
    assert run(capsys, *call)[0] == 0


def test_import_takes_provenance_a_config_and_a_default_place(place, capsys):
    run(capsys, "export", "example/model", "--format", "csv", "--output", "x.csv")
    code, out, _ = run(
        capsys,
        *("import", "x.csv", "--format", "csv", "--model", "me/new", "--config", "config.json"),
        *("--repository", "https://example.org/scores", "--commit", "5d84729", "--licence", "MIT"),
    )
    assert code == 0
    assert "imported from https://example.org/scores, not verified against weights" in out
    source = store.load(place / "models/kv_budget/me--new.json").scoring.imported_from
    assert (source.repository, source.commit, source.licence) == ("https://example.org/scores", "5d84729", "MIT")
    call = ("import", "x.csv", "--format", "csv", "--model", "me/new", "--commit", "main")
    assert "commit" in refused(capsys, *call)


@pytest.mark.usefixtures("place")
@pytest.mark.parametrize("name", formats.FORMATS)
def test_a_broken_file_of_every_format_is_one_line_and_exit_code_two(name, capsys):
    Path("broken").write_bytes(b"\x80\x04\x95 not a file of any kind")
    line = refused(capsys, "import", "broken", "--format", name, "--model", "example/model", "--output", "b.json")
    assert line.startswith("kvprofile: broken: ")
    assert not Path("b.json").exists()


@pytest.mark.usefixtures("place")
def test_a_pattern_folder_that_names_another_model_is_questioned(capsys):
    """Of one shape it would fit, and trim the wrong heads."""
    code, _, _ = run(capsys, "export", "example/model", "--format", "duo-attention", "--output", "x")
    assert code == 0
    call = ("import", "x", "--format", "duo-attention", "--model", "other/tuned", "--config", "config.json")
    assert "x is for example/model, not for other/tuned; pass --force" in refused(capsys, *call)
    assert not store.default_path("other/tuned").exists()
    assert "x/full_attention_heads.tsv is for example/model" in refused(
        capsys, "import", "x/full_attention_heads.tsv", *call[2:]
    )
    assert run(capsys, *call, "--force")[0] == 0
    assert store.default_path("other/tuned").exists()
    assert run(capsys, "import", "x", "--format", "duo-attention", "--model", "example/model")[0] == 0
