"""Graded budgets of a file: at any retention, in classes, and only with their probe."""

from __future__ import annotations

import hashlib
import itertools
import math

import pytest
import safetensors.torch
import torch

from kvprofile.budget import graded, probe, store
from kvprofile.budget.allocate import Constraints, allocate
from kvprofile.budget.choice import choose, choose_whole, default_kind
from kvprofile.budget.profile import GRADED_PRESETS, Profile, mean_budget
from kvprofile.budget.profile_diff import compare
from kvprofile.errors import InputError
from tests.helpers.factories import make_graded, make_profile


def mean(heads):
    return mean_budget(heads)


def test_the_kind_is_graded_where_there_is_a_probe():
    assert default_kind(make_graded()) == "graded"
    assert default_kind(make_profile()) == "whole"
    assert choose(make_graded(), 0.5).kind == "graded"
    assert choose(make_graded(), 0.5, statistic="max").kind == "whole"  # heads ranked anew are whole


@pytest.mark.parametrize("retention", [*GRADED_PRESETS, 0.95, 0.62, 0.4, 0.1, 0.01])
def test_the_mean_of_the_shares_is_the_retention(retention):
    profile = make_graded(kv_heads=4)
    for constraints in (Constraints(), Constraints(tensor_parallel_size=2), Constraints(classes=2)):
        chosen = choose(profile, retention, constraints)
        assert chosen.retention_realised == pytest.approx(retention, abs=1e-5)
        assert len({value for row in chosen.heads for value in row}) <= constraints.classes
        assert chosen.stated == (retention in GRADED_PRESETS)


def test_between_stated_retentions_shares_lie_between():
    profile = make_graded()
    low, high = (profile.budgets[key].heads for key in ("0.3", "0.5"))
    found, between = graded.shares(profile, 0.4)
    assert between == (0.3, 0.5)
    for rows in zip(low, found, high, strict=True):
        for below, value, above in zip(*rows, strict=True):
            assert value == pytest.approx((below + above) / 2)
    assert choose(profile, 0.4).origin == "shares between those stored at 0.3 and 0.5, in classes"
    assert graded.shares(profile, 1.0)[0] == [[1.0] * len(row) for row in low]


def test_shares_never_fall_as_the_retention_rises():
    profile = make_graded(seed=3)
    steps = [graded.shares(profile, round(0.01 * step, 2))[0] for step in range(1, 101)]
    for lower, higher in itertools.pairwise(steps):
        pairs = [pair for rows in zip(lower, higher, strict=True) for pair in zip(*rows, strict=True)]
        assert all(after >= before - 1e-9 for before, after in pairs)


def test_whole_heads_of_a_graded_file_are_ranked_by_score():
    profile = make_graded()
    expected = allocate(profile.scores.max, 0.5).heads
    assert choose_whole(profile, 0.5).heads == expected
    assert not choose_whole(profile, 0.5).stated


def test_whole_heads_that_somebody_wrote_into_a_graded_file_are_kept():
    profile = make_graded()
    heads = [[float(head == 0) for head in range(len(row))] for row in profile.scores.max]
    budgets = profile.budgets | {"0.5": profile.budgets["0.5"].model_copy(update={"heads": heads})}
    assert choose_whole(profile.model_copy(update={"budgets": budgets}), 0.5).heads == heads


def test_a_probe_that_is_none_of_the_profile_s_is_refused_by_its_header(tmp_path):
    """Without torch, as vLLM's parent process reads it; a digest that fits says only that nobody changed the file."""
    other = {"weights": torch.zeros(2, 3, 71)}
    broken = safetensors.torch.save({"weights": torch.zeros(6, 4, 71)})[:-8]
    for content, told in (
        (b"junk", "does not hold the weights of a probe"),
        (safetensors.torch.save({"bias": torch.zeros(2, 2)}), "does not hold the weights of a probe"),
        (safetensors.torch.save({"weights": torch.zeros(2, 2)}), "does not hold the weights of a probe"),
        (safetensors.torch.save(other), "is for 2 layers x 3 KV heads, not 6 layers x 4 KV heads"),
        (broken, "does not hold the weights of a probe"),
    ):
        path = tmp_path / "a.probe.safetensors"
        path.write_bytes(content)
        profile = make_graded(probe_sha256=hashlib.sha256(content).hexdigest())
        with pytest.raises(InputError, match=told):
            (probe.load if content is broken else probe.read)(path, profile)
        assert content is broken or told in probe.problem(tmp_path / "a.json", profile)
    assert probe.problem(tmp_path / "a.json", make_profile()) is None


def test_what_a_file_without_a_probe_lacks_is_said():
    with pytest.raises(InputError, match="has no graded budgets, which need a probe"):
        choose(make_profile(), 0.5, kind="graded")
    with pytest.raises(InputError, match="a budget is whole or graded, not 'half'"):
        choose(make_profile(), 0.5, kind="half")
    with pytest.raises(InputError, match="a floor of full heads is for whole heads"):
        choose(make_graded(), 0.5, Constraints(floor=1))


