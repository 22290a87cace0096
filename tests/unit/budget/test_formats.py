"""Foreign formats: round trips, what the other tool's own loader sees, known models and provenance."""

from __future__ import annotations

import json
import os

import numpy as np
import pytest
import torch

from kvprofile.budget import formats, store
from kvprofile.budget.allocate import Constraints, full_head_count
from kvprofile.budget.choice import choose, choose_whole
from kvprofile.budget.formats.base import Export, Origin, import_profile
from kvprofile.budget.formats.kvzip import rule_keeps
from kvprofile.budget.known_models import KNOWN_MODELS, find, from_config, same_name
from kvprofile.budget.profile import PRESETS, HeadBudgets, retention_key
from kvprofile.errors import InputError
from tests.helpers.factories import make_geometry, make_profile
from tests.helpers.foreign import SCORE_FORMATS, content, facts_of, read_back, written


@pytest.mark.parametrize("name", SCORE_FORMATS)
@pytest.mark.parametrize("kv_heads", [1, 4])
def test_scores_come_back_and_give_the_same_budgets(name, kv_heads, tmp_path):
    profile = make_profile(5, kv_heads, sink_tokens=16, recent_tokens=64)
    found = read_back(profile, name, written(profile, name, tmp_path))
    assert found.scores.max == pytest.approx(np.array(profile.scores.max), rel=1e-6)
    assert found.budgets == profile.budgets
    assert found.model.geometry == profile.model.geometry
    assert found.scoring.imported_from.format == name
    if name == "duo-attention":
        assert found.runtime == profile.runtime


@pytest.mark.parametrize("name", formats.FORMATS)
def test_what_we_write_twice_through_reading_is_equal_to_the_byte(name, tmp_path):
    first = written(make_profile(), name, tmp_path / "a", retention=0.5)
    back = read_back(make_profile(), name, first)
    assert store.to_bytes(back) == store.to_bytes(read_back(make_profile(), name, first))
    if name in SCORE_FORMATS:
        assert content(written(back, name, tmp_path / "b", retention=0.5)) == content(first)
    assert content(written(make_profile(), name, tmp_path / "c", retention=0.5)) == content(first)


def test_lu_kv_holds_every_retention_and_its_presets_come_back(tmp_path):
    profile = make_profile()
    path = written(profile, "lu-kv", tmp_path)
    table = np.load(path, allow_pickle=False)
    assert table.shape == (99, 6, 4)
    assert table.mean(axis=(1, 2)) == pytest.approx(np.arange(1, 100) / 100, abs=0.5 / 24 + 1e-6)
    found = read_back(profile, "lu-kv", path).budgets
    assert list(found) == [retention_key(1 - i / 100) for i in range(1, 100)]
    assert {key: found[key] for key in profile.budgets} == profile.budgets


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_lu_kv_goes_out_as_it_came_in(dtype, tmp_path):
    table = np.random.default_rng(0).random((99, 3, 2), dtype=np.float32).astype(dtype)
    table[4], table[5] = 0, 1
    np.save(tmp_path / "in.npy", table)
    found = read_back(make_profile(3, 2), "lu-kv", tmp_path / "in.npy")
    for i in range(99):
        budgets = found.budgets[retention_key(1 - (i + 1) / 100)]
        assert budgets.retention_realised == pytest.approx(1 - table[i].astype(float).mean())
    store.save(found, tmp_path / "b.json")
    out = written(store.load(tmp_path / "b.json"), "lu-kv", tmp_path)
    assert np.array_equal(np.load(out), table)
    if dtype == "float32":
        assert out.read_bytes() == (tmp_path / "in.npy").read_bytes()


def test_lu_kv_shares_may_be_fractions(tmp_path):
    profile = make_profile(2, 2)
    ratios = np.arange(1, 100)[:, None, None] / 100
    np.save(tmp_path / "x.npy", np.broadcast_to(ratios, (99, 2, 2)).astype(np.float32))
    found = read_back(profile, "lu-kv", tmp_path / "x.npy")
    assert found.budgets["0.7"].heads == [[pytest.approx(0.7)] * 2] * 2
    assert found.budgets["0.7"].retention_realised == pytest.approx(0.7)


