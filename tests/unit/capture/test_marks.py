"""Marks on requests cross processes."""

from __future__ import annotations

import json
from types import SimpleNamespace

from hypothesis import given
from hypothesis import strategies as st

from kvprofile.capture.marks import Mark


@given(st.text(), st.integers(0, 2**40), st.integers(0, 2**20), st.none() | st.tuples(st.integers(0), st.integers(0)))
def test_marks_cross_processes(key, context, prefix, chunk):
    mark = Mark(key, context, prefix, chunk)
    carried = json.loads(json.dumps(mark.as_extra_args()))
    assert Mark.of(SimpleNamespace(extra_args={**carried, "other": 1})) == mark
    for unmarked in (None, SimpleNamespace(extra_args=None), SimpleNamespace(extra_args={"other": 1})):
        assert Mark.of(unmarked) is None
