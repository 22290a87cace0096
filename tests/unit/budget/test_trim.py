"""The trim rule against itself said naively, one token at a time."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvprofile.budget.trim import ANCHORED, SLIDING, WINDOWS, TrimRule

rules = st.builds(
    TrimRule, st.integers(0, 40), st.integers(1, 60), st.sampled_from((1, 4, 16, 32)), st.sampled_from(WINDOWS)
)


def blocks_seen(rule, position, prompt_tokens):
    """Blocks that hold a sink, or a token of the window as it is for the token that places it."""
    placed_by = min(position, prompt_tokens) if rule.window == ANCHORED else position
    return {
        key // rule.block_tokens
        for key in range(position + 1)
        if key < rule.sink_tokens or key > placed_by - rule.recent_tokens
    }


@given(rules, st.integers(0, 150), st.integers(0, 100))
def test_a_head_sees_whole_blocks_of_sinks_and_window(rule, prompt_tokens, later):
    position = prompt_tokens + later
    blocks = blocks_seen(rule, position, prompt_tokens)
    for key in range(position + 3):
        assert rule.sees(position, key, prompt_tokens) == (key <= position and key // rule.block_tokens in blocks)


@given(rules, st.integers(0, 150), st.integers(0, 100))
def test_a_head_holds_what_the_next_token_sees_of_what_was_processed(rule, prompt_tokens, later):
    processed = prompt_tokens + later
    seen = sum(rule.sees(processed, key, prompt_tokens) for key in range(processed))
    assert rule.held_tokens(processed, prompt_tokens) == seen


@given(rules, st.integers(0, 150), st.integers(0, 100))
def test_what_has_left_a_window_does_not_come_back(rule, prompt_tokens, later):
    here, there = (rule.window_start(prompt_tokens + n, prompt_tokens) for n in (later, later + 1))
    assert here <= there
    if rule.window == ANCHORED:
        assert here == there == rule.window_start(prompt_tokens, prompt_tokens)


def test_an_anchored_window_keeps_the_answer_and_a_sliding_one_moves_on():
    anchored, sliding = (TrimRule(16, 64, 16, window) for window in (ANCHORED, SLIDING))
    assert (anchored.held_tokens(1000, 1000), sliding.held_tokens(1000, 1000)) == (88, 88)
    assert (anchored.held_tokens(1500, 1000), sliding.held_tokens(1500, 1000)) == (588, 92)


@pytest.mark.parametrize("sizes", [(-1, 4, 16), (0, 0, 16), (0, 4, 0), (0, 4, 16, "rolling")])
def test_what_means_nothing_is_refused(sizes):
    with pytest.raises(ValueError, match=r"must be >= 0|the window is anchored or sliding, not 'rolling'"):
        TrimRule(*sizes)


@given(
    rules.filter(lambda rule: rule.anchored),
    st.floats(0.001, 0.999),
    st.integers(0, 4000),
    st.integers(1, 4000),
)
def test_spans_and_what_is_near_are_what_a_share_keeps(rule, share, prompt_tokens, more):
    """A longer prompt keeps the same of every whole span that it shares with a shorter one."""
    spans, near = rule.spans(share, prompt_tokens), rule.near_blocks(share, prompt_tokens)
    middle = rule.middle_tokens(prompt_tokens, prompt_tokens) // rule.block_tokens
    kept = rule.kept_tokens(share, prompt_tokens) // rule.block_tokens
    assert sum(blocks for blocks, _ in spans) + near == middle
    assert sum(stay for _, stay in spans) + near == kept
    assert all(0 <= stay <= blocks for blocks, stay in spans)
    assert near <= min(0.57 * kept, middle / 8) + 1.5
    longer = rule.spans(share, prompt_tokens + more)
    whole, also = ([span for span in found if span[0] == rule.span_blocks(share)] for found in (spans, longer))
    assert all(one == other for one, other in zip(whole, also, strict=False))