@pytest.mark.parametrize("retention", [0.05, 0.4, 0.5, 1.0])
def test_a_runtime_file_brings_its_budget_back_and_sliding_layers_stay_null(retention, tmp_path):
    profile = make_profile(sliding=(1, 3), sink_tokens=16, recent_tokens=64)
    path = written(profile, "vllm", tmp_path, retention=retention)
    found = read_back(profile, "vllm", path)
    expected = choose_whole(profile, retention).allocation.budgets
    assert found.budgets == {retention_key(retention): expected}
    assert found.model == profile.model
    assert found.runtime == profile.runtime
    with pytest.raises(InputError, match=r"holds no scores; only retention .* is known"):
        choose(found, 0.77)


def test_a_budget_that_the_file_states_goes_before_the_choice_by_score(tmp_path):
    profile = make_profile(2, 2, scores=[[0.9, 0.8], [0.2, 0.1]])
    edited = HeadBudgets(heads=[[1.0, 0.0], [0.0, 1.0]], retention_realised=0.5)
    profile = profile.model_copy(update={"budgets": {"0.5": edited}})
    found = choose(profile, 0.5).allocation
    assert found.budgets == edited
    assert (found.full_heads, found.heads_exchanged, found.score_share) == (2, 1, pytest.approx(1.0 / 1.7))
    assert found.reason == "the file's budget at 0.5 was edited: it differs from the choice by score in 1 head"
    assert choose(profile.model_copy(update={"budgets": {}}), 0.5).allocation.reason is None
    for name in ("vllm", "csv", "lu-kv"):
        back = read_back(profile, name, written(profile, name, tmp_path, retention=0.5))
        assert back.budgets["0.5"] == edited
        reason = choose(back, 0.5).allocation.reason
        assert reason is None if name == "vllm" else "at 0.5 was imported" in reason


@pytest.mark.parametrize("retention", [0.0, -0.0, 1.0001, 7.0, float("nan"), float("inf"), float("-inf")])
def test_exports_refuse_what_is_not_a_retention(retention):
    with pytest.raises(InputError, match="outside"):
        full_head_count(retention, 24)
    with pytest.raises(InputError, match="outside"):
        Export(make_profile(), retention=retention)


@pytest.mark.parametrize("name", ["kvzip", "duo-attention", "lu-kv", "csv"])
def test_a_runtime_file_does_not_come_out_as_scores(name, tmp_path):
    profile = make_profile()
    found = read_back(profile, "vllm", written(profile, "vllm", tmp_path, retention=0.4))
    with pytest.raises(InputError, match=r"holds no scores; only retention 0\.4 is known"):
        written(found, name, tmp_path / "out", retention=0.4)
    assert not (tmp_path / "out").exists()
    with pytest.raises(InputError, match="holds no scores"):
        choose(found, 0.4, Constraints(tensor_parallel_size=4))
    again = written(found, "vllm", tmp_path / "again", retention=0.4)
    assert read_back(profile, "vllm", again).budgets == found.budgets


def test_csv_has_one_row_for_each_profiled_head_and_brings_the_budget_back(tmp_path):
    profile = make_profile(sliding=(0,))
    path = written(profile, "csv", tmp_path, retention=0.4)
    lines = path.read_text().splitlines()
    assert lines[0] == "layer,kv_head,score,budget"
    assert len(lines) == 1 + 5 * 4
    found = read_back(profile, "csv", path)
    assert found.budgets["0.4"].heads == choose(profile, 0.4).heads
    assert found.budgets["0.5"] == profile.budgets["0.5"]
    without = written(profile, "csv", tmp_path / "scores")
    assert read_back(profile, "csv", without).budgets == profile.budgets


@pytest.mark.parametrize("name", ["kvzip", "duo-attention", "lu-kv"])
@pytest.mark.parametrize(("kind", "words"), [("sliding", "slides"), ("stateful", "has no cache")])
def test_forms_without_a_place_for_layers_without_scores_refuse_them(name, kind, words, tmp_path):
    with pytest.raises(InputError, match=f"layer 2 of example/model {words} and has none"):
        written(make_profile(**{kind: (2,)}), name, tmp_path, retention=0.5)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("kv_heads", [1, 4])
def test_kvzip_loads_our_files_in_its_own_way(kv_heads, tmp_path):
    profiles = [make_profile(5, kv_heads, seed=seed) for seed in (1, 2)]
    paths = [written(profile, "kvzip", tmp_path / str(i)) for i, profile in enumerate(profiles)]
    loaded = [torch.load(path, weights_only=True).squeeze() for path in paths]
    merged = torch.stack(loaded, dim=0).amax(0)
    assert merged.reshape(5, kv_heads).tolist() == pytest.approx(
        np.maximum(*(np.array(profile.scores.max) for profile in profiles)), rel=1e-6
    )
    assert read_back(profiles[0], "kvzip", *paths).scores.max == pytest.approx(merged.reshape(5, kv_heads).numpy())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(3, 4), (3, 1, 4), (1, 3, 4, 1)])
