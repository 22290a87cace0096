from __future__ import annotations

import subprocess
import sys

import pytest
from factories import make_profile
from hypothesis import given, settings
from hypothesis import strategies as st

from kvprofile.budget.compare import MovedHead, budgets_at, compare, rank_correlation
from kvprofile.errors import InputError

# two layers of two heads; B moves the best head from (0, 0) to (1, 1)
SCORES_A = [[0.9, 0.2], [0.7, 0.1]]
SCORES_B = [[0.3, 0.2], [0.7, 0.9]]


def test_rank_correlation_by_hand():
    assert rank_correlation([1, 2, 3, 4], [10, 20, 30, 40]) == pytest.approx(1.0)
    assert rank_correlation([1, 2, 3, 4], [4, 3, 2, 1]) == pytest.approx(-1.0)
    # d = (0, 1, -1, 0): 1 - 6 * 2 / (4 * 15) = 0.8
    assert rank_correlation([1, 2, 3, 4], [1, 3, 2, 4]) == pytest.approx(0.8)


def test_rank_correlation_gives_ties_their_mean_rank():
    # ranks (1.5, 1.5, 3) and (1, 2, 3): covariance 1.5, squares 1.5 and 2
    assert rank_correlation([5, 5, 9], [1, 2, 3]) == pytest.approx(1.5 / (1.5 * 2) ** 0.5)


def test_rank_correlation_is_null_where_undefined():
    assert rank_correlation([0.5, 0.5, 0.5], [1, 2, 3]) is None
    assert rank_correlation([1.0], [2.0]) is None


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=2, max_size=40))
def test_rank_correlation_agrees_with_scipy(pairs):
    stats = pytest.importorskip("scipy.stats")
    first, second = [a for a, _ in pairs], [b for _, b in pairs]
    ours = rank_correlation(first, second)
    if len(set(first)) == 1 or len(set(second)) == 1:
        assert ours is None
    else:
        assert ours == pytest.approx(stats.spearmanr(first, second).statistic, abs=1e-9)


def test_heads_that_change_class_and_overlap_by_hand():
    found = compare(make_profile(2, 2, scores=SCORES_A), make_profile(2, 2, scores=SCORES_B), [0.5])
    at = found.at[0]
    # at 0.5 two heads are full: A keeps (0,0) (1,0), B keeps (1,1) (1,0)
    assert at.top_heads == 2
    assert at.top_overlap == 0.5
    assert at.chance_overlap == 0.5
    assert at.moved == (MovedHead(0, 0, 1.0, 0.0), MovedHead(1, 1, 0.0, 1.0))
    # ranks A (4, 2, 3, 1), B (2, 1, 3, 4): d = (2, 1, 0, -3), 1 - 6 * 14 / 60 = -0.4
    assert found.rank_correlation == pytest.approx(-0.4)


def test_a_profile_agrees_with_itself_without_warnings():
    profile = make_profile(5, 4)
    found = compare(profile, profile)
    assert found.warnings == ()
    assert found.rank_correlation == pytest.approx(1.0)
    assert all(at.top_overlap == 1.0 and not at.moved for at in found.at)


def test_sliding_layers_take_no_part():
    profile = make_profile(4, 2, sliding=(0, 2))
    found = compare(profile, make_profile(4, 2, sliding=(0, 2), seed=3))
    assert found.heads == 4
    assert {head.layer for at in found.at for head in at.moved} <= {1, 3}


def test_another_geometry_is_refused_with_both_shapes():
    with pytest.raises(InputError, match=r"6 layers x 4 .* 7 layers x 4 .* one geometry") as caught:
        compare(make_profile(6, 4), make_profile(7, 4))
    assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match="sliding"):
        compare(make_profile(6, 4), make_profile(6, 4, sliding=(1,)))


@pytest.mark.parametrize(
    ("change", "warning"),
    [
        ({"name": "other/model"}, "models differ: example/model and other/model"),
        ({"weights_sha256": "d" * 64}, "weights differ"),
        ({"tokenizer_sha256": "d" * 64}, "tokenizers differ"),
        ({"method": "loss"}, "other method: kvzip and loss"),
        ({"chunk_tokens": 1000}, "other chunk length in tokens: 2000 and 1000"),
        ({"corpus_sha256": "e" * 64}, "other corpora: prose (cccccccccccc, 12,000 tokens) and prose (eee"),
        ({"sink_tokens": 64}, "other sink tokens: 128 and 64"),
        ({"statistic": "mean", "mean": [[0.1] * 4] * 6}, "other ranking statistic: max and mean"),
        ({"imported": True}, "weights of the second unknown: imported, not verified against weights"),
    ],
)
def test_each_difference_is_one_warning(change, warning):
    warnings = compare(make_profile(), make_profile(**change)).warnings
    assert len([line for line in warnings if line.startswith(warning)]) == 1
    assert len(warnings) == (2 if "imported" in change else 1)


def test_two_imports_say_what_cannot_be_known():
    warnings = compare(make_profile(imported=True), make_profile(imported=True)).warnings
    assert warnings[0].startswith("weights of the first and the second unknown")
    assert any(line.startswith("neither file records its chunk length") for line in warnings)


def test_budgets_come_from_the_file_where_it_has_them():
    profile = make_profile(2, 2, scores=SCORES_A)
    assert budgets_at(profile, 0.5) is profile.budgets["0.5"]
    assert budgets_at(profile, 0.25).heads == [[1.0, 0.0], [0.0, 0.0]]
    with pytest.raises(InputError, match="outside"):
        budgets_at(profile, 0.0)


def test_comparing_needs_no_heavy_library():
    code = "import sys, kvprofile.budget.compare; print([m for m in ('torch','scipy','numpy') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
