"""The attention backend of GPUs without FlashAttention, through our layout and view: its kernels, interpreted."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.vllm import interpreter

pytest.importorskip("vllm")
pytestmark = [pytest.mark.vllm, pytest.mark.skipif(not interpreter.is_here(), reason=interpreter.MISSING)]


def kernels(cases, *fault):
    """What the program found, in a process that finds Triton."""
    program = [sys.executable, "-m", "tests.vllm.triton_kernels", str(cases), *fault]
    found = subprocess.run(program, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    return json.loads(found.stdout.splitlines()[-1])


@pytest.mark.parametrize("cases", [6, pytest.param(40, marks=pytest.mark.slow)])
def test_kernels_read_what_the_budget_left_and_nothing_else(cases):
    """Full and trimmed parts in one pool; rows that decode, prefill, pad; what they may not read is NaN."""
    found = kernels(cases)
    assert found["worst"] < 2e-5
    assert found["filled"] > cases


def test_rows_that_are_not_rewritten_show():
    assert kernels(4, "stale")["worst"] > 1e-2