def test_kvzip_files_of_every_published_shape_and_type_are_read(dtype, shape, tmp_path):
    scores = torch.linspace(0, 1, 12).reshape(shape).to(dtype)
    torch.save(scores, tmp_path / "x.pt")
    found = read_back(make_profile(3, 4), "kvzip", tmp_path / "x.pt")
    assert found.scores.max == pytest.approx(scores.double().reshape(3, 4).numpy(), rel=1e-8)
    assert found.scoring.dtype == str(dtype).removeprefix("torch.")


def test_several_kvzip_files_merge_by_maximum_and_keep_their_spread(tmp_path):
    for name, value in (("a", 0.2), ("b", 0.6)):
        torch.save(torch.full((1, 2), value), tmp_path / f"{name}.pt")
    found = read_back(make_profile(1, 2), "kvzip", tmp_path / "a.pt", tmp_path / "b.pt")
    assert found.scores.max == [[pytest.approx(0.6)] * 2]
    assert found.scores.spread == [[pytest.approx(0.2)] * 2]
    assert found.scores.mean is found.scores.p99 is None
    assert found.scoring.imported_from.file == "a.pt, b.pt"


def test_kvzips_rule_loses_tied_heads_and_ours_does_not():
    scores = [[1.0, 1.0, 1.0, 1.0], [0.5, 0.4, 0.3, 0.2]]
    assert [rule_keeps(scores, ratio) for ratio in (0.25, 0.5, 0.75, 1.0)] == [0, 0, 5, 8]
    profile = make_profile(2, 4, scores=scores)
    assert [choose(profile, ratio).allocation.full_heads for ratio in (0.25, 0.5, 0.75, 1.0)] == [2, 4, 6, 8]
    advice = formats.get("kvzip").advice(Export(profile, retention=0.5))
    assert advice == "at ratio 0.5 KVzip's own rule keeps 0 of 8 heads, kvprofile 4"


def test_duo_attention_loads_our_folder_in_its_own_way(tmp_path):
    profile = make_profile(sink_tokens=16, recent_tokens=64)
    folder = written(profile, "duo-attention", tmp_path)
    heads = np.clip(np.loadtxt(folder / "full_attention_heads.tsv", dtype=float, delimiter="\t"), 0, 1)
    config = json.loads((folder / "config.json").read_text())
    assert heads == pytest.approx(np.array(profile.scores.max))
    assert (config["sink_size"], config["recent_size"]) == (16, 64)


def test_duo_attention_values_are_clipped_and_rlkv_needs_no_config(tmp_path):
    (tmp_path / "adapter_weights.tsv").write_text("-0.25\t0.5\n1.5\t1e-3\n")
    found = read_back(make_profile(2, 2), "duo-attention", tmp_path)
    assert found.scores.max == [[0.0, 0.5], [1.0, 0.001]]
    assert found.scoring.method == "rlkv"
    assert (found.runtime.sink_tokens, found.runtime.recent_tokens) == (128, 256)
    assert "2 of 4 clipped" in found.scoring.imported_from.notes


