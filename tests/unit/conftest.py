"""Unit tests are quick: one thread for tensors, and neither vLLM nor a browser (project/test_layout.py looks)."""

from __future__ import annotations

import sys

import pytest


@pytest.fixture(autouse=True)
def one_thread():
    """Tensors are tiny here: a second thread only waits for the first, for minutes where cores are shared."""
    torch = sys.modules.get("torch")
    if torch is None:
        yield
        return
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def no_vllm():
    """Importing vLLM takes longer than most of these tests together; where other tests loaded it, nothing is seen."""
    loaded = "vllm" in sys.modules
    yield
    assert loaded or "vllm" not in sys.modules, "this test loads vLLM, so it belongs in tests/vllm"
