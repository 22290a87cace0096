"""The budgets that an evaluation compares: profiles, random heads, inverted and uniform ones."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvprofile.budget.allocate import full_head_count
from kvprofile.errors import InputError
from kvprofile.evaluate.variants import Contender, build, contenders
from tests.helpers import foreign
from tests.helpers.factories import make_geometry, make_graded, make_profile


def full_places(variant):
    return {(layer, head) for layer, row in enumerate(variant.heads) for head, value in enumerate(row) if value == 1.0}


def by_key(variants):
    return {variant.key: variant for variant in variants}


def test_the_table_of_variants():
    profile = make_profile(6, 4, sliding=(1, 4))
    variants = build([Contender("kvzip", profile)], profile.model.geometry, [0.5, 0.25, 0.5], random_seeds=2)
    assert [variant.key for variant in variants] == [
        "full",
        *(f"{name}@{r}" for r in ("0.5", "0.25") for name in ("kvzip", "random-0", "random-1", "inverted", "uniform")),
        "streaming",
    ]
    assert [variant.row for variant in variants][2:4] == ["random@0.5", "random@0.5"]
    for variant in variants:
        expected = 16 if variant.kind == "full" else full_head_count(variant.retention, 16) if variant.retention else 0
        assert variant.full_heads == expected
        assert [row[0] is None for row in variant.heads] == [False, True, False, False, True, False]
    found = by_key(variants)
    assert full_places(found["kvzip@0.25"]) < full_places(found["kvzip@0.5"])
    assert full_places(found["random-1@0.25"]) < full_places(found["random-1@0.5"])
    assert full_places(found["random-0@0.5"]) != full_places(found["random-1@0.5"])
    assert not full_places(found["inverted@0.5"]) & full_places(found["kvzip@0.5"])
    bare = build([Contender("kvzip", profile)], profile.model.geometry, [0.5], controls=False)
    assert [variant.key for variant in bare] == ["full", "kvzip@0.5"]


def test_inverted_heads_are_the_other_half_even_among_equals():
    profile = make_profile(4, 4, scores=[[0.5] * 4] * 4)
    found = by_key(build([Contender("a", profile)], profile.model.geometry, [0.5]))
    assert full_places(found["a@0.5"]) | full_places(found["inverted@0.5"]) == full_places(found["full"])


@given(st.integers(0, 50), st.integers(1, 6), st.integers(1, 5), st.floats(0.05, 1.0))
def test_uniform_heads_are_even_and_the_best_of_their_layer(seed, layers, kv_heads, retention):
    profile = make_profile(layers, kv_heads, seed=seed)
    under_test = Contender("a", profile)
    variants = build([under_test], profile.model.geometry, [retention], random_seeds=0)
    uniform = next(variant for variant in variants if variant.kind == "uniform")
    counts = [sum(value == 1.0 for value in row) for row in uniform.heads]
    assert max(counts) - min(counts) <= 1
    order = under_test.order()
    for layer, count in enumerate(counts):
        best = [place for place in order if place[0] == layer][:count]
        assert set(best) == {place for place in full_places(uniform) if place[0] == layer}


def test_contenders_get_labels_that_tell_them_apart():
    kvzip, duo = make_profile(), make_profile(method="duo-attention")
    assert [c.label for c in contenders([(Path("a.json"), kvzip), (Path("b.json"), duo)])] == ["kvzip", "duo-attention"]
    assert [c.label for c in contenders([(Path("a.json"), kvzip), (Path("b.json"), kvzip)])] == ["a", "b"]
    assert [c.label for c in contenders([(Path("a.json"), kvzip), (Path("x/a.json"), kvzip)])] == ["a 1", "a 2"]
    named = make_profile(method="random")
    assert [c.label for c in contenders([(Path("full.json"), named)])] == ["full 1"]


def test_profiles_that_cannot_be_compared_are_refused():
    profile = make_profile()
    with pytest.raises(InputError, match="the profile a belongs to example/model, 6 layers x 4 KV heads"):
        build([Contender("a", profile)], make_geometry(6, 2), [0.5])
    with pytest.raises(InputError, match="has no statistic mean; it has max"):
        build([Contender("a", profile, "mean")], profile.model.geometry, [0.5])
    with pytest.raises(InputError, match="outside"):
        build([Contender("a", profile)], profile.model.geometry, [float("nan")])
    graded = [[0.5, *row[1:]] for row in profile.budgets["0.5"].heads]
    kept = sum(map(sum, graded)) / 24
    budgets = profile.budgets["0.5"].model_copy(update={"heads": graded, "retention_realised": kept})
    odd = profile.model_copy(update={"budgets": {"0.5": budgets}})
    with pytest.raises(InputError, match="but only whole heads can be served"):
        build([Contender("a", odd)], profile.model.geometry, [0.5])


def test_a_runtime_file_has_one_budget_and_no_ranking(tmp_path):
    profile = make_profile()
    written = foreign.written(profile, "vllm", tmp_path, retention=0.4)
    stated = foreign.read_back(profile, "vllm", written)
    found = build([Contender("a", stated)], profile.model.geometry, [0.4], random_seeds=1)
    assert [variant.key for variant in found] == ["full", "a@0.4", "random-0@0.4", "streaming"]
    assert found[1].full_heads == found[2].full_heads == 10
    with pytest.raises(InputError, match=r"only retention 0\.4 is known"):
        build([Contender("a", stated)], profile.model.geometry, [0.5])


def test_another_statistic_ranks_other_heads():
    mean = [[0.001 * (layer + head) for head in range(4)] for layer in range(6)]
    profile = make_profile(mean=mean)
    own, other = (build([Contender("a", profile, s)], profile.model.geometry, [0.3])[1] for s in (None, "mean"))
    assert full_places(other) >= {(5, 3), (5, 2), (4, 3)}
    assert full_places(own) != full_places(other)


def graded(**changes):
    return Contender("graded", make_graded(**changes), None, "graded", Path("model.probe.safetensors"))


def shares(variant):
    return sorted(value for row in variant.heads for value in row if value is not None)


def test_graded_controls_keep_as_much_and_change_one_thing_each():
    contender = graded(sliding=[1])
    found = build([contender], contender.profile.model.geometry, [0.3, 0.5], random_seeds=2, own_scores=True)
    at = {variant.key: variant for variant in found if variant.retention == 0.3}
    mine = at["graded@0.3"]
    assert (mine.kind, mine.tokens, mine.probe) == ("profile", "probe", "graded")
    for key in ("any tokens-0@0.3", "any tokens-1@0.3", "reversed@0.3", "key norms@0.3", "own scores@0.3"):
        assert at[key].heads == mine.heads
    assert (at["shuffled@0.3"].tokens, at["equal@0.3"].tokens) == ("probe", "probe")
    assert shares(at["shuffled@0.3"]) == shares(mine)
    assert at["shuffled@0.3"].heads != mine.heads
    assert len(set(shares(at["equal@0.3"]))) == 1
    assert sum(shares(at["equal@0.3"])) == pytest.approx(sum(shares(mine)))
    assert len({variant.budget for variant in at.values()}) == len(at), "no two keep the same tokens"
    assert not {variant.kind for variant in found} & {"random", "inverted", "uniform"}  # controls of whole heads


def test_without_controls_only_the_kinds_asked_for_are_left():
    both = [Contender("kvzip", make_graded()), graded()]
    found = build(both, make_graded().model.geometry, [0.5], controls=False)
    assert [variant.row for variant in found] == ["full", "kvzip@0.5", "graded@0.5"]


def test_kinds_and_labels():
    path, profile = Path("models/a.json"), make_graded()
    assert [(c.label, c.kind) for c in contenders([(path, profile)])] == [("graded", "graded")]
    assert contenders([(path, profile)])[0].probe == Path("models/a.probe.safetensors")
    assert [c.kind for c in contenders([(path, profile)], "max")] == ["whole"]
    asked = contenders([(path, profile), (Path("b.json"), profile)], kinds=["whole", "graded"])
    assert [c.label for c in asked] == ["a", "a graded", "b", "b graded"]
