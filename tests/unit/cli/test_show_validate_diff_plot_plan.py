from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from kvprofile.budget import store
from kvprofile.cli import heatmap, run
from tests.helpers.factories import make_profile

CONFIG = {
    "model_type": "llama",
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 16,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "vocab_size": 32000,
    "torch_dtype": "bfloat16",
}


@pytest.fixture(autouse=True)
def in_an_empty_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)


def save(file: str, **arguments: object) -> Path:
    path = Path(file)
    shape = (arguments.pop("layers", 6), arguments.pop("kv_heads", 4))
    store.save(make_profile(*shape, **arguments), path)
    return path


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line on stderr of a command that must end with exit code 2."""
    assert run(list(arguments)) == 2
    error = capsys.readouterr().err
    assert error.startswith("kvprofile: ")
    assert error.count("\n") == 1
    assert "Traceback" not in error
    return error


def shown(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert run(list(arguments)) == 0
    return capsys.readouterr().out


# show


@pytest.mark.parametrize("shape", [(6, 4), (28, 4), (36, 8), (48, 8), (32, 32), (80, 8), (126, 8)])
@pytest.mark.parametrize("imported", [False, True])
def test_show_fits_80_columns(capsys, shape, imported):
    save("a.json", layers=shape[0], kv_heads=shape[1], imported=imported, query_groups=5)
    out = shown(capsys, "show", "a.json", "--retention", "0.6")
    assert max(len(line) for line in out.splitlines()) <= 80
    assert ("imported from https://github.com/snu-mllab/KVzip, not verified against weights" in out) == imported


def test_show_previews_a_retention_without_writing(capsys):
    path = save("a.json", layers=4, kv_heads=4)
    before = path.read_bytes()
    out = shown(capsys, "show", "a.json", "--retention", "0.6")
    assert "10 of 16 heads keep the whole context (retention 0.625)" in out
    assert "preview, ranked now by max" in out
    assert "128 sinks + last 256 tokens" in out
    assert "stored in the file" in shown(capsys, "show", "a.json")
    assert path.read_bytes() == before
    assert list(Path().iterdir()) == [path]


def test_show_draws_another_statistic(capsys):
    mean = [[0.001 * (layer + head) for head in range(4)] for layer in range(6)]
    save("a.json", mean=mean)
    out = shown(capsys, "show", "a.json", "--statistic", "mean")
    assert "score (mean) from 0 to 0.008" in out
    assert "preview, ranked now by mean" in out
    document = json.loads(shown(capsys, "show", "a.json", "--statistic", "mean", "--json"))
    assert document["scores"] == mean
    assert document["statistic"] == "mean"
    assert "has no statistic p99; it has max, mean" in refused(capsys, "show", "a.json", "--statistic", "p99")
    assert "median" in refused(capsys, "show", "a.json", "--statistic", "median")


def test_show_json_is_one_document(capsys):
    save("a.json", sliding=(0,))
    document = json.loads(shown(capsys, "show", "a.json", "--retention", "0.5", "--json"))
    assert document["retention_realised"] == 0.5
    assert document["heads"][0] == [None] * 4
    assert document["sink_tokens"] == 128


def test_show_says_where_equal_scores_are_cut(capsys):
    save("a.json", layers=2, kv_heads=2, scores=[[0.9, 0.4], [0.4, 0.1]])
    out = shown(capsys, "show", "a.json", "--retention", "0.5")
    assert "the cut falls among 2 equal scores" in out
    assert "equal scores" not in shown(capsys, "show", "a.json", "--retention", "0.75")
    document = json.loads(shown(capsys, "show", "a.json", "--retention", "0.5", "--json"))
    assert document["heads_tied_at_the_cut"] == 2
    assert document["heads"] == [[1.0, 1.0], [0.0, 0.0]]


@pytest.mark.parametrize("retention", ["0", "1.5", "-0.1", "nan", "half"])
def test_show_refuses_what_is_no_retention(capsys, retention):
    save("a.json")
    refused(capsys, "show", "a.json", "--retention", retention)


def test_show_names_what_is_missing(capsys):
    assert "kvprofile score no/model" in refused(capsys, "show", "no/model")


def test_show_finds_a_model_by_name_and_marks_sliding_layers(capsys):
    save(str(store.BUDGET_DIR / store.file_name("org/name")), name="org/name", sliding=(1,))
    assert heatmap.BLANK_NOTE in shown(capsys, "show", "org/name")


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


# diff


def test_diff_prints_warnings_first_and_the_changed_heads(capsys):
    save("a.json", layers=2, kv_heads=2, scores=[[0.9, 0.2], [0.7, 0.1]])
    save("b.json", layers=2, kv_heads=2, scores=[[0.3, 0.2], [0.7, 0.9]], method="loss")
    out = shown(capsys, "diff", "a.json", "b.json")
    assert out.startswith("warning: other method: kvzip and loss\n")
    assert "rank correlation (Spearman) of 4 heads: -0.400" in out
    assert "at retention 0.5: 2 heads change" in out
    assert "layer 0, KV head 0: full -> trimmed" in out
    assert "layer 1, KV head 1: trimmed -> full" in out


@pytest.mark.parametrize(
    ("shape", "side_by_side"), [((28, 4), True), ((36, 8), True), ((48, 8), False), ((80, 8), False)]
)
def test_diff_stacks_what_does_not_fit_80_columns(capsys, shape, side_by_side):
    save("a.json", layers=shape[0], kv_heads=shape[1])
    save("b.json", layers=shape[0], kv_heads=shape[1], seed=1, imported=True)
    out = shown(capsys, "diff", "a.json", "b.json", "--retention", "0.42", "--retention", "0.7")
    assert max(len(line) for line in out.splitlines()) <= 80
    assert any("A max" in line and "B max" in line for line in out.splitlines()) == side_by_side
    assert out.count("heads change") == 2
    assert "at retention 0.42" in out


def test_diff_json_is_one_document(capsys):
    save("a.json")
    save("b.json", seed=1)
    document = json.loads(shown(capsys, "diff", "a.json", "b.json", "--retention", "0.6", "--json"))
    assert document["warnings"] == []
    assert [at["retention"] for at in document["at"]] == [0.9, 0.7, 0.6, 0.5, 0.3]
    assert document["a"]["model"] == "example/model"
    moved = document["at"][3]["moved"]
    assert {"layer", "kv_head", "before", "after"} == set(moved[0])


def test_diff_of_a_file_with_itself(capsys):
    save("a.json")
    out = shown(capsys, "diff", "a.json", "a.json")
    assert "warning" not in out
    assert "at retention 0.5: no heads change" in out


def test_diff_refuses_another_geometry(capsys):
    save("a.json")
    save("b.json", layers=7)
    assert "only profiles of one geometry can be compared" in refused(capsys, "diff", "a.json", "b.json")


# validate


def test_validate_searches_folders_deeply_and_lists_every_problem(capsys):
    save("budgets/good.json")
    save("budgets/deep/er/good.json")
    Path("budgets/deep/empty.json").write_text("")
    Path("budgets/deep/config.json").write_text(json.dumps(CONFIG))
    assert run(["validate", "budgets"]) == 2
    captured = capsys.readouterr()
    assert captured.err == "kvprofile: problems in 2 of 4 budget files\n"
    lines = captured.out.splitlines()
    assert [line[:4] for line in lines] == ["ok  ", "bad ", "bad ", "ok  "]
    assert "not a budget file: JSON with 'model_type', 'hidden_size', 'intermediate_size'" in lines[1]
    assert "empty.json: not JSON" in lines[2]


def test_validate_accepts_a_clean_folder_and_says_what_is_imported(capsys):
    save("models/kv_budget/a.json", imported=True)
    out = shown(capsys, "validate")
    assert out.startswith("ok   models/kv_budget/a.json  6 layers x 4 KV heads")
    assert "imported, not verified against weights" in out


def test_validate_finds_two_files_for_one_model_in_a_folder_only(capsys):
    save("budgets/a.json")
    save("budgets/other/b.json", seed=1)
    shown(capsys, "validate", "budgets")
    save("budgets/b.json", seed=1)
    assert run(["validate", "budgets"]) == 2
    captured = capsys.readouterr()
    assert "bad  budgets: a.json and b.json are for one model, example/model" in captured.out
    assert captured.err == "kvprofile: problems in 1 folder\n"
    assert run(["validate", "budgets", "--json"]) == 2
    document = json.loads(capsys.readouterr().out)
    assert document["ok"] is False
    assert list(document["folders"]) == ["budgets"]
    assert document["files"]["budgets/a.json"] == []


def test_validate_checks_a_file_once(capsys):
    save("budgets/a.json")
    out = shown(capsys, "validate", "budgets", "./budgets", "budgets/a.json")
    assert out.count("ok   ") == 1


def test_validate_survives_loops_of_links(capsys):
    save("budgets/a.json")
    Path("budgets/again").symlink_to(Path("budgets").resolve(), target_is_directory=True)
    Path("budgets/self.json").symlink_to("self.json")
    assert run(["validate", "budgets"]) == 2
    out = capsys.readouterr().out
    assert out.count("ok   ") == 1
    assert "self.json: cannot read" in out


def test_validate_names_folders_it_cannot_read(capsys, monkeypatch):
    save("budgets/a.json")
    Path("budgets/locked").mkdir()
    real = os.scandir

    def scandir(path: str) -> object:
        if str(path).endswith("locked"):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    assert run(["validate", "budgets"]) == 2
    captured = capsys.readouterr()
    assert "bad  budgets/locked: cannot read the folder: Permission denied" in captured.out
    assert captured.err == "kvprofile: problems in 1 folder\n"


def test_validate_does_not_wait_for_pipes(capsys):
    save("budgets/a.json")
    os.mkfifo("budgets/pipe.json")
    assert run(["validate", "budgets"]) == 2
    assert "pipe.json: not a regular file" in capsys.readouterr().out


def test_validate_prints_odd_names_and_contents_as_escapes(capsys):
    save("budgets/a.json")
    Path(os.fsdecode(b"budgets/\xff\x1b[31m.json")).write_text('{"schema_version": 1, "\\u001b[31m": 1, "\\ud800": 2}')
    assert run(["validate", "budgets"]) == 2
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert "\\xff\\x1b[31m.json" in out


def test_validate_says_where_it_looked(capsys):
    assert "no budget files in models/kv_budget" in refused(capsys, "validate")
    assert "nothing.json: cannot read" in (run(["validate", "nothing.json"]), capsys.readouterr().out)[1]
    Path("empty").mkdir()
    assert "no budget files in empty" in refused(capsys, "validate", "empty")


# plot


def test_plot_writes_each_kind(capsys):
    save("a.json")
    for name in ("a.png", "b.svg"):
        assert run(["plot", "a.json", "--output", name, "--kind", "scores", "--kind", "layers", "--dpi", "40"]) == 0
        assert Path(name).stat().st_size > 1000
    assert "wrote b.svg" in capsys.readouterr().err
    document = json.loads(shown(capsys, "plot", "a.json", "--output", "c.png", "--dpi", "40", "--json"))
    assert document["kinds"] == ["heatmap", "scores", "layers"]


def test_plot_refuses_and_leaves_what_is_there(capsys):
    save("a.json")
    Path("a.pdf").write_text("mine")
    assert ".png or .svg" in refused(capsys, "plot", "a.json", "--output", "a.pdf")
    assert Path("a.pdf").read_text() == "mine"
    assert "nothing.json" in refused(capsys, "plot", "nothing.json", "--output", "a.png")
    assert "pie" in refused(capsys, "plot", "a.json", "--output", "a.png", "--kind", "pie")
    Path("folder.png").mkdir()
    assert "it is a folder" in refused(capsys, "plot", "a.json", "--output", "folder.png")
    assert not Path("a.png").exists()


# plan


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
        (["a.json", "--gpu-memory", "24GiB", "--context", "9", "--weights-gib", "inf"], "no size"),
        (["a.json", "--gpu-memory", "24GiB", "--context", "9", "--memory-utilization", "0"], "outside"),
        ([".", "--gpu-memory", "24GiB", "--context", "9"], "no config.json"),
    ],
)
def test_plan_refuses_with_one_line(capsys, arguments, message):
    save("a.json")
    assert message in refused(capsys, "plan", *arguments)


# all of them


@pytest.mark.parametrize("command", ["show", "diff", "plot", "plan", "validate"])
def test_help_of_each_command(capsys, command):
    assert command in shown(capsys, command, "--help")


@pytest.mark.parametrize(
    "arguments", [["--help"], ["show", "a.json"], ["validate", "a.json"], ["diff", "a.json", "a.json"]]
)
def test_light_commands_load_nothing_heavy(arguments):
    save("a.json")
    heavy = "('torch', 'transformers', 'matplotlib', 'scipy', 'numpy')"
    code = (
        "import sys; from kvprofile.cli import run; run(sys.argv[1:]); "
        f"print([m for m in {heavy} if m in sys.modules], file=sys.stderr)"
    )
    started = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True)
    assert done.stderr.splitlines()[-1] == "[]"
    assert time.perf_counter() - started < 5  # 0.3 s where the machine is idle
