"""What counts as equal, and how what does not is named."""

from __future__ import annotations

import math

import pytest

from kvprofile.budget.trim import TrimRule
from kvprofile.verify import comparison
from kvprofile.verify.child_process import EngineRun
from kvprofile.verify.comparison import BETWEEN_ENGINES, TO_SIMULATION, Compared
from kvprofile.verify.request_plan import Request, RequestPlan
from kvprofile.verify.teacher_forcing import lives_of
from tests.helpers.models import ROOT

PROMPT = tuple(range(200))
PLAN = RequestPlan({"load": (Request("one", PROMPT, 4),)}, 300, 400, 100)
GROUPS = [{"trimmed": False, "full": True, "share": None}, {"trimmed": True, "full": False, "share": None}]


def output(tokens=(5, 6, 7, 8), logprobs=(-1.0,) * 4, best=None, lives=None):
    return {
        "name": "one", "id": "0-x", "tokens": list(tokens), "logprobs": list(logprobs), "seconds": 0.01,
        "best": best or [{str(token): -1.0, "9": -1.0004} for token in tokens],
        "lives": lives or [{"tokens": 200, "hit": 0, "chunks": [[0, 100], [100, 100], [200, 1], [201, 1], [202, 1]]}],
    }  # fmt: skip


def run(made, statistics=(), free=9, blocks=10):
    found = {"batches": {"load": [made]}, "groups": GROUPS, "free": free, "blocks": blocks, "preemptions": 0}
    return EngineRun(found | {"facts": {}}, tuple(statistics))


def compared(one, other, **options):
    return comparison.answers(PLAN, run(one), run(other), "float32", **options)


def test_equal_answers_and_small_differences_are_fine():
    found = compared(output(), output(logprobs=(-1.0, -1.00005, -1.0, -1.0)))
    assert (found.tokens, found.problems) == (4, [])
    assert found.as_check()["largest"] == 5e-05


def test_a_near_tie_ends_the_comparison_and_anything_further_is_named():
    found = compared(output(), output(tokens=(5, 9, 1, 1)))
    assert (found.tokens, found.near_ties, found.problems) == (1, 1, [])
    found = compared(output(), output(tokens=(5, 3, 1, 1)))
    assert found.problems == ["request one of batch load, token 201: token 3, not 6, which is far more likely"]
    found = compared(output(), output(logprobs=(-1.0, -1.0, -1.5, -1.0)))
    assert found.problems[0] == (
        "request one of batch load, token 202: log-probabilities -1.0000 and -1.5000 are 0.5 apart"
    )


@pytest.mark.parametrize("odd", [math.nan, -math.inf])
def test_what_is_no_number_is_a_problem_in_every_dtype(odd):
    for margins in (*BETWEEN_ENGINES.values(), *TO_SIMULATION["whole"].values(), *TO_SIMULATION["graded"].values()):
        found = Compared(margins)
        for _ in range(1000):
            found.note("there", -1.0, -1.0)
        found.note("here", odd, -1.0)
        assert len(found.close().problems) == 1


def test_coarse_dtypes_may_have_a_few_tokens_further_apart_and_not_more():
    found = Compared(TO_SIMULATION["whole"]["bfloat16"])
    for number in range(1000):
        found.note(f"{number}", -1.0, -1.0 if number % 200 else -2.0)
    assert found.close().problems == []
    found.note("more", -1.0, -2.0)
    assert "more: log-probabilities" in found.close().problems[-1]
    mean = Compared(TO_SIMULATION["whole"]["bfloat16"])
    for _ in range(100):
        mean.note("x", -1.0, -1.1)
    assert mean.close().problems == ["log-probabilities are 0.1 apart in the mean"]
    assert Compared(TO_SIMULATION["whole"]["float32"]).close().problems == ["nothing could be compared"]


def test_tokens_after_a_preemption_are_left_out_where_only_first_lives_count():
    lives = [{"tokens": 200, "hit": 0, "chunks": []}, {"tokens": 202, "hit": 0, "chunks": []}]
    other = output(tokens=(5, 6, 1, 1), lives=lives)
    assert compared(output(), other, first_life=True).problems == []
    assert compared(output(), other).problems != []


def line(held, before=14):
    return {"request_id": "0-x", "blocks_after_prefill": before, "blocks_after_trim": held, "blocks_reclaimed": 0}


def test_blocks_are_counted_by_the_rule():
    rule = TrimRule(16, 64, 32)  # 200 tokens, 7 blocks: 1 of sinks, the window from 137 on, so 3 go
    assert comparison.held_blocks(rule, GROUPS, 200, 200) == 7 + 4
    found = comparison.blocks(PLAN, run(output(), [{"kv_bytes_in_use": 3}, line(11)]), rule)
    assert (found.requests, found.given_back, found.problems) == (1, 3, [])
    found = comparison.blocks(PLAN, run(output(), [line(10)]), rule)
    assert found.problems == ["request one, prompt of 200 tokens: 10 blocks held after the trim, the rule says 11"]
    found = comparison.blocks(PLAN, run(output(), [line(11)], free=8), rule)
    assert found.problems == ["1 blocks of the pool did not come back"]
    assert comparison.blocks(PLAN, run(output(), [line(None)]), rule).problems == ["no request gave blocks back"]


def test_graded_heads_hold_what_stays():
    rule = TrimRule(16, 64, 32)
    graded = [{"trimmed": True, "full": False, "share": 0.3}, {"trimmed": False, "full": False, "share": None}]
    assert comparison.held_blocks(rule, graded, 200, 200) == 4 + 1


def test_lives_begin_where_rows_are_trimmed():
    plain = output()
    assert lives_of(PROMPT, plain, at_admission=False) == [(200, 200, 204)]
    resumed = {"tokens": 203, "hit": 0, "chunks": [[0, 201], [201, 1], [202, 1], [203, 1]]}
    twice = output(lives=[plain["lives"][0], resumed])
    assert lives_of(PROMPT, twice, at_admission=True) == [(200, 200, 203), (203, 203, 204)]
    assert lives_of(PROMPT, twice, at_admission=False) == [(200, 200, 203), (201, 203, 204)]
    odd = {"tokens": 203, "hit": 0, "chunks": [[0, 200], [200, 1], [201, 2], [203, 1]]}
    assert lives_of(PROMPT, output(lives=[plain["lives"][0], odd]), at_admission=False) == [(200, 200, 203)]


def test_the_manual_states_the_margins():
    page = (ROOT / "docs" / "howto" / "verify.md").read_text(encoding="utf-8")
    for dtype, between in BETWEEN_ENGINES.items():
        (row,) = [line for line in page.splitlines() if line.startswith(f"| {dtype} |")]
        cells = [cell.strip() for cell in row.strip("|").split("|")][1:]
        for cell, margins in zip(
            cells, (between, TO_SIMULATION["whole"][dtype], TO_SIMULATION["graded"][dtype]), strict=True
        ):
            share = f" but for {100 * margins.far_share:g} %" if margins.far_share else ""
            assert cell.replace(" of the tokens", "") == f"{margins.most:g}{share}, mean {margins.most_mean:g}"
