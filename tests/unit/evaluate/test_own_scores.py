"""How much of a context is repeated at a time for its own scores, so that no repeat leaves the model's positions."""

from __future__ import annotations

import pytest

from kvprofile.errors import InputError
from kvprofile.evaluate.own_scores import chunk_tokens
from kvprofile.scoring.prompts import Frame, longest_repeat

FRAME = Frame("", "", (), (1,) * 3, (2,) * 10, (3,) * 20)
AROUND = longest_repeat(FRAME, 0)


@pytest.mark.parametrize(
    ("context", "room", "repeated"),
    [(1000, 5000, 2000), (1000, 1000, 1000), (1000, 256, 256), (100, 100, 100), (100, 200, 200)],
)
def test_a_repeat_fits_into_the_room_that_a_context_leaves(context, room, repeated):
    assert chunk_tokens(FRAME, context + AROUND + room, context) == repeated


@pytest.mark.parametrize(
    ("context", "room", "told"),
    [
        (1000, 255, "at least 256 tokens at a time, and a context of 1,000 tokens leaves 255 of "),
        (100, 99, "at least 100 tokens at a time, and a context of 100 tokens leaves 99 of "),
        (1000, -2000, "leaves 0 of "),
    ],
)
def test_less_room_is_refused(context, room, told):
    with pytest.raises(InputError, match=told):
        chunk_tokens(FRAME, context + AROUND + room, context)