def test_both_versions_are_written_and_read_back(tmp_path):
    for profile in (make_profile(), make_graded()):
        path = tmp_path / "file.json"
        store.save(profile, path)
        assert store.load(path) == profile
        assert path.read_bytes() == store.to_bytes(store.load(path))
    assert b'"probe"' not in store.to_bytes(make_profile())


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"schema_version": 1}, "schema_version is 1 with a probe"),
        ({"probe": None}, "schema_version is 2 without a probe"),
    ],
)
def test_version_and_probe_go_together(changes, told):
    content = make_graded().model_dump() | changes
    with pytest.raises(ValueError, match=told):
        Profile.model_validate(content)


def test_a_record_of_other_layers_is_refused():
    content = make_graded().model_dump()
    content["probe"]["r2"] = [0.5]
    with pytest.raises(ValueError, match=r"probe.r2 has 1 layers"):
        Profile.model_validate(content)


def save_probe(folder, profile=None, size=7):
    """A probe of random weights and the graded profile that names it, both written."""
    geometry = (profile or make_profile()).model.geometry
    weights = torch.rand(len(geometry.profiled_layers), geometry.kv_heads, size)
    content = probe.Probe(geometry.profiled_layers, weights).to_bytes()
    made = make_graded(probe_sha256=probe.digest(content))
    store.save(made, folder / "model.json")
    probe.path_of(folder / "model.json").write_bytes(content)
    return made, weights


def test_a_probe_is_read_back(tmp_path):
    made, weights = save_probe(tmp_path)
    path = tmp_path / "model.probe.safetensors"
    found = probe.load(path, made)
    assert torch.equal(found.weights, weights)
    assert found.to_bytes() == path.read_bytes()


def test_a_probe_that_is_missing_or_another_is_refused(tmp_path):
    made, _ = save_probe(tmp_path)
    path = tmp_path / "model.probe.safetensors"
    with pytest.raises(InputError, match="has no probe"):
        probe.load(path, make_profile())
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(InputError, match="is not the probe that the budget file of example/model was written with"):
        probe.load(path, made)
    path.unlink()
    with pytest.raises(InputError, match=r"no probe .* which graded budgets need"):
        probe.load(path, made)


def test_a_probe_of_other_features_or_another_shape_is_refused(tmp_path):
    made, _ = save_probe(tmp_path)
    path = tmp_path / "model.probe.safetensors"
    other = made.model_copy(update={"probe": made.probe.model_copy(update={"features": "key"})})
    with pytest.raises(InputError, match="looks at 'key'"):
        probe.load(path, other)
    small = probe.Probe((0,), torch.rand(1, 1, 7)).to_bytes()
    path.write_bytes(small)
    changed = made.model_copy(update={"probe": made.probe.model_copy(update={"sha256": probe.digest(small)})})
    with pytest.raises(InputError, match="is for 1 layers x 1 KV heads"):
        probe.load(path, changed)


def test_features_do_not_change_when_a_rotary_embedding_turns_keys():
    generator = torch.Generator().manual_seed(0)
    keys, values = torch.randn(2, 5, 8, generator=generator), torch.randn(2, 5, 6, generator=generator)
    angles = torch.rand(5, 4, generator=generator) * 6
    cos, sin = torch.cat([angles, angles], 1).cos(), torch.cat([angles, angles], 1).sin()
    turned = keys * cos + torch.cat([-keys[..., 4:], keys[..., :4]], -1) * sin
    torch.testing.assert_close(probe.features(turned, values, 10, 40), probe.features(keys, values, 10, 40))


def test_features_are_what_their_names_say():
    keys = torch.tensor([[[3.0, 0.0, 4.0, 1.0]]])
    values = torch.tensor([[[0.6, 0.8]]])
    (found,) = probe.features(keys, values, 9, 36)[0].tolist()
    expected = [5.0, 1.0, 0.6, 0.8, math.sqrt(26), 1.0, 0.25, 0.0625, math.log(28), math.log(10), 1.0]
    assert found == pytest.approx(expected)


def test_a_diff_of_graded_files_leaves_out_what_hardly_moves():
    before = make_graded()
    heads = [list(row) for row in before.budgets["0.5"].heads]
    heads[0][0], heads[0][1] = heads[0][0] + 0.01, heads[0][1] - 0.01
    heads[1][0], heads[1][1] = heads[1][0] + 0.2, heads[1][1] - 0.2
    budgets = before.budgets | {"0.5": before.budgets["0.5"].model_copy(update={"heads": heads})}
    after = before.model_copy(update={"budgets": budgets})
    found = compare(before, after, [0.5]).at[0]
    assert 0 < len(found.moved) < len(heads) * len(heads[0])
    assert all(abs(move.before - move.after) >= 0.05 for move in found.moved)
    assert compare(before, before, [0.5]).at[0].moved == ()
    whole = compare(before, make_profile(), [0.5]).at[0]  # where one file is not graded, whole heads are compared
    assert {move.before for move in whole.moved} <= {0.0, 1.0}