def test_a_duo_attention_folder_is_replaced_whole_and_a_failure_leaves_nothing(tmp_path, monkeypatch):
    folder = written(make_profile(seed=1), "duo-attention", tmp_path)
    before = content(folder)
    written(make_profile(seed=2), "duo-attention", tmp_path)
    assert content(folder) != before
    before = content(folder)

    def full_disk(*_arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(InputError, match="No space left"):
        written(make_profile(seed=3), "duo-attention", tmp_path)
    assert content(folder) == before
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_the_registry_makes_new_formats_and_names_the_known_ones():
    for name in formats.FORMATS:
        assert formats.get(name).name == name
        assert formats.get(name) is not formats.get(name)
    with pytest.raises(InputError, match="unknown format 'onnx'; use one of kvzip, duo-attention, lu-kv, vllm, csv"):
        formats.get("onnx")


def test_known_models_are_named_by_hub_id_and_state_their_source():
    for name, facts in KNOWN_MODELS.items():
        assert facts.name == name == find(name).name
        assert facts.source == f"https://huggingface.co/{name}/blob/main/config.json"
        assert facts.geometry.head_size == 128


def test_facts_of_other_models_come_from_their_config(tmp_path):
    config = {
        "architectures": ["Qwen2ForCausalLM"],
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "hidden_size": 128,
        "sliding_window": 4096,
        "use_sliding_window": False,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    found = find(str(tmp_path))
    assert found.geometry.describe() == "2 layers x 2 KV heads (4 query heads, head size 32)"
    assert find("me/model", tmp_path / "config.json").name == "me/model"
    config["layer_types"] = ["full_attention", "sliding_attention"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert find(str(tmp_path)).geometry.profiled_layers == (0,)


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"num_hidden_layers": "x", "num_attention_heads": 0}', "[" * 10**5, "\xff"]
)
def test_broken_configs_are_refused(text, tmp_path):
    (tmp_path / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(InputError, match=r"config\.json"):
        from_config(tmp_path / "config.json", "me/model")


def test_a_model_that_nobody_knows_is_refused_with_the_way_out(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="the shape of me/model is not known here; give --config"):
        find("me/model")
    store.save(make_profile(name="me/model"), store.BUDGET_DIR / store.file_name("me/model"))
    assert find("me/model").geometry == make_profile().model.geometry


def test_provenance_is_kept_and_branches_are_refused(tmp_path):
    profile = make_profile()
    path = written(profile, "kvzip", tmp_path)
    provenance = Origin("https://example.org/scores", "5d84729", "MIT", ("scores/x.pt",))
    source = import_profile(formats.get("kvzip"), [path], facts_of(profile), provenance).scoring.imported_from
    assert (source.repository, source.commit, source.licence, source.file) == (
        "https://example.org/scores",
        "5d84729",
        "MIT",
        "scores/x.pt",
    )
    assert source.notes.startswith("sha256 ")
    assert str(tmp_path) not in store.to_bytes(read_back(profile, "kvzip", path)).decode()
    with pytest.raises(InputError, match="commit"):
        import_profile(formats.get("kvzip"), [path], facts_of(profile), Origin(commit="main"))


def test_imports_claim_nothing_about_weights(tmp_path):
    found = read_back(make_profile(), "kvzip", written(make_profile(), "kvzip", tmp_path))
    model = found.model
    assert (model.revision, model.tokenizer_sha256, model.weights_sha256, found.scoring.seed) == (None,) * 4
    assert {float(key) for key in found.budgets} == set(PRESETS)


GEMMA_3 = make_geometry(12, 4, query_groups=2, head_size=256, sliding=[layer for layer in range(12) if layer % 6 != 5])


def test_kvzip_has_a_row_for_each_full_attention_layer_alone(tmp_path):
    """KVzip scores the full layers of google/gemma-3-12b-it, 8 of 48; here 2 of 12."""
    for number, rows in enumerate(([[0.1, 0.2, 0.3, 0.4], [0.5, 0.6, 0.7, 0.8]], [[0.4] * 4, [0.6] * 4])):
        torch.save(torch.tensor(rows, dtype=torch.float64), tmp_path / f"{number}.pt")
    read = formats.get("kvzip").read([tmp_path / "0.pt", tmp_path / "1.pt"], GEMMA_3)
    assert read.scores[5] == [0.4, 0.4, 0.4, 0.4]
    assert read.scores[11] == [0.6, 0.6, 0.7, 0.8]
    assert [layer for layer, row in enumerate(read.scores) if row == [None] * 4] == [0, 1, 2, 3, 4, 6, 7, 8, 9, 10]
    assert read.spread[5] == pytest.approx([0.15, 0.1, 0.05, 0.0])
    torch.save(torch.zeros(12, 4), tmp_path / "all.pt")
    with pytest.raises(InputError, match="shape 12 x 4, the model is 12 layers, 2 of them with full attention, x 4 KV"):
        formats.get("kvzip").read([tmp_path / "all.pt"], GEMMA_3)


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("models/Meta-Llama-3.1-8B-Instruct", "meta-llama/Llama-3.1-8B-Instruct", True),
        ("/home/x/models/mistral-7b-instruct-v0.3/", "mistralai/Mistral-7B-Instruct-v0.3", True),
        ("models/Mistral-7B-Instruct-v0.2", "mistralai/Mistral-7B-Instruct-v0.3", False),
        ("models/Llama-3-8B-Instruct-Gradient-1048k", "meta-llama/Llama-3-8B-Instruct", False),
        ("C:\\models\\Tiny", "Tiny", True),
    ],
)
def test_names_of_one_model(one, other, same):
    assert same_name(one, other) is same
