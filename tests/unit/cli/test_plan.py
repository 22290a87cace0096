"""kvprofile plan."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kvprofile.budget import store
from tests.helpers.commands import CONFIG, NO_SCORES, refused, save, save_without_scores, shown
from tests.helpers.factories import make_graded, make_profile

pytestmark = pytest.mark.usefixtures("workplace")


def test_plan_prints_a_table_of_80_columns(capsys):
    Path("model").mkdir()
    Path("model/config.json").write_text(json.dumps(CONFIG))
    arguments = ["plan", "model", "--gpu-memory", "L4", "--context", "9000", "--tensor-parallel-size", "2"]
    out = shown(capsys, *arguments)
    assert max(len(line) for line in out.splitlines()) <= 80
    # 2 x 16 layers x 4 heads x 64 x 2 bytes
    assert "cache per token 16 KiB, 8 KiB on each GPU" in out
    assert "weights: 0.50 GiB" not in out
    assert "estimate" in out


def test_plan_json_is_one_document(capsys):
    Path("model").mkdir()
    Path("model/config.json").write_text(json.dumps(CONFIG))
    arguments = ["plan", "model", "--gpu-memory", "24GiB", "--context", "9000", "--retention", "0.5", "--json"]
    document = json.loads(shown(capsys, *arguments))
    assert document["kv_bytes_per_token"] == 16_384
    assert [at["retention"] for at in document["at"]] == [1.0, 0.5]
    assert document["geometry"]["kv_heads"] == 4
    assert {"what", "value", "reason"} == set(document["decisions"][0])


def test_plan_shows_unknown_numbers_as_unknown(capsys):
    save("a.json")
    assert "unknown" in shown(capsys, "plan", "a.json", "--gpu-memory", "24GiB", "--context", "9000")
    arguments = ["plan", "a.json", "--gpu-memory", "24GiB", "--context", "9000"]
    assert json.loads(shown(capsys, *arguments, "--json"))["at"][0]["requests"] is None
    assert "unknown" not in shown(capsys, *arguments, "--weights-gib", "1.5", "--dtype", "bf16").split("decided")[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing", "--gpu-memory", "24GiB", "--context", "9"], "not in the local hub cache"),
        (["a/b/c", "--gpu-memory", "24GiB", "--context", "9"], "not in the local hub cache"),
        (["a.json", "--gpu-memory", "24", "--context", "9"], "unit"),
        (["a.json", "--gpu-memory", "24GiB", "--context", "0"], "context"),
        (["a.json", "--gpu-memory", "24GiB", "--context", "9", "--dtype", "int3"], "int3"),
        (
            ["a.json", "--gpu-memory", "24GiB", "--context", "9", "--tensor-parallel-size", "3"],
            "give one of 1, 2, 4, 8",
        ),
        (["a.json", "--gpu-memory", "24GiB", "--context", "9", "--weights-gib", "inf"], "is not a size"),
        (["a.json", "--gpu-memory", "24GiB", "--context", "9", "--memory-utilization", "0"], "outside"),
        ([".", "--gpu-memory", "24GiB", "--context", "9"], "no config.json"),
    ],
)
def test_plan_refuses_with_one_line(capsys, arguments, message):
    save("a.json")
    assert message in refused(capsys, "plan", *arguments)


pytestmark = pytest.mark.usefixtures("workplace")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["m", "--gpu-memory", "9" * 400 + "GiB", "--context", "9"], "more than 1 EiB"),
        (["m", "--gpu-memory", "H100 " + "9" * 5000 + "GB", "--context", "9"], "is neither a size with a unit"),
        (["m", "--gpu-memory", "24GiB", "--context", "9", "--weights-gib", "1e308"], "is not a size"),
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


def test_plan_of_a_runtime_file_keeps_to_what_it_states(capsys):
    save_without_scores("v.json")
    call = ["plan", "v.json", "--gpu-memory", "24GiB", "--context", "9000"]
    document = json.loads(shown(capsys, *call, "--json"))
    assert [(at["retention"], at["full_heads"]) for at in document["at"]] == [(1.0, 24), (0.4, 10)]
    assert NO_SCORES in refused(capsys, *call, "--retention", "0.5")
    assert NO_SCORES in refused(capsys, *call, "--tensor-parallel-size", "2")


def test_a_folder_is_counted_with_the_budget_file_of_its_model(capsys):
    Path("model").mkdir()
    Path("model/config.json").write_text(json.dumps(CONFIG))
    call = ("plan", "model", "--gpu-memory", "24GiB", "--context", "9000", "--retention", "0.3", "--json")
    alone = json.loads(shown(capsys, *call))
    assert (alone["kind"], alone["sink_tokens"]) == ("whole", 128)
    assert "no models/kv_budget/model.json is there" in refused(capsys, *call, "--kind", "graded")
    file = store.default_path("model")
    shape = {"layers": 16, "kv_heads": 4, "query_groups": 4, "name": "model"}
    store.save(make_graded(**shape, sink_tokens=4), file)
    found = json.loads(shown(capsys, *call))
    assert (found["kind"], found["sink_tokens"]) == ("graded", 4)
    assert found["weight_bytes"] == alone["weight_bytes"]
    said = {each["what"]: each for each in found["decisions"]}
    assert said["budget file"]["value"] == str(file)
    assert "no probe models/kv_budget/model.probe.safetensors" in said["probe"]["reason"]
    store.save(make_graded(**shape, head_size=32), file)
    assert json.loads(shown(capsys, *call))["kind"] == "whole"  # a file of another shape
    file.write_text("{")
    assert "models/kv_budget/model.json" in refused(capsys, *call)


def test_graded_heads_are_counted_unless_whole_ones_are_asked_for(capsys):
    store.save(make_graded(), Path("graded.json"))
    options = ("graded.json", "--gpu-memory", "24GiB", "--context", "9000", "--retention", "0.3")
    whole, graded = (json.loads(shown(capsys, "plan", *options, *kind, "--json")) for kind in (("--kind", "whole"), ()))
    at = {name: next(row for row in found["at"] if row["retention"] == 0.3) for name, found in
          (("whole", whole), ("graded", graded))}  # fmt: skip
    assert at["graded"]["retention_realised"] == pytest.approx(0.3, abs=1e-5)
    assert at["whole"]["full_heads"] == 7
    assert (whole["kind"], graded["kind"]) == ("whole", "graded")
    assert "full" not in shown(capsys, "plan", *options)
    assert "full" in shown(capsys, "plan", *options, "--kind", "whole")
    assert {"what": "kind", "value": "graded", "reason": "the file has a probe"} in graded["decisions"]
    assert "vLLM serves the same with LLM_KVZIP_KIND=whole" in json.dumps(whole["decisions"])
    store.save(make_profile(), Path("whole.json"))
    assert "which need a probe" in refused(capsys, "plan", "whole.json", *options[1:], "--kind", "graded")
