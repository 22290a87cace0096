"""Models of which some layers keep a state: every command works on their other layers, or says why not in one line."""

from __future__ import annotations

import json

import pytest
import transformers

from kvprofile import checkpoint as checkpoints
from kvprofile.budget import store
from kvprofile.budget.profile import FULL_ATTENTION, NO_CACHE
from kvprofile.cli import run
from kvprofile.errors import InputError
from tests.helpers.models import _MAMBA, _SHAPE, HYBRIDS, random_model, save_checkpoint

TEXT = ["--corpus", "generate:prose:1:3000", "--context-tokens", "64", "--chunk-tokens", "32"]
PAIR = {"num_hidden_layers": 4}


def describe(folder):
    return checkpoints.describe(checkpoints.locate(str(folder)))


@pytest.fixture(scope="module")
def hybrid(tmp_path_factory, tokenizer):
    """A random Qwen3.5 with attention in layers 1 and 4 of 6."""
    return save_checkpoint(random_model("qwen3_5"), tmp_path_factory.mktemp("hybrids") / "hybrid", tokenizer)


@pytest.fixture
def budget(hybrid, workplace):
    """Its budget file, where commands look for it."""
    assert run(["score", str(hybrid), *TEXT]) == 0
    return workplace / "models/kv_budget/hybrid.json"


def answer(capsys, *arguments):
    capsys.readouterr()
    assert run([*map(str, arguments), "--json"]) == 0, capsys.readouterr().err
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("family", HYBRIDS)
def test_every_class_can_be_scored(family, workplace, tokenizer, capsys):
    folder = save_checkpoint(random_model(family), workplace / family, tokenizer)
    assert run(["score", str(folder), *TEXT]) == 0, capsys.readouterr().err
    profile = store.load(workplace / f"models/kv_budget/{family}.json")
    geometry = profile.model.geometry
    assert {FULL_ATTENTION} <= set(geometry.layer_types) <= {FULL_ATTENTION, NO_CACHE}
    for kind, row in zip(geometry.layer_types, profile.scores.max, strict=True):
        assert all((value is None) == (kind == NO_CACHE) for value in row)
    assert len(geometry.profiled_layers) == (3 if family in ("falcon_h1", "zaya") else 2)


def test_commands_take_a_budget_with_layers_that_keep_a_state(budget, hybrid, workplace, capsys):
    profile = store.load(budget)
    empty = [layer for layer, row in enumerate(profile.scores.max) if row[0] is None]
    assert empty == [0, 2, 3, 5]
    assert run(["validate", str(budget)]) == 0
    shown = answer(capsys, "show", "hybrid", "--retention", "0.5")
    assert shown["retention_realised"] == 0.5
    assert run(["diff", str(budget), str(budget)]) == 0
    assert run(["plot", str(budget), "--output", str(workplace / "map.png")]) == 0
    for told in (hybrid, budget):
        assert run(["plan", str(told), "--gpu-memory", "1GiB", "--context", "500"]) == 0
    for form, suffix in (("vllm", "json"), ("csv", "csv")):
        target = workplace / f"out.{suffix}"
        assert run(["export", str(budget), "--format", form, "--retention", "0.5", "--output", str(target)]) == 0
        assert target.is_file()


@pytest.mark.usefixtures("budget")
def test_evaluate_asks_a_hybrid(hybrid, capsys):
    arguments = [
        "--tasks", "needle", "--tasks", "multi_turn", "--context-tokens", "70", "--contexts", "1", "--questions", "3",
        "--retention", "0.5", "--block-tokens", "4", "--no-controls", "--device", "cpu",
    ]  # fmt: skip
    found = answer(capsys, "evaluate", hybrid, *arguments)
    assert found


def test_a_dry_run_counts_what_attention_and_mlps_cost(hybrid, workplace, capsys):
    found = answer(capsys, "score", hybrid, *TEXT, "--dry-run")
    assert found["least_seconds"] > 0
    assert not list(workplace.rglob("*.json"))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--method", "gate"], "--method gate does not run hybrid, some layers of which keep a state"),
        (["--method", "ablation"], "--method ablation does not run hybrid"),
        (["--engine", "vllm"], "--engine vllm does not run hybrid"),
    ],
)
def test_what_needs_more_than_states_that_are_put_back_is_refused(arguments, words, hybrid, workplace, capsys):
    assert run(["score", str(hybrid), *TEXT, *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith(f"kvprofile: {words}")
    assert len(captured.err.splitlines()) == 1
    assert not list(workplace.iterdir())


ZAMBA = {**_SHAPE, "num_hidden_layers": 18, "attn_layer_period": 6, "attn_layer_offset": 4, "mamba_d_state": 8}
JAMBA = {**_SHAPE, "attn_layer_period": 2, "attn_layer_offset": 1, "num_hidden_layers": 4, "num_experts": 2}


@pytest.mark.parametrize(
    ("config", "own", "words"),
    [
        ("JambaConfig", JAMBA, "in transformers' JambaForCausalLM a layer's state starts anew with every piece"),
        ("ZambaConfig", ZAMBA, "in transformers' ZambaForCausalLM a layer's state starts anew"),
        ("MiniMaxConfig", {**_SHAPE, **PAIR}, r"its class keeps states in a cache of its own \(MiniMaxCache\)"),
        ("InklingTextConfig", _SHAPE, "cannot be profiled"),
        (
            "Zamba2Config",
            {**_SHAPE, **_MAMBA, "num_hidden_layers": 4, "layers_block_type": ["mamba", "hybrid"] * 2},
            "layers share one attention, which calls itself layer -1",
        ),
    ],
)
def test_classes_that_cannot_work_are_refused_with_the_reason(config, own, words, tmp_path, tokenizer):
    model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, config)(**own))
    with pytest.raises(InputError, match=words):
        describe(save_checkpoint(model, tmp_path / "refused", tokenizer))


def test_layers_that_look_at_images_keep_no_state(tmp_path):
    transformers.MllamaTextConfig(**{**_SHAPE, "num_hidden_layers": 4, "cross_attention_layers": [2]}).save_pretrained(
        tmp_path
    )
    with pytest.raises(InputError, match="some layers keep neither a cache of the text nor a state"):
        describe(tmp_path)
